"""What members of a population keep and copy, and what schedulers are told after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysseg.algorithms.sweep_points import Axis, Distribution
from raysseg.algorithms.sweep_schedulers import Population, StageHalving
from raysseg.algorithms.sweep_settings import AshaSettings, PbtSettings
from raysseg.algorithms.sweep_trial import adopt, evaluations, reason_of, take_snapshot
from raysseg.errors import NonFiniteError


def member(folder: Path, stage: int, text: str) -> Path:
    """A member's folder after a stage: two checkpoints, labels, metrics, and what no snapshot needs.

    As in a run, a file that is written again is a new one under the old name; only metrics grow.
    """
    for name in (f"{stage:08d}", f"{stage + 1:08d}"):
        write(folder / "checkpoints" / name / "weights", f"{text} {name}")
        write(folder / "checkpoints" / name / "manifest.json", "{}")
    write(folder / "checkpoints" / "replay" / "eil" / "segment", text)
    write(folder / "labels" / "v0001" / "maps.arrow", text)
    write(folder / "tensorboard" / "events", text)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"phase": "evaluate", "stage": stage, "miou": 0.5}) + "\n")
    return folder


def write(path: Path, text: str) -> None:
    """Writes a new file, also where one of that name is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)


def files(folder: Path) -> dict[str, str]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_snapshot_is_what_a_run_needs_and_stays_when_the_run_goes_on(tmp_path: Path) -> None:
    donor = member(tmp_path / "donor", 1, "first")
    take_snapshot(donor, 1)
    before = files(donor / "snapshots" / "stage-001")
    assert sorted(before) == [
        "checkpoints/00000002/manifest.json",
        "checkpoints/00000002/weights",
        "checkpoints/replay/eil/segment",
        "labels/v0001/maps.arrow",
        "metrics.jsonl",
    ]
    member(donor, 2, "second")
    assert files(donor / "snapshots" / "stage-001") == before
    take_snapshot(donor, 2)
    take_snapshot(donor, 3)
    assert sorted(path.name for path in (donor / "snapshots").iterdir()) == ["stage-002", "stage-003"]


def test_adopting_makes_a_folder_the_donors_and_keeps_its_own_snapshots(tmp_path: Path) -> None:
    donor, loser = member(tmp_path / "donor", 1, "good"), member(tmp_path / "loser", 1, "bad")
    take_snapshot(donor, 1)
    take_snapshot(loser, 1)
    member(donor, 2, "later")
    (loser / "error.txt").write_text("old")
    adopt(loser, donor, 1)
    found = files(loser)
    assert found["checkpoints/00000002/weights"] == "good 00000002"
    assert found["labels/v0001/maps.arrow"] == "good"
    assert found["metrics.jsonl"] == files(donor / "snapshots" / "stage-001")["metrics.jsonl"]
    assert "snapshots/stage-001/labels/v0001/maps.arrow" in found
    assert not {"error.txt", "checkpoints/00000001/weights"} & set(found)
    adopt(loser, None, 0)
    assert {name.partition("/")[0] for name in files(loser)} == {"snapshots"}


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    lines = [{"phase": "evaluate", "stage": 0, "miou": 0.1}, {"phase": "refine", "stage": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "evaluate", "stage": 1, "mi'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert evaluations(tmp_path) == lines[:1]
    assert evaluations(tmp_path / "absent") == []


def test_reasons_are_one_line() -> None:
    assert reason_of(NonFiniteError("The loss\nis nan.")) == "The loss is nan."
    assert reason_of(KeyError("x\ny")) == r"KeyError: 'x\ny'"
    assert reason_of(MemoryError()) == "MemoryError"


class FakeTrial:
    """A trial with what the schedulers look at."""

    def __init__(self, name: str, **config: Any) -> None:
        self.name, self.trial_id, self.config = name, f"id-of-{name}", {"job": name, **config}
        self.status = "RUNNING"

    def __str__(self) -> str:
        return self.name

    def set_config(self, config: dict[str, Any]) -> None:
        """As Tune's own."""
        self.config = config


def test_a_resumed_asha_knows_what_was_reported_before() -> None:
    def decisions(recalled: bool) -> list[str]:
        scheduler = StageHalving(AshaSettings(reduction_factor=2.0), "miou")
        if recalled:
            for name, score in (("a", 0.5), ("b", 0.6)):
                scheduler.recall(name, [{"stage": stage, "miou": score} for stage in range(3)])
        trial = FakeTrial("c")
        scheduler.on_trial_add(None, trial)
        return [scheduler.on_trial_result(None, trial, {"stage": 1, "miou": score}) for score in (0.55,)]

    assert decisions(recalled=False) == ["CONTINUE"]
    # Half of 0.5 and 0.6 lies at 0.55; what is below it is stopped.
    assert decisions(recalled=True) == ["CONTINUE"]
    scheduler = StageHalving(AshaSettings(reduction_factor=2.0), "miou")
    for name, score in (("a", 0.5), ("b", 0.6)):
        scheduler.recall(name, [{"stage": 1, "miou": score}])
    late = FakeTrial("c")
    scheduler.on_trial_add(None, late)
    assert scheduler.on_trial_result(None, late, {"stage": 1, "miou": 0.52}) == "STOP"
    # A trial that is resumed under its name is not judged again on a rung that it has passed.
    passed = FakeTrial("a")
    scheduler.on_trial_add(None, passed)
    assert scheduler.on_trial_result(None, passed, {"stage": 1, "miou": 0.1}) == "CONTINUE"


@pytest.mark.parametrize(("kind", "ends"), [("uniform", (0.0, 0.9)), ("loguniform", (1e-4, 0.1)), ("randint", (1, 4))])
def test_mutated_values_stay_in_their_range(tmp_path: Path, kind: str, ends: tuple[float, float]) -> None:
    axis = Axis(key="eil.gamma", distribution=Distribution(**{kind: ends}))
    scheduler = Population(
        PbtSettings(factors=(100.0, 0.001)), "miou", [axis], start=0, record=tmp_path / "population.json"
    )
    donor = FakeTrial("donor", **{"eil.gamma": ends[1]})
    values = [scheduler._get_new_config(FakeTrial("x"), donor)[0]["eil.gamma"] for _ in range(40)]
    assert all(ends[0] <= value <= ends[1] for value in values)
    assert len(set(values)) > 1
