"""`raysseg label` from a plain folder of images to labels to train on, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from raysseg.cli import label
from raysseg.data.readers.images import read_index_map
from raysseg.data.store import Store
from raysseg.segmenters import SegmenterSettings, build_segmenter, save_segmenter

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
    tasks = json.loads((run / "rounds" / "0001" / "label_studio" / "tasks.json").read_text())
    assert tasks[0]["data"]["image"].startswith("/data/local-files/?d=0001/crops/")
    answers_for(run / "rounds" / "0001", images, tmp_path / "answers")
    added = command("label", "add", run, tmp_path / "answers")
    assert (added.status, added.out) == (0, "4 answers taken.\n")
    again = command("label", "add", run, tmp_path / "answers")
    assert (again.status, again.out) == (0, "0 answers taken; 4 were known already.\n")

    second = command("label", "next", run, "--n", 3, "--out", tmp_path / "second", "--image-url", "https://here")
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
    assert "torn or damaged (13 bytes)" in command("label", "status", run).out
    outcome = command("label", "add", run, first, *others)
    assert outcome.status == 0
    assert "was torn (13 bytes of an answer that was never acknowledged)" in outcome.err
    assert outcome.out == "2 answers taken; 1 were known already.\n"
    assert "3 of 12 regions asked for, 3 answered" in command("label", "status", run).out


def test_answers_are_corrected_where_that_is_asked_for(
    command: Callable, run: Path, images: Path, tmp_path: Path
) -> None:
    assert command("label", "next", run, "--n", 2).status == 0
    ids = answers_for(run / "rounds" / "0001", images, tmp_path / "answers")
    assert command("label", "add", run, tmp_path / "answers").status == 0
    corrected: np.ndarray = np.full((20, 16), 2, np.uint8)
    Image.fromarray(corrected).save(tmp_path / "answers" / f"{ids[0]}.png")
    refused = command("label", "add", run, tmp_path / "answers")
    assert refused.status == 1
    assert "unless --replace is given" in refused.err
    for outcome in ("1 put in the place of earlier ones; 1 were known already", "2 were known already"):
        assert command("label", "add", run, "--replace", tmp_path / "answers").out == f"0 answers taken; {outcome}.\n"
    # The map of a whole image answers for what was asked for, and says what it left out.
    left_out = 6 - sum(one.startswith("a_") for one in ids)
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(tmp_path / "a.png")
    whole = command("label", "add", run, "--replace", tmp_path / "a.png")
    if left_out < 6:
        assert whole.status == 0
        assert f"labels in {left_out} regions that were not asked for were left out" in whole.out
    else:
        assert "no region of the image was asked for" in whole.err


def test_a_run_knows_its_weights_from_everywhere(
    command: Callable, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_segmenter(
        SegmenterSettings(encoder="resnet18", weights="none", encoder_depth=3, decoder_channels=16), 3
    )
    save_segmenter(tmp_path / "w.safetensors", network)
    monkeypatch.chdir(tmp_path)
    words = ("label", "init", "run", "--images", images, "--classes", CLASSES, "--grid", "2x3", *TINY)
    outcome = command(*words, "--set", "segmenter.weights=w.safetensors")
    assert outcome.status == 0, outcome.err
    settings = yaml.safe_load((tmp_path / "run" / "project.yaml").read_text())
    assert settings["segmenter"]["weights"] == str(tmp_path / "w.safetensors")


def test_an_interrupted_command_says_how_to_go_on(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(label, "Project", interrupt)
    outcome = command("label", "status", tmp_path)
    assert (outcome.status, outcome.err) == (
        130,
        "Interrupted; give the same command again, of train and tune with --resume.\n",
    )


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
    (tmp_path / "file").write_text("no folder")
    assert "is no folder that may be written" in refused(
        "label", "next", run, "--n", 1, "--out", tmp_path / "file" / "x"
    )
    assert "does not exist" in refused(
        "label", "init", tmp_path / "new", "--images", tmp_path / "x", "--classes", CLASSES
    )


def test_a_small_folder_of_images_and_something_else_is_refused(
    refused: Callable[..., str], images: Path, tmp_path: Path
) -> None:
    (images / "notes.txt").write_text("hello")
    words = ("label", "init", tmp_path / "run", "--images", images, "--classes", CLASSES, "--grid", "2x3")
    assert "notes.txt' is not an image" in refused(*words)
