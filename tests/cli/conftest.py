"""The command as a user runs it, a recipe that trains in seconds, and a small folder of images to train on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from raysseg.cli.main import main


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command left: its exit status and everything that it wrote, warnings of libraries included."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `raysseg` with the given words."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["raysseg", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return Outcome(status=int(stop.value.code or 0), out=out, err=err)

    return run


@pytest.fixture
def refused(command: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must end with status 2, nothing on standard output and one sentence on standard error."""

    def run(*words: object) -> str:
        outcome = command(*words)
        lines = outcome.err.splitlines()
        assert outcome.status == 2, outcome
        assert len(lines) == 1, outcome.err
        assert outcome.out == ""
        return lines[0]

    return run


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """Writes a recipe with the smallest network and the shortest run that still have every part."""

    def write(path: Path, data: dict[str, Any], **changes: dict[str, Any]) -> Path:
        values: dict[str, Any] = {
            "method": "eil",
            "data": data,
            "segmenter": {"encoder": "resnet18", "weights": "none", "encoder_depth": 3, "decoder_channels": 16},
            "training": {
                "pretrain_epochs": 1,
                "stage_epochs": 1,
                "batch_size": 2,
                "augmentation": {"crop": [48, 48]},
            },
            "eil": {"stages": 1, "window": 5, "virtual_steps": 0},
            "engine": {"torch_threads": 1, "updates_per_iteration": 1, "checkpoint_interval": 1},
            "variants": {"none": {"policy": "none"}},
        }
        for section, change in changes.items():
            values[section] = {**values[section], **change}
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def _write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Two images to train on and one to evaluate on, with labels and scribbles of the three classes."""
    root = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for split, stems in {"train": ("a", "b"), "val": ("c",)}.items():
        for stem in stems:
            label: np.ndarray = np.zeros((40, 48), np.uint8)
            label[5:20, 5:20], label[22:38, 24:44] = 1, 2
            scribble = np.full_like(label, 255)
            for row, column in ((2, 2), (10, 8), (30, 30)):
                scribble[row, column : column + 6] = label[row, column]
            image = generator.integers(0, 60, (40, 48, 3), dtype=np.uint8) + 60 * label[..., None]
            _write_png(root / split / "images" / f"{stem}.png", image)
            _write_png(root / split / "labels" / f"{stem}.png", label)
            if split == "train":
                _write_png(root / split / "scribbles" / f"{stem}.png", scribble)
    return root


@pytest.fixture
def picture_data(picture_folder: Path) -> dict[str, Any]:
    """The data settings of that folder."""
    return {"source": "folder", "path": str(picture_folder), "folder": {"class_names": ["ground", "disc", "box"]}}


@pytest.fixture
def picture_recipe(picture_data: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe file that trains on that folder."""
    return write_recipe(tmp_path / "tiny.yaml", picture_data)
