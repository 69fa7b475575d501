"""Reading image files and index maps; every way in which they are usually wrong is one clear sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from raysseg.data.sample import DatasetInfo, Sample
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_NOT_DATA = ("Thumbs.db", "desktop.ini")
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFiles:
    """Where one sample's image, label, scribble and instances lie; None where there is none."""

    key: str
    split: str
    image: Path
    label: Path | None = None
    scribble: Path | None = None
    instances: Path | None = None

    def without_scribble(self) -> SampleFiles:
        """The same sample, with its scribble left unread."""
        return dataclasses.replace(self, scribble=None)

    def paths(self) -> list[Path]:
        """All files that exist for this sample."""
        return [path for path in (self.image, self.label, self.scribble, self.instances) if path is not None]


class Reader(Protocol):
    """One public format: it lists a split's files first, and reads one sample at a time."""

    @property
    def info(self) -> DatasetInfo:
        """Classes, palette and source."""

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split in a fixed order; raises InputError where the split or one of its files is missing."""

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""


def _load(path: Path, kind: str) -> Image.Image:
    """Opens and decodes a file; raises InputError where it is missing or broken."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"The {kind} '{path}' does not exist.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"The {kind} '{path}' cannot be read as an image: {error}") from None


def read_image(path: Path) -> np.ndarray:
    """Reads an image as RGB, uint8 [H, W, 3]; grey images are repeated over the three channels.

    Raises:
        InputError: where the file is missing, broken, has 16 bits per channel, is partly transparent, or asks its
            viewer to rotate it (the label would not be rotated).
    """
    image = _load(path, "image")
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"The image '{path}' has more than 8 bits per channel (mode {image.mode}); 8 bits are expected."
        )
    if image.getexif().get(_ORIENTATION, 1) != 1:
        raise InputError(f"The image '{path}' is stored rotated (EXIF orientation); an upright image is expected.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise InputError(f"The image '{path}' is partly transparent; an image without transparency is expected.")
    return np.asarray(image.convert("RGB"))


def read_index_map(path: Path, kind: str) -> np.ndarray:
    """Reads the values of a one-channel image as they are stored, uint8 [H, W]: of a palette image the indices.

    Raises:
        InputError: where the file is missing or broken, has several channels or 16 bits, or is a JPEG, whose
            compression alters values.
    """
    image = _load(path, kind)
    expected = "an index PNG with one channel of 8 bits is expected"
    if image.format == "JPEG":
        raise InputError(f"The {kind} '{path}' is a JPEG, which alters class values; {expected}.")
    if image.mode not in ("L", "P", "1"):
        found = {"RGB": "a colour image (RGB)", "RGBA": "a colour image (RGBA)"}.get(
            image.mode, f"of mode {image.mode}"
        )
        raise InputError(f"The {kind} '{path}' is {found}; {expected}.")
    values = np.asarray(image).astype(np.uint8)
    if image.format == "PNG" and image.mode == "L":
        # Grey PNGs of 2 or 4 bits are stretched to 0…255 when decoded; the stored values are the classes.
        with open(path, "rb") as stream:
            bits = stream.read(25)[24]
        values //= {2: 85, 4: 17}.get(bits, 1)
    return values


def read_id_map(path: Path, kind: str) -> np.ndarray:
    """Reads the values of a one-channel image of 16 bits, int32 [H, W].

    Raises:
        InputError: where the file is missing or broken, has several channels or 8 bits, which cut larger ids off.
    """
    image = _load(path, kind)
    if not image.mode.startswith("I"):
        raise InputError(
            f"The {kind} '{path}' is an image of mode {image.mode}; a PNG with one channel of 16 bits is expected."
        )
    return np.asarray(image).astype(np.int32)


def classes_of(
    values: np.ndarray, path: Path, *, kind: str, class_names: tuple[str, ...], unlabelled: Iterable[int]
) -> np.ndarray:
    """Turns stored values into a map of classes 0…K−1 and 255 = unlabelled, uint8 [H, W].

    Raises:
        InputError: for the first value that is neither a class nor one of `unlabelled`.
    """
    table: np.ndarray = np.full(256, -1, np.int16)
    table[list(unlabelled)] = UNLABELLED
    table[: len(class_names)] = np.arange(len(class_names))
    result = table[values]
    if result.min() < 0:
        y, x = np.argwhere(result < 0)[0]
        others = "".join(f", {value} (unlabelled)" for value in unlabelled)
        raise InputError(
            f"The {kind} '{path}' holds the value {values[y, x]} at row {y}, column {x}, which is not in the class "
            f"list; 0 to {len(class_names) - 1} ({class_names[0]} to {class_names[-1]}){others} are expected."
        )
    return result.astype(np.uint8)


def make_sample(
    files: SampleFiles,
    label: np.ndarray | None,
    scribble: np.ndarray | None,
    info: DatasetInfo,
    instances: np.ndarray | None = None,
) -> Sample:
    """Reads the image and puts the sample together; its tags are the foreground classes of the label or scribble.

    Raises:
        InputError: where the sizes differ, or the scribble has no labelled pixel.
    """
    image = read_image(files.image)
    for kind, path, values in (
        ("label", files.label, label),
        ("scribble", files.scribble, scribble),
        ("instance map", files.instances, instances),
    ):
        if values is not None and values.shape != image.shape[:2]:
            raise InputError(
                f"The {kind} '{path}' has {values.shape[1]}×{values.shape[0]} pixels (width×height), but its image "
                f"'{files.image}' has {image.shape[1]}×{image.shape[0]}; the same size is expected."
            )
    if scribble is not None and bool((scribble == UNLABELLED).all()):
        raise InputError(f"The scribble '{files.scribble}' of the image '{files.key}' has no labelled pixel.")
    known = label if label is not None else scribble
    present = [] if known is None else [int(k) for k in np.unique(known) if k != UNLABELLED]
    return Sample(
        key=files.key,
        image=image,
        split=files.split,
        label=label,
        scribble=scribble,
        tags=tuple(k for k in present if k != 0 or not info.has_background),
        instances=instances,
    )


def read_sample(files: SampleFiles, info: DatasetInfo, *, ignore: Iterable[int], unlabelled: Iterable[int]) -> Sample:
    """Reads a sample whose label and scribble are index images.

    Args:
        files: where they lie.
        info: the classes.
        ignore: values of the label that mean "not labelled".
        unlabelled: values of the scribble that mean "not labelled".

    Raises:
        InputError: where a file is missing, broken, holds another value, or the sizes differ.
    """
    maps: dict[str, np.ndarray | None] = {"label": None, "scribble": None}
    for kind, path, blank in (("label", files.label, ignore), ("scribble", files.scribble, unlabelled)):
        if path is not None:
            values = read_index_map(path, kind)
            maps[kind] = classes_of(values, path, kind=kind, class_names=info.class_names, unlabelled=blank)
    return make_sample(files, maps["label"], maps["scribble"], info)


def files_by_stem(folder: Path, kind: str) -> dict[str, Path]:
    """Lists the image files of a folder by their name without the ending; hidden files are not data.

    Raises:
        InputError: where the folder is missing, holds something that is no image, or two files of one name.
    """
    if not folder.is_dir():
        raise InputError(f"The folder '{folder}' of the {kind}s does not exist.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_DATA:
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"'{path}' is not an image; files ending in {', '.join(IMAGE_SUFFIXES)} are expected.")
        if path.stem in found:
            raise InputError(f"'{path}' and '{found[path.stem]}' are two {kind}s of one name.")
        found[path.stem] = path
    return found


def match_by_stem(
    images: Path, labels: Path | None, scribbles: Path | None, *, split: str, key_prefix: str = ""
) -> list[SampleFiles]:
    """Puts images, labels and scribbles together by their name without the ending.

    An image may lack a label or a scribble; a label or a scribble may not lack its image.

    Raises:
        InputError: where there is no image, or a label or scribble has none.
    """
    by_kind = {
        kind: files_by_stem(folder, kind) for kind, folder in (("label", labels), ("scribble", scribbles)) if folder
    }
    pictures = files_by_stem(images, "image")
    if not pictures:
        raise InputError(f"The folder '{images}' holds no image.")
    for kind, found in by_kind.items():
        for stem, path in found.items():
            if stem not in pictures:
                raise InputError(
                    f"The {kind} '{path}' has no image in '{images}'{nearest_name(stem, list(pictures)[:2000])}"
                )
    return [
        SampleFiles(
            key=f"{key_prefix}{stem}",
            split=split,
            image=path,
            label=by_kind.get("label", {}).get(stem),
            scribble=by_kind.get("scribble", {}).get(stem),
        )
        for stem, path in pictures.items()
    ]
