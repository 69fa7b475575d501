"""The doctor finds each planted defect, and nothing where all is well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysseg.data.doctor import Finding, check_dataset
from raysseg.data.sample import Sample
from raysseg.data.store import write_store
from raysseg.data.synthetic import SyntheticSettings, synthetic_info, synthetic_samples


def findings_of(folder: Path, samples: list[Sample]) -> list[Finding]:
    return check_dataset(write_store(folder / "store", samples, synthetic_info(), image_encoding="raw"))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(synthetic_samples(SyntheticSettings(train_images=16, val_images=8)))


def test_good_data_has_no_complaint(tmp_path: Path, samples: list[Sample]) -> None:
    findings = findings_of(tmp_path, samples)
    assert {f.level for f in findings} == {"info"}
    assert any("agree with the labels on 100.00 %" in f.message for f in findings)
    assert any("share of the labelled pixels in per cent: background" in f.message for f in findings)


def _changed(samples: list[Sample], index: int, **values: object) -> list[Sample]:
    return [dataclasses.replace(s, **values) if i == index else s for i, s in enumerate(samples)]  # type: ignore[arg-type]


def _without_class(samples: list[Sample], k: int) -> list[Sample]:
    result = []
    for s in samples:
        assert s.scribble is not None
        result.append(dataclasses.replace(s, scribble=np.where(s.scribble == k, 255, s.scribble).astype(np.uint8)))
    return result


void: np.ndarray = np.full((96, 96), 255, np.uint8)


@pytest.mark.parametrize(
    ("level", "message", "keys", "damage"),
    [
        ("error", "without a scribble", ("train-00002",), lambda s: _changed(s, 2, scribble=None)),
        ("error", "without a single labelled pixel", ("train-00002",), lambda s: _changed(s, 2, scribble=void)),
        ("warning", "without a single labelled pixel", ("train-00001",), lambda s: _changed(s, 1, label=void)),
        ("warning", "without a label", ("val-00001",), lambda s: _changed(s, 17, label=None)),
        ("warning", "another class than the label", ("train-00003",), lambda s: _changed(s, 3, scribble=s[3].label[::-1])),
        ("error", "in both train and val", ("train-00004", "val-00000"), lambda s: _changed(s, 16, image=s[4].image)),
        ("warning", "twice in the same split", ("train-00004", "train-00005"), lambda s: _changed(s, 5, image=s[4].image)),
        ("warning", "of one single value", ("train-00006",), lambda s: _changed(s, 6, image=np.zeros_like(s[6].image))),
        ("error", "no scribble holds the class ring, though labels do", (), lambda s: _without_class(s, 3)),
        (
            "warning",
            "no label holds the class stripe",
            (),
            lambda s: [dataclasses.replace(x, label=np.where(x.label == 4, 0, x.label).astype(np.uint8)) for x in s],
        ),
        (
            "warning",
            "no scribble holds the class stripe",
            (),
            lambda s: _without_class(
                [dataclasses.replace(x, label=np.where(x.label == 4, 0, x.label).astype(np.uint8)) for x in s], 4
            ),
        ),
        (
            "warning",
            "four times as large as usual",
            ("train-00000",),
            lambda s: _changed(
                s, 0, image=np.tile(s[0].image, (3, 3, 1)), label=np.tile(s[0].label, (3, 3)), expressions=(),
                scribble=np.tile(s[0].scribble, (3, 3)),
            ),
        ),
    ],
)  # fmt: skip
def test_a_planted_defect_is_found(
    tmp_path: Path,
    samples: list[Sample],
    level: str,
    message: str,
    keys: tuple[str, ...],
    damage: Callable[[list[Sample]], list[Sample]],
) -> None:
    findings = findings_of(tmp_path, damage(samples))
    found = [f for f in findings if f.level == level and message in f.message]
    assert found, [f.message for f in findings]
    assert found[0].keys == keys
    order = [{"error": 0, "warning": 1, "info": 2}[f.level] for f in findings]
    assert order == sorted(order)


def test_no_labels_and_no_scribbles_at_all(tmp_path: Path, samples: list[Sample]) -> None:
    bare = [dataclasses.replace(s, label=None, scribble=None) for s in samples]
    messages = {f.message: f.level for f in findings_of(tmp_path, bare)}
    assert messages["val: no image has a label, so nothing can be evaluated on it"] == "warning"
    assert messages["train: no scribbles"] == "info"


def test_progress_is_told(tmp_path: Path, samples: list[Sample]) -> None:
    store = write_store(tmp_path / "store", samples[:3], synthetic_info(), image_encoding="raw")
    calls: list[tuple[int, int]] = []
    check_dataset(store, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
