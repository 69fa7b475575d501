"""Writes the answers as a folder to train on: `DIR/{train,val}/{images,labels}`, and in train the same as scribbles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysseg.core.seeding import generator
from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED
from raysseg.labelling.durable import whole_folder
from raysseg.labelling.folder_images import answered_map
from raysseg.labelling.hand_out import check_target
from raysseg.labelling.ledger import read_answers
from raysseg.labelling.project import Project
from raysseg.visualization import save_index_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Images per split, and the labelled pixels of each class in all of them."""

    train: int
    val: int
    pixels: tuple[int, ...]


def export_answers(path: Path, out: Path, *, val_share: float, on_image: Callable[[int, int], None]) -> Exported:
    """Copies every image that has an answer, and writes its label map: 255 where nobody labelled anything.

    The folder exists entirely or not at all.
    The images of the split `val` are drawn from the run's seed; where there are two images, each split has one at least.

    Args:
        path: of the run.
        out: a new or empty folder.
        val_share: share of the images that go to the split `val`, in [0, 1).
        on_image: shows how many of how many are done.

    Raises:
        InputError: there is no answer with a labelled pixel, a file has gone or changed, or the disk refuses.
    """
    project = Project(path)
    check_target(out)
    answers, _ = read_answers(project.ledger)
    names = list(dict.fromkeys(region.image for region in filter(None, map(project.find, answers))))
    if not names:
        raise InputError(f"The run {path} has no answers yet: label regions of raysseg label next, and add them.")
    held_out = _held_out(names, val_share, project.settings.seed)
    pixels: np.ndarray = np.zeros(256, dtype=np.int64)
    with whole_folder(out) as partial:
        for done, name in enumerate(names, start=1):
            labels = answered_map(project, answers, name)
            pixels += np.bincount(labels.reshape(-1), minlength=256)
            split = "val" if name in held_out else "train"
            _write(partial / split, project, name, labels, scribbles=split == "train")
            on_image(done, len(names))
    return Exported(
        train=len(names) - len(held_out),
        val=len(held_out),
        pixels=tuple(pixels[: len(project.settings.classes)].tolist()),
    )


def _held_out(names: list[str], share: float, seed: int) -> set[str]:
    """The images of the split `val`: as many as the share says, those whose own draws are the smallest."""
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 else 0
    return set(sorted(names, key=lambda name: float(generator(seed, "val", name).random()))[:count])


def _write(folder: Path, project: Project, name: str, labels: np.ndarray, *, scribbles: bool) -> None:
    for kind in ("images", "labels", *(["scribbles"] if scribbles else [])):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    assert bool((labels != UNLABELLED).any())
    project.image(name)
    shutil.copyfile(project.images[name].file, folder / "images" / project.images[name].file.name)
    save_index_png(folder / "labels" / f"{name}.png", labels, project.palette)
    if scribbles:
        shutil.copyfile(folder / "labels" / f"{name}.png", folder / "scribbles" / f"{name}.png")
