"""A labelling run on disk: its settings, its images and its grid, as `raysseg label init` wrote them.

project.yaml            the settings
images.jsonl            the images and their sizes, as they were then
rounds/0001.jsonl       the regions that round 1 asked for
rounds/0001/            what people label them from, unless it was written elsewhere
segmenters/0001.safetensors   the segmenter that ranked round 1, where it was trained on answers
ledger/                 the answers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from raysseg.configuration import load_settings
from raysseg.data.readers.images import files_by_stem, read_image
from raysseg.data.sample import default_palette
from raysseg.errors import InputError
from raysseg.labelling.durable import write_durably, write_refused
from raysseg.labelling.regions import Grid, Region
from raysseg.labelling.settings import LabellingSettings

SETTINGS = "project.yaml"
IMAGES = "images.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """One image of the folder: its file, and (H, W) in pixels."""

    file: Path
    size: tuple[int, int]


class Project:
    """An open labelling run.

    Args:
        path: the run's folder.

    Raises:
        InputError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        settings, images = path / SETTINGS, path / IMAGES
        if not settings.is_file() or not images.is_file():
            raise InputError(f"{path} is not a labelling run: make one with raysseg label init.")
        self.settings = load_settings(LabellingSettings, yaml.safe_load(settings.read_text()), where=str(settings))
        folder = Path(self.settings.images)
        self.images: dict[str, SourceImage] = {}
        """The images by name, in the order in which `images.jsonl` lists them."""
        for line in images.read_text().splitlines():
            entry = json.loads(line)
            self.images[entry["image"]] = SourceImage(
                file=folder / entry["file"], size=(entry["height"], entry["width"])
            )
        self.names = tuple(self.images)
        self.grid = Grid(rows=self.settings.regions.rows, columns=self.settings.regions.columns)
        self.palette = default_palette(len(self.settings.classes))

    @property
    def ledger(self) -> Path:
        """Folder of the answers."""
        return self.path / "ledger"

    @property
    def total(self) -> int:
        """Regions of all images."""
        return len(self.images) * self.grid.count

    def region(self, image: str, number: int) -> Region:
        """The region of a number in an image."""
        return self.grid.region(image, number, self.images[image].size)

    def find(self, identifier: str) -> Region | None:
        """The region of an identifier; None where there is none."""
        parsed = self.grid.parse(identifier)
        return self.region(*parsed) if parsed is not None and parsed[0] in self.images else None

    def image(self, name: str) -> np.ndarray:
        """Reads an image, uint8 [H, W, 3].

        Raises:
            InputError: its file has gone, or has another size than when the run was made.
        """
        source = self.images[name]
        pixels = read_image(source.file)
        if pixels.shape[:2] != source.size:
            raise InputError(
                f"The image '{source.file}' has {pixels.shape[1]}×{pixels.shape[0]} pixels (width×height), but had "
                f"{source.size[1]}×{source.size[0]} when the run was made; put the former image back."
            )
        return pixels


def list_images(folder: Path) -> dict[str, SourceImage]:
    """The images of a plain folder by name, with the sizes that their files announce; none of them is decoded.

    Raises:
        InputError: there is none, something else, or a file that is no image inside.
    """
    paths = files_by_stem(folder, "image")
    if not paths:
        raise InputError(f"The folder '{folder}' holds no image.")
    found = {}
    for name, path in paths.items():
        try:
            with Image.open(path) as picture:
                found[name] = SourceImage(file=path.absolute(), size=(picture.height, picture.width))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"The image '{path}' cannot be read as an image: {error}") from None
    return found


def check_project(path: Path, settings: LabellingSettings, images: Mapping[str, SourceImage]) -> None:
    """Checks that a run can be made.

    Raises:
        InputError: its folder holds something, the grid does not divide an image, or a name could also be a region's.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another one for the run.")
    grid = Grid(rows=settings.regions.rows, columns=settings.regions.columns)
    grid.check({name: image.size for name, image in images.items()})
    for name in images:
        parsed = grid.parse(name)
        if parsed is not None and parsed[0] in images:
            raise InputError(f"The image '{name}' has the name of a region of the image '{parsed[0]}'; rename it.")


def create_project(path: Path, settings: LabellingSettings, images: Mapping[str, SourceImage]) -> Project:
    """Writes a new labelling run.

    Args:
        path: its folder, which is new or empty.
        settings: everything that is fixed for it.
        images: by name.

    Raises:
        InputError: as `check_project`, or the disk refuses.
    """
    check_project(path, settings, images)
    lines = [
        json.dumps(
            {"image": name, "file": one.file.name, "height": one.size[0], "width": one.size[1]}, ensure_ascii=False
        )
        for name, one in images.items()
    ]
    try:
        (path / "rounds").mkdir(parents=True)
        (path / "segmenters").mkdir()
    except OSError as error:
        raise write_refused(path, error) from error
    write_durably(path / IMAGES, "".join(f"{line}\n" for line in lines).encode())
    values: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True)
    # The settings come last: with them the run exists.
    write_durably(path / SETTINGS, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    return Project(path)
