"""Whatever is wrong with what a user gives ends with status 2 and one sentence, before Ray starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import raysseg.algorithms.recipes
import raysseg.core.run
from raysseg.algorithms.eil import EILConfig
from raysseg.algorithms.recipes import load_recipe, train_recipe
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.data.settings import DataSettings, build_store
from raysseg.segmenters import SegmenterSettings, build_segmenter, save_segmenter

Refused = Callable[..., str]
Break = Callable[[Path], None]


@pytest.fixture
def ray_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where Ray, or an algorithm with its actors, would be started."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the bad input was not noticed before Ray was started")

    monkeypatch.setattr(raysseg.core.run, "start_ray", fail)
    monkeypatch.setattr(EILConfig, "build_algo", fail)


def _edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with Image.open(path) as picture:
        values = np.array(picture)
    Image.fromarray(change(values)).save(path)


def _with_value(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[3, 4] = value
        return values

    return change


def _empty(*folders: Path) -> None:
    for folder in folders:
        for path in folder.iterdir():
            path.unlink()


def _overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BROKEN_FOLDERS: dict[str, tuple[Break, str]] = {
    "missing image": (
        lambda root: (root / "train" / "images" / "a.png").unlink(),
        r"The label '.*a\.png' has no image in '.*train/images'; .+",
    ),
    "corrupt image": (
        lambda root: _truncate(root / "train" / "images" / "b.png"),
        r"The image '.*train/images/b\.png' cannot be read as an image: .+",
    ),
    "text instead of an image": (
        lambda root: _overwrite(root / "val" / "images" / "c.png", b"no picture"),
        r"The image '.*val/images/c\.png' cannot be read as an image: .+",
    ),
    "label of another size": (
        lambda root: _edit(root / "train" / "labels" / "a.png", lambda values: values[:-1]),
        r"The label '.*labels/a\.png' has 48×39 pixels \(width×height\), but its image '.*images/a\.png' has 48×40; .*",
    ),
    "scribble of another size": (
        lambda root: _edit(root / "train" / "scribbles" / "b.png", lambda values: values[:, :-2]),
        r"The scribble '.*scribbles/b\.png' has 46×40 pixels .* has 48×40; the same size is expected\.",
    ),
    "RGB label": (
        lambda root: _edit(root / "val" / "labels" / "c.png", lambda values: np.stack([values] * 3, axis=2)),
        r"The label '.*labels/c\.png' is a colour image \(RGB\); an index PNG with one channel of 8 bits is expected\.",
    ),
    "label value outside the classes": (
        lambda root: _edit(root / "train" / "labels" / "b.png", _with_value(7)),
        r"The label '.*labels/b\.png' holds the value 7 at row 3, column 4, .* 0 to 2 \(ground to box\), 255 .*",
    ),
    "scribble of a class that is not listed": (
        lambda root: _edit(root / "train" / "scribbles" / "a.png", _with_value(3)),
        r"The scribble '.*scribbles/a\.png' holds the value 3 at row 3, column 4, which is not in the class list; .*",
    ),
    "image without a scribble file": (
        lambda root: (root / "train" / "scribbles" / "b.png").unlink(),
        r"The training image 'train-b' of '.*pictures' has no scribble; draw one, or make them from the labels .*",
    ),
    "image with an empty scribble": (
        lambda root: _edit(root / "train" / "scribbles" / "b.png", lambda values: np.full_like(values, 255)),
        r"The scribble '.*scribbles/b\.png' of the image 'train-b' has no labelled pixel\.",
    ),
    "empty split": (
        lambda root: _empty(root / "val" / "images", root / "val" / "labels"),
        r"The folder '.*val/images' holds no image\.",
    ),
}


@pytest.mark.usefixtures("ray_stays_off")
@pytest.mark.parametrize("case", list(BROKEN_FOLDERS))
def test_broken_data_are_named(
    case: str, picture_folder: Path, picture_recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    damage, expected = BROKEN_FOLDERS[case]
    damage(picture_folder)
    said = refused("train", picture_recipe, "--run-dir", tmp_path / "run")
    assert re.fullmatch(expected, said), said


@pytest.mark.usefixtures("ray_stays_off")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--set", "training.batch_sise=4"),
            "Unknown key 'training.batch_sise' in the recipe tiny, variant none; did you mean 'batch_size'?",
        ),
        (
            ("--set", "enginee.precision=fp32"),
            "Unknown key 'enginee' in the recipe tiny, variant none; did you mean 'engine'?",
        ),
        (("--set", "training.batch_size"), "--set takes key=value, not 'training.batch_size'."),
        (("--set", "data=["), r"--set data=\[: the value is not YAML.*"),
        (("--set", "method=eill"), "Unknown method 'eill'; did you mean 'eil'?"),
        (("--set", "data.val_split=vall"), r"'.*vall/images' does not exist: no split 'vall'; did you mean 'val'\?"),
        (("--variants", "nonne"), "The recipe tiny has no variant 'nonne'; did you mean 'none'?"),
        (("--seeds", "0,one"), "--seeds takes numbers from 0 separated by commas, not '0,one'."),
        (("--resume",), "--resume needs --run-dir: the directory of the run to continue."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_named(words: tuple[str, ...], expected: str, picture_recipe: Path, refused: Refused) -> None:
    said = refused("train", picture_recipe, *words)
    assert said == expected or re.fullmatch(expected, said), said


@pytest.mark.usefixtures("ray_stays_off")
def test_a_wrong_value_says_which_ones_are_right(picture_recipe: Path, refused: Refused) -> None:
    said = refused("train", picture_recipe, "--set", "training.batch_size=0")
    assert "'training.batch_size'" in said
    assert "greater than or equal to 1" in said


@pytest.mark.usefixtures("ray_stays_off")
def test_an_unknown_recipe_gets_the_nearest_name(refused: Refused) -> None:
    assert refused("train", "eil-syntetic") == "Unknown recipe 'eil-syntetic'; did you mean 'eil-synthetic'?"
    assert refused("train", "absent.yaml") == "The recipe file absent.yaml does not exist."


def test_an_unknown_option_is_refused(command: Callable[..., Any]) -> None:
    outcome = command("train", "eil-synthetic", "--ressume")
    assert outcome.status == 2
    assert "--resume" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def store_folder(picture_data: dict[str, Any], tmp_path: Path) -> Path:
    """A store of the small images."""
    return Path(build_store(DataSettings.model_validate(picture_data), tmp_path / "store").uri)


@pytest.fixture
def store_recipe(store_folder: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe that trains on that store."""
    return write_recipe(tmp_path / "of_store.yaml", {"source": "store", "path": str(store_folder)})


