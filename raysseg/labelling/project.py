"""A labelling run on disk: its settings, its images and its grid, as `raysseg label init` wrote them.

project.yaml            the settings
images.jsonl            the images, their sizes and their digests, as they were then
rounds/0001.jsonl       the regions that round 1 asked for
rounds/0001/            what people label them from, unless it was written elsewhere
segmenters/0001.safetensors   the segmenter that ranked round 1, where it was trained on answers
ledger/                 the answers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from raysseg.labelling.cvat import BACKGROUND
from raysseg.labelling.durable import write_durably, write_refused
from raysseg.labelling.regions import Grid, Region
from raysseg.labelling.settings import LabellingSettings

SETTINGS = "project.yaml"
IMAGES = "images.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """One image of the folder: its file, (H, W) in pixels, and the digest of the file when the run was made, None in runs that
    kept none.
    """

    file: Path
    size: tuple[int, int]
    digest: str | None = None


class Project:
    """An open labelling run.

    Args:
        path: the run's folder.

    Raises:
        InputError: it is none, or one of its files is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = load_settings(LabellingSettings, _read_settings(path), where=str(path / SETTINGS))
        self.images = _read_images(path, Path(self.settings.images))
        """The images by name, in the order in which `images.jsonl` lists them."""
        self.names = tuple(self.images)
        self.grid = Grid(rows=self.settings.regions.rows, columns=self.settings.regions.columns)
        self.palette = default_palette(len(self.settings.classes))
        self.tool_colours = _tool_colours(self.settings.classes)
        """One RGB colour (0…255) per class for tools in which people paint."""

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
            InputError: its file has gone, or is another one than when the run was made.
        """
        source = self.images[name]
        pixels = read_image(source.file)
        if pixels.shape[:2] != source.size:
            raise InputError(
                f"The image '{source.file}' has {pixels.shape[1]}×{pixels.shape[0]} pixels (width×height), but had "
                f"{source.size[1]}×{source.size[0]} when the run was made; put the former image back."
            )
        if source.digest is not None and _digest(source.file) != source.digest:
            raise InputError(
                f"The image '{source.file}' was changed since the run was made; put the former image back."
            )
        return pixels


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / SETTINGS
    try:
        if not file.is_file() or not (path / IMAGES).is_file():
            raise InputError(f"{path} is not a labelling run: make one with raysseg label init.")
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{file} is damaged: it holds no settings in YAML; put a copy of the file in its place.")
    return values


def _read_images(path: Path, folder: Path) -> dict[str, SourceImage]:
    file = path / IMAGES
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    images = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            images[str(entry["image"])] = SourceImage(
                file=folder / entry["file"],
                size=(int(entry["height"]), int(entry["width"])),
                digest=entry.get("digest"),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"Line {number} of {file} is damaged; put a copy of the file in its place.") from None
    if not images:
        raise InputError(f"{file} lists no image; put a copy of the file in its place.")
    return images


def _tool_colours(classes: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """The classes' colours, with black for 'background' alone.

    CVAT adds a black label of that name to every export, for what nobody painted.
    """
    *colours, other = default_palette(len(classes) + 1)
    return tuple(
        (0, 0, 0) if name == BACKGROUND else other if colour == (0, 0, 0) else colour
        for name, colour in zip(classes, colours, strict=True)
    )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:40]
    except OSError as error:
        raise InputError(f"The image '{file}' cannot be read: {error.strerror or error}.") from error


def list_images(folder: Path) -> dict[str, SourceImage]:
    """The images of a plain folder by name, with the sizes that their files announce; none of them is decoded.

    Raises:
        InputError: there is none, something else, or a file that is no image inside.
    """
    try:
        paths = files_by_stem(folder, "image")
    except OSError as error:
        raise InputError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error
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
            {
                "image": name,
                "file": one.file.name,
                "height": one.size[0],
                "width": one.size[1],
                "digest": _digest(one.file),
            },
            ensure_ascii=False,
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
