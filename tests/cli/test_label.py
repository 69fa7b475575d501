"""`raysseg label` from a plain folder of images to labels to train on, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg.data.readers.images import read_index_map
from raysseg.data.store import Store

TINY = [
    *("--set", "segmenter={encoder: resnet18, weights: none, encoder_depth: 3, decoder_channels: 16}"),
    *("--set", "training.updates=2"),
    *("--set", "training.augmentation={scale: [1, 1], rotation: 0, crop: [32, 32]}"),
]
CLASSES = "ground,disc,box"


@pytest.fixture
def images(picture_folder: Path) -> Path:
    """Two images of 48×40 pixels, without anything beside them."""
    return picture_folder / "train" / "images"


@pytest.fixture
def run(command: Callable, images: Path, tmp_path: Path) -> Path:
    """A labelling run on them."""
    path = tmp_path / "run"
    outcome = command("label", "init", path, "--images", images, "--classes", CLASSES, "--grid", "2x3", *TINY)
    assert outcome.status == 0, outcome.err
    assert "2 images with 6 regions each (12 in all), 3 classes" in outcome.out
    return path


def answers_for(handed_out: Path, images: Path, target: Path) -> list[str]:
    """Writes the index PNG of every region that was handed out; returns the regions' ids."""
    target.mkdir()
    ids = []
    for line in (handed_out / "regions.jsonl").read_text().splitlines():
        entry = json.loads(line)
        x0, y0, x1, y1 = entry["box"]
        truth = read_index_map(images.parent / "labels" / f"{entry['image']}.png", "label")
        Image.fromarray(truth[y0:y1, x0:x1]).save(target / f"{entry['id']}.png")
        ids.append(entry["id"])
    return ids


def test_from_images_to_a_store(command: Callable, run: Path, images: Path, tmp_path: Path) -> None:
    first = command("label", "next", run, "--n", 4)
    assert first.status == 0, first.err
    assert "Round 1: 4 regions" in first.out
    assert "drawn at random, without pre-labels" in first.out
    answers_for(run / "rounds" / "0001", images, tmp_path / "answers")
    added = command("label", "add", run, tmp_path / "answers")
    assert (added.status, added.out) == (0, "4 answers taken.\n")
    again = command("label", "add", run, tmp_path / "answers")
    assert (again.status, again.out) == (0, "0 answers taken; 4 were known already.\n")

    second = command("label", "next", run, "--n", 3, "--out", tmp_path / "second", "--image-url", "https://here/")
    assert second.status == 0, second.err
    assert "chosen by entropy with a segmenter trained on 4 answers" in second.out
    tasks = json.loads((tmp_path / "second" / "label_studio" / "tasks.json").read_text())
    assert tasks[0]["data"]["image"].startswith("https://here/crops/")
    # A person accepts all pre-labels in Label Studio, and says nothing about one region.
    tasks = [{**task, "annotations": task["predictions"]} for task in tasks]
    tasks[2]["annotations"] = []
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    accepted = command("label", "add", run, tmp_path / "export.json")
    assert accepted.status == 0, accepted.err
    assert accepted.out == (
        "2 answers taken; 1 regions have no label yet and are still asked for; "
        "2 of those taken equal the segmenter's pre-label in every pixel.\n"
    )

    status = command("label", "status", run)
    assert status.status == 0
    assert "7 of 12 regions asked for, 6 answered" in status.out
    assert all(name in status.out for name in CLASSES.split(","))
    exported = command("label", "export", run, "--out", tmp_path / "labels", "--val-share", 0)
    assert exported.status == 0
    assert "2 images to train on and 0 to evaluate on" in exported.out
    built = command(
        *("data", "build", "--source", "folder", "--path", tmp_path / "labels", "--classes", CLASSES),
        *("--val-split", "train", "--out", tmp_path / "store"),
    )
    assert built.status == 0, built.err
    assert Store.open(tmp_path / "store").splits == {"train": 2}


