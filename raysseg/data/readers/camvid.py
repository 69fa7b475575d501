"""CamVid: 11 classes of street scenes, void is 11; `train/{images,labels}` or SegNet's `train` and `trainannot`."""

from __future__ import annotations

from pathlib import Path

from raysseg.data.readers.images import SampleFiles, match_by_stem, read_sample
from raysseg.data.sample import DatasetInfo, Sample
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

CLASSES: dict[str, tuple[int, int, int]] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
"""Classes 0…10 in the order of SegNet's label files, with CamVid's colours."""

VOID = 11


class CamvidReader:
    """Reads CamVid; keys are the file names without ending, which are unique over its splits.

    Scribbles, which CamVid lacks, may lie in `<split>/scribbles` or `<split>scribbles`.

    Raises:
        InputError: where `root` is no folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"The folder '{root}' does not exist.")
        self._root = root
        self.info = DatasetInfo(
            name="camvid",
            class_names=tuple(CLASSES),
            palette=tuple(CLASSES.values()),
            has_background=False,
            source="CamVid, 11 classes",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split by name; raises InputError where there is no such split or a file has no image."""
        nested = self._root / split / "images"
        if nested.is_dir():
            images, labels, scribbles = nested, self._root / split / "labels", self._root / split / "scribbles"
        else:
            images, labels, scribbles = (self._root / f"{split}{ending}" for ending in ("", "annot", "scribbles"))
        if not images.is_dir() or not labels.is_dir():
            splits = {path.parent.name for path in self._root.glob("*/labels")}
            splits |= {path.name.removesuffix("annot") for path in self._root.glob("*annot")}
            raise InputError(
                f"'{self._root}' holds neither '{split}/images' and '{split}/labels' nor '{split}' and '{split}annot'"
                f"{nearest_name(split, splits)}"
            )
        return match_by_stem(images, labels, scribbles if scribbles.is_dir() else None, split=split)

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        return read_sample(files, self.info, ignore=[VOID, UNLABELLED], unlabelled=[VOID, UNLABELLED])
