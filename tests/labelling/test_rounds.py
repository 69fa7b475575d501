"""Rounds: every policy ranks plain images, the segmenter learns from the answers alone, and nothing is asked twice."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from raysseg.algorithms.ralis import RALISSettings
from raysseg.algorithms.ralis.module import QueryNetwork
from raysseg.cli.main import main
from raysseg.configuration import load_settings
from raysseg.data.readers.images import read_image, read_index_map
from raysseg.data.sample import DatasetInfo, default_palette
from raysseg.data.settings import DataSettings, open_dataset
from raysseg.errors import InputError
from raysseg.labelling import cvat, label_studio
from raysseg.labelling.answers import Given
from raysseg.labelling.durable import ExclusiveLock
from raysseg.labelling.export import export_answers
from raysseg.labelling.masks import mask_digest
from raysseg.labelling.networks import Networks
from raysseg.labelling.next_round import NextRound, next_round
from raysseg.labelling.overview import overview
from raysseg.labelling.project import Project
from raysseg.labelling.rounds import Rounds
from raysseg.labelling.settings import LabellingSettings
from raysseg.segmenters import SegmenterSettings, build_segmenter, save_segmenter

CLASSES = ("ground", "disc", "box")
STATE_IMAGES = 2


class Silent:
    """Progress that nobody sees."""

    def update(self, completed: float, total: float | None = None, **fields: object) -> None:
        """Shows nothing."""


def make_round(project: Project, count: int, out: Path | None = None) -> NextRound:
    return next_round(project.path, count, out, "/data/local-files/?d=", lambda title, total: nullcontext(Silent()))


def lines_of(done: NextRound) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.out / "regions.jsonl").read_text().splitlines()]


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    """What a finished variant of RALIS leaves, with weights that nobody trained."""
    folder = tmp_path / "variants" / "query" / "seed-0"
    segmenter = {"encoder": "resnet18", "weights": "none", "encoder_depth": 3, "decoder_channels": 16}
    values = {
        "method": "ralis",
        "data": {"source": "synthetic", "scribbles": "none"},
        "segmenter": segmenter,
        "ralis": {
            "policy": "query",
            "sets": {"state": STATE_IMAGES, "play": 4, "start": 1, "reward": 2},
            "regions": {"rows": 2, "columns": 3},
            "per_step": 2,
            "budgets": [4],
            "learning": {"budget": 4},
        },
    }
    settings = load_settings(RALISSettings, values)
    torch.manual_seed(1)
    network = build_segmenter(load_settings(SegmenterSettings, segmenter), len(CLASSES))
    for name in ("segmenter", "query"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    save_segmenter(folder / "segmenter" / "online.safetensors", network)
    save_file(QueryNetwork(**settings.ralis.network(len(CLASSES))).state_dict(), folder / "query" / "query.safetensors")
    info = DatasetInfo(
        name="made", class_names=CLASSES, palette=default_palette(3), has_background=True, source="nothing"
    )
    (folder / "dataset.json").write_text(json.dumps({"store": "gone", "info": dataclasses.asdict(info)}))
    return folder


def test_the_first_round_of_an_untrained_segmenter_is_drawn_at_random(project: Project) -> None:
    done = make_round(project, 4)
    assert (done.number, done.policy, done.answers, done.prelabelled) == (1, "uniform", 0, False)
    entries = lines_of(done)
    assert len({entry["id"] for entry in entries}) == 4
    for entry in entries:
        assert set(entry) >= {"id", "image", "box", "score", "round", "policy", "policy_version"}
        x0, y0, x1, y1 = entry["box"]
        image = read_image(project.images[entry["image"]].file)
        np.testing.assert_array_equal(read_image(done.out / "crops" / f"{entry['id']}.png"), image[y0:y1, x0:x1])
        with Image.open(done.out / "context" / f"{entry['id']}.jpg") as picture:
            assert picture.size == (48, 40)
        assert entry["score"] is None
        assert entry["prelabel"] is None
    assert not (done.out / "prelabels").exists()
    assert not (done.out / "cvat" / "annotations.xml").exists()
    tasks = json.loads((done.out / "label_studio" / "tasks.json").read_text())
    assert [task["data"]["region"] for task in tasks] == [entry["id"] for entry in entries]
    assert all("predictions" not in task for task in tasks)


@pytest.mark.parametrize("policy", ["uniform", "entropy", "margin", "bald", "coreset"])
def test_every_baseline_ranks_from_answers_alone(
    policy: str, make_project: Callable[..., Project], answer: Callable[..., None]
) -> None:
    project = make_project(policy=policy)
    first = [entry["id"] for entry in lines_of(make_round(project, 6))]
    answer(project, Rounds(project.path / "rounds"), *first[:5])
    done = make_round(project, 6)
    assert (done.number, done.policy, done.answers, done.prelabelled) == (2, policy, 5, True)
    entries = lines_of(done)
    assert not {entry["id"] for entry in entries} & set(first)
    assert all((entry["score"] is None) == (policy in ("uniform", "coreset")) for entry in entries)
    scores = [entry["score"] or 0.0 for entry in entries]
    assert scores == sorted(scores, reverse=True)
    assert all(entry["answers"] == 5 for entry in entries)
    check_prelabels(done, entries)
    weights = load_file(project.path / "segmenters" / "0002.safetensors")
    start = Networks(project.settings).segmenter.state_dict()
    assert any(not torch.equal(weights[name], value) for name, value in start.items())


def check_prelabels(done: NextRound, entries: list[dict[str, Any]]) -> None:
    """Index PNG, Label Studio's prediction and CVAT's annotation of a region say the same."""
    tasks = json.loads((done.out / "label_studio" / "tasks.json").read_text())
    by_cvat = list(cvat.read_export(done.out / "cvat" / "annotations.xml", CLASSES))
    for entry, task, shape in zip(entries, tasks, by_cvat, strict=True):
        index = read_index_map(done.out / "prelabels" / f"{entry['id']}.png", "pre-label")
        assert entry["prelabel"] == mask_digest(index)
        export = done.out / "export.json"
        export.write_text(json.dumps([{**task, "annotations": task["predictions"]}]))
        (painted,) = label_studio.read_export(export, CLASSES)
        for one in (painted, shape):
            assert isinstance(one, Given)
            assert one.name == entry["id"]
            np.testing.assert_array_equal(one.mask, index)


def test_the_query_network_of_a_variant_ranks_images_that_it_never_saw(
    variant: Path, make_project: Callable[..., Project], answer: Callable[..., None]
) -> None:
    project = make_project(policy="query", variant=str(variant), segmenter=None)
    done = make_round(project, 4)
    assert (done.policy, done.prelabelled) == ("query", True)
    entries = lines_of(done)
    assert len({entry["score"] for entry in entries}) > 1
    answer(project, Rounds(project.path / "rounds"), *(entry["id"] for entry in entries))
    later = lines_of(make_round(project, 4))
    assert not {entry["id"] for entry in later} & {entry["id"] for entry in entries}
    assert later[0]["policy_version"] != entries[0]["policy_version"]
    assert later[0]["answers"] == 4


def test_a_variant_gives_the_segmenter_of_any_policy(variant: Path, make_project: Callable[..., Project]) -> None:
    project = make_project(policy="bald", variant=str(variant), segmenter=None)
    networks = Networks(project.settings)
    saved = load_file(variant / "segmenter" / "online.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in networks.segmenter.state_dict().items())
    assert make_round(project, 3).prelabelled


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ("ground", "box", "disc")}, "trained on ground, disc, box; the same ones in the same order"),
        ({"regions": {"rows": 4, "columns": 3}}, "regions.rows is 4, but the query network .* was trained with 2"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused(
    variant: Path, make_project: Callable[..., Project], changes: dict[str, Any], sentence: str
) -> None:
    project = make_project(policy="query", variant=str(variant), segmenter=None, **changes)
    with pytest.raises(InputError, match=sentence):
        make_round(project, 2)


def test_a_variant_without_query_network_is_refused(variant: Path, make_project: Callable[..., Project]) -> None:
    (variant / "query" / "query.safetensors").unlink()
    project = make_project(policy="query", variant=str(variant), segmenter=None)
    with pytest.raises(InputError, match="has no query network; a finished variant of RALIS"):
        make_round(project, 2)


def test_too_few_images_for_the_state_are_said(
    variant: Path,
    make_project: Callable[..., Project],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for stem in "bcde":
        (image_folder / f"{stem}.png").unlink()
    project = make_project(policy="query", variant=str(variant), segmenter=None)
    with pytest.raises(InputError, match=r"has 2 images, but the run has only 1; put more images .* another --policy"):
        make_round(project, 2)
    (variant / "metrics.jsonl").touch()
    words = ["label", "init", tmp_path / "new", "--images", image_folder, "--from", variant, "--policy", "query"]
    monkeypatch.setattr(sys, "argv", ["raysseg", *map(str, words)])
    with pytest.raises(SystemExit):
        main()
    assert "has 2 images, but the run has only 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_weights_of_a_whole_segmenter_know_the_classes_and_those_of_an_encoder_do_not(
    make_project: Callable[..., Project], tmp_path: Path
) -> None:
    project = make_project()
    network = Networks(project.settings)
    assert not network.knows_classes
    save_segmenter(tmp_path / "whole.safetensors", network.segmenter)
    save_file(network.segmenter.encoder.state_dict(), tmp_path / "encoder.safetensors")
    for name, knows in (("whole", True), ("encoder", False)):
        weights = project.settings.segmenter.model_copy(update={"weights": str(tmp_path / f"{name}.safetensors")})
        changed = project.settings.model_copy(update={"segmenter": weights, "seed": 3})
        assert Networks(changed).knows_classes == knows


def test_the_same_answers_give_the_same_round(
    make_project: Callable[..., Project], answer: Callable[..., None]
) -> None:
    project = make_project()
    first = [entry["id"] for entry in lines_of(make_round(project, 6))]
    answer(project, Rounds(project.path / "rounds"), *first)
    done = make_round(project, 4)
    entries = lines_of(done)
    # As after a kill between the folder and its record, which alone makes the round exist.
    (project.path / "rounds" / "0002.jsonl").unlink()
    (done.out / "left.txt").write_text("of the killed process")
    again = make_round(project, 4)
    assert again.number == 2
    assert lines_of(again) == entries
    assert not (again.out / "left.txt").exists()


def test_all_regions_can_be_asked_for_and_no_more(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--n is 31, but only 30 of the 30 regions .* use at most --n 30"):
        make_round(project, 31)
    done = make_round(project, 28, tmp_path / "out")
    assert done.out == tmp_path / "out"
    make_round(project, 2)
    assert len(Rounds(project.path / "rounds").asked) == 30
    with pytest.raises(InputError, match=r"only 0 of the 30 .* every region was asked for"):
        make_round(project, 1)


def test_a_folder_that_holds_something_is_left_alone(project: Project, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not an empty folder"):
        make_round(project, 2, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert Rounds(project.path / "rounds").count == 0


def test_two_processes_do_not_make_rounds_at_once(project: Project) -> None:
    with (
        ExclusiveLock(project.path / "lock", "making a round"),
        pytest.raises(InputError, match="is making a round; wait until it is done"),
    ):
        make_round(project, 2)


def test_an_image_that_changed_since_is_said(project: Project) -> None:
    for source in project.images.values():
        Image.new("RGB", (48, 42)).save(source.file)
    with pytest.raises(InputError, match=r"has 48×42 pixels .* but had 48×40 when the run was made"):
        make_round(project, 2)
    assert Rounds(project.path / "rounds").count == 0


def test_a_damaged_record_of_a_round_is_said(project: Project) -> None:
    make_round(project, 2)
    path = project.path / "rounds" / "0001.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"Line 2 of .*0001\.jsonl is damaged"):
        Rounds(project.path / "rounds")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"0001\.jsonl cannot be read"):
        Rounds(project.path / "rounds")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ("a", "b", "a")}, "'a' is named twice"),
        ({"classes": ("a", " b")}, "begins or ends with a space"),
        ({"classes": ("a",)}, "the names of 2 to 254 classes are expected"),
        ({"policy": "query"}, "needs a variant"),
        ({"variant": "v", "segmenter": {"weights": "none"}}, "segmenter has no effect with a variant"),
        ({"dropout": 0.3}, "dropout has no effect with the policy 'entropy'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_settings(LabellingSettings, {"images": "i", "classes": ("a", "b"), **changes})


# ---- what comes out -----------------------------------------------------------------------------------------------------


def test_the_overview_counts_what_there_is(
    project: Project, ask: Callable[..., Rounds], answer: Callable[..., None]
) -> None:
    ask(project, "a_r00c00", "a_r00c01", "b_r00c02")
    rounds = ask(project, "c_r01c00")
    answer(project, rounds, "a_r00c00", "c_r01c00")
    seen = overview(project)
    assert (seen.total, seen.asked, seen.answered) == (30, 4, 2)
    assert [(one.number, one.asked, one.answered) for one in seen.rounds] == [(1, 3, 1), (2, 1, 1)]
    assert seen.pixels == 2 * 20 * 16
    assert sum(seen.class_shares.values()) == pytest.approx(1)
    assert seen.torn_bytes == 0
    with open(project.ledger / "lines.jsonl", "ab") as file:
        file.write(b'{"seal"')
    assert overview(project).torn_bytes == 7


def test_an_export_can_be_trained_on(
    project: Project, ask: Callable[..., Rounds], answer: Callable[..., None], tmp_path: Path
) -> None:
    ids = [f"{stem}_r00c0{column}" for stem in "abcde" for column in range(2)]
    answer(project, ask(project, *ids), *ids)
    done = export_answers(project.path, tmp_path / "out", val_share=0.4, on_image=lambda number, total: None)
    assert (done.train, done.val) == (3, 2)
    assert sum(done.pixels) == 10 * 20 * 16
    data = DataSettings.model_validate(
        {"source": "folder", "path": str(tmp_path / "out"), "folder": {"class_names": CLASSES}}
    )
    store = open_dataset(data, tmp_path / "cache")
    assert len(store.keys("train")) == done.train
    key = store.keys("train")[0]
    label = store.label(key)
    assert label is not None
    assert set(np.unique(label[:20, :32])) <= {0, 1, 2}
    assert (label[20:] == 255).all()
    np.testing.assert_array_equal(store.scribble(key), label)
    name = key.removeprefix("train-")
    np.testing.assert_array_equal(store.image(key), read_image(project.images[name].file))


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.01, 1), (0.4, 2), (0.9, 4)])
def test_the_share_that_is_held_out_is_kept(
    share: float,
    held_out: int,
    project: Project,
    ask: Callable[..., Rounds],
    answer: Callable[..., None],
    tmp_path: Path,
) -> None:
    ids = [f"{stem}_r00c00" for stem in "abcde"]
    answer(project, ask(project, *ids), *ids)

    def sides(out: Path) -> dict[str, str]:
        done = export_answers(project.path, out, val_share=share, on_image=lambda number, total: None)
        assert (done.train, done.val) == (5 - held_out, held_out)
        return {path.stem: path.parts[-3] for path in out.glob("*/images/*")}

    first = sides(tmp_path / "one")
    assert sorted(first.values()).count("val") == held_out
    assert sides(tmp_path / "two") == first


def test_nothing_to_export_is_said(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no answers yet"):
        export_answers(project.path, tmp_path / "out", val_share=0.2, on_image=lambda number, total: None)