def test_refused_answers_are_listed_and_the_others_taken(
    command: Callable, run: Path, images: Path, tmp_path: Path
) -> None:
    assert command("label", "next", run, "--n", 3).status == 0
    ids = answers_for(run / "rounds" / "0001", images, tmp_path / "answers")
    Image.fromarray(np.full((20, 16), 9, np.uint8)).save(tmp_path / "answers" / f"{ids[0]}.png")
    Image.fromarray(np.zeros((7, 5), np.uint8)).save(tmp_path / "answers" / f"{ids[1]}.png")
    Image.fromarray(np.zeros((20, 16), np.uint8)).save(tmp_path / "answers" / "zebra.png")
    outcome = command("label", "add", run, tmp_path / "answers")
    assert outcome.status == 1
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    refused = sorted(line for line in lines if line.startswith("refused: "))
    assert len(refused) == 3
    assert any(line.startswith(f"refused: {ids[0]} (") and "holds the value 9" in line for line in refused)
    assert any(line.startswith(f"refused: {ids[1]} (") and "5×7 pixels" in line for line in refused)
    assert any("no region and no image of the name 'zebra'" in line for line in refused)
    assert lines[-1] == "1 answers taken; 3 refused, for the reasons above."


def test_a_torn_line_is_said_and_nothing_is_lost(command: Callable, run: Path, images: Path, tmp_path: Path) -> None:
    assert command("label", "next", run, "--n", 3).status == 0
    ids = answers_for(run / "rounds" / "0001", images, tmp_path / "answers")
    first, *others = (tmp_path / "answers" / f"{identifier}.png" for identifier in ids)
    assert command("label", "add", run, first).status == 0
    with open(run / "ledger" / "lines.jsonl", "ab") as file:
        file.write(b'{"seal":"0123')
    assert "torn (13 bytes that were never acknowledged)" in command("label", "status", run).out
    outcome = command("label", "add", run, first, *others)
    assert outcome.status == 0
    assert "was torn (13 bytes of an answer that was never acknowledged)" in outcome.err
    assert outcome.out == "2 answers taken; 1 were known already.\n"
    assert "3 of 12 regions asked for, 3 answered" in command("label", "status", run).out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--classes", CLASSES, "--grid", "3x3"], "3x3 (rows x columns) does not divide the image 'a' of 48×40"),
        (["--classes", CLASSES, "--grid", "2by3"], "--grid is '2by3'; two numbers above 0 are expected"),
        (["--classes", CLASSES, "--grid", "0x3"], "--grid is '0x3'; two numbers above 0 are expected"),
        (["--grid", "2x3"], "The classes are not known"),
        (["--classes", "ground"], "The key 'classes' in the options"),
        (["--classes", CLASSES, "--policy", "luck"], "The key 'policy' in the options has the value 'luck'"),
        (["--classes", CLASSES, "--policy", "query"], "the policy 'query' needs a variant"),
        (["--classes", CLASSES, "--set", "pool"], "KEY=VALUE is expected"),
        (["--classes", CLASSES, "--set", "pools=3"], "Unknown key 'pools' in the options; did you mean 'pool_size'?"),
        (["--classes", CLASSES, "--set", "seed={"], "the value is not YAML"),
        (["--classes", CLASSES, "--set", "seed=1", "--set", "seed.x=1"], "'seed' has a value already"),
        (["--classes", CLASSES, "--from", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_run_that_cannot_be_made_is_refused(
    refused: Callable[..., str], images: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert sentence in refused("label", "init", tmp_path / "run", "--images", images, *words)
    assert not (tmp_path / "run").exists()


def test_other_bad_input_is_refused(refused: Callable[..., str], run: Path, images: Path, tmp_path: Path) -> None:
    init = ("label", "init", run, "--images", images, "--classes", CLASSES)
    assert "exists and is not an empty folder" in refused(*init, "--grid", "2x3", *TINY)
    assert "is not a labelling run" in refused("label", "next", tmp_path, "--n", 3)
    assert "--n is 13, but only 12 of the 12 regions" in refused("label", "next", run, "--n", 13)
    assert "gone.png does not exist" in refused("label", "add", run, tmp_path / "gone.png")
    assert "has no answers yet" in refused("label", "export", run, "--out", tmp_path / "out")
    assert "does not exist" in refused(
        "label", "init", tmp_path / "new", "--images", tmp_path / "x", "--classes", CLASSES
    )


def test_a_small_folder_of_images_and_something_else_is_refused(
    refused: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    (images / "notes.txt").write_text("hello")
    words = ("label", "init", tmp_path / "run", "--images", images, "--classes", CLASSES, "--grid", "2x3")
    assert "notes.txt' is not an image" in refused(*words)