@pytest.mark.usefixtures("ray_stays_off")
def test_a_store_of_another_schema_version_must_be_built_again(
    store_folder: Path, store_recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    manifest = store_folder / "store.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    said = refused("train", store_recipe, "--run-dir", tmp_path / "run")
    assert re.fullmatch(r"The store '.*store' has the schema version 99; this release reads version \d+: .*", said)


@pytest.mark.usefixtures("ray_stays_off")
def test_a_truncated_store_is_refused(store_folder: Path, store_recipe: Path, tmp_path: Path, refused: Refused) -> None:
    _truncate(store_folder / "train-00000.arrow")
    said = refused("train", store_recipe, "--run-dir", tmp_path / "run")
    assert re.fullmatch(r"The file '.*train-00000\.arrow' has \d+ bytes; \d+ are expected: it is not complete\.", said)


@pytest.mark.usefixtures("ray_stays_off")
def test_weights_of_another_network_are_refused(picture_recipe: Path, tmp_path: Path, refused: Refused) -> None:
    other = SegmenterSettings.model_validate(
        {"encoder": "resnet18", "weights": "none", "encoder_depth": 3, "decoder_channels": 24}
    )
    weights = tmp_path / "other.safetensors"
    save_segmenter(weights, build_segmenter(other, 3))
    said = refused("train", picture_recipe, "--run-dir", tmp_path / "run", "--set", f"segmenter.weights={weights}")
    assert said == f"The weights file {weights} is of a segmenter with decoder_channels 24, expected 16."


@pytest.mark.usefixtures("ray_stays_off")
def test_weights_that_do_not_exist_are_refused(picture_recipe: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused(
        "train", picture_recipe, "--run-dir", tmp_path / "run", "--set", "segmenter.weights=absent.safetensors"
    )
    assert said.startswith("The weights file absent.safetensors does not exist; expected ")


@pytest.mark.usefixtures("ray_stays_off")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so asking for one is no mistake")
def test_more_gpus_than_exist_are_refused(picture_recipe: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused(
        "train",
        picture_recipe,
        *("--run-dir", tmp_path / "run"),
        *("--set", "engine.num_env_runners=1", "--set", "engine.num_gpus_per_env_runner=1"),
    )
    assert said == (
        "The engine asks for 1 GPUs (num_env_runners × num_gpus_per_env_runner + num_learners × num_gpus_per_learner), "
        "but 0 exist."
    )


@pytest.mark.usefixtures("ray_stays_off")
def test_a_run_directory_in_use_needs_resume(picture_recipe: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe(str(picture_recipe))
    (folder / "config.yaml").write_text(recipe.dump())
    said = refused("train", picture_recipe, "--run-dir", folder)
    assert said == (
        f"The run directory {folder} is not empty; add --resume to continue it, or choose another --run-dir."
    )
    said = refused("train", picture_recipe, "--run-dir", folder, "--resume", "--set", "training.batch_size=1")
    assert said.startswith(f"The run directory {folder} was made with another configuration; ")


@pytest.mark.usefixtures("ray_stays_off")
def test_a_folder_of_something_else_is_no_run_directory(
    picture_recipe: Path, picture_folder: Path, refused: Refused
) -> None:
    said = refused("train", picture_recipe, "--run-dir", picture_folder)
    assert said.startswith(f"The run directory {picture_folder} is not empty; ")


@pytest.mark.usefixtures("ray_stays_off")
def test_a_file_is_no_run_directory(picture_recipe: Path, refused: Refused) -> None:
    said = refused("train", picture_recipe, "--run-dir", picture_recipe)
    assert said.startswith(f"The run directory {picture_recipe} is a file; ")


class _Killed(Exception):
    """Stands for a kill between two iterations."""


def _interrupted_run(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs one iteration with its checkpoint, is killed in the second; returns the checkpoint's folder."""

    def stop(algorithm: SegmentationAlgorithm) -> None:
        if algorithm.iteration == 2:
            raise _Killed

    run_variant = raysseg.core.run.run_variant
    with monkeypatch.context() as patch:
        patch.setattr(
            raysseg.algorithms.recipes,
            "run_variant",
            lambda *arguments, **options: run_variant(*arguments, **options, after_iteration=stop),
        )
        with pytest.raises(_Killed):
            train_recipe(load_recipe(str(recipe)), folder)
    (checkpoint,) = (folder / "pretrain" / "seed-0" / "checkpoints").iterdir()
    return checkpoint


@pytest.mark.usefixtures("ray_session")
def test_a_truncated_checkpoint_is_passed_over_and_an_intact_one_continues(
    picture_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
) -> None:
    checkpoint = _interrupted_run(picture_recipe, tmp_path / "run", monkeypatch)
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    _truncate(largest)
    words = ("train", picture_recipe, "--run-dir", tmp_path / "run", "--resume")
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    largest.write_bytes(content)
    torn = tmp_path / "torn" / checkpoint.relative_to(tmp_path / "run")
    outcome = command("train", picture_recipe, "--run-dir", tmp_path / "torn", "--resume")
    assert outcome.status == 0, outcome.err
    assert (
        f"The checkpoint {torn} is damaged: {largest.relative_to(checkpoint)} has {len(content) // 2} bytes "
        f"instead of {len(content)}; the run goes on from the one before it, or from its start."
    ) in outcome.err
    assert "resumed" not in outcome.err, "there was no other checkpoint"
    outcome = command(*words)
    assert outcome.status == 0, outcome.err
    assert "resumed at iteration 1" in outcome.err
    summary = yaml.safe_load((tmp_path / "run" / "variants" / "none" / "seed-0" / "summary.json").read_text())
    assert summary["complete"] is True
