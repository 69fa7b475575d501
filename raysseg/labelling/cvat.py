"""CVAT's files: "CVAT for images 1.1" with masks to write and to read, and "Segmentation mask 1.1" to read.

Only the file formats are used; nothing of CVAT has to be installed.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import UNLABELLED
from raysseg.labelling.answers import Found, Refusal, found, paint

ANNOTATIONS = "annotations.xml"
LABELMAP = "labelmap.txt"
MASKS = "SegmentationClass"
BACKGROUND = "background"
"""CVAT's name for what nobody painted, in its segmentation masks."""

Files = dict[str, Callable[[], bytes]]
"""The files of an export by their path in it, and how each is read."""


def label_definitions(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Returns the labels of a project as CVAT's "Raw" label editor takes them; each can be drawn with any tool."""
    return [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*colour), "type": "any", "attributes": []}
        for name, colour in zip(classes, palette, strict=True)
    ]


def annotations_xml(prelabels: Sequence[tuple[str, np.ndarray]], classes: Sequence[str]) -> bytes:
    """Returns pre-labels as a "CVAT for images 1.1" file.

    Args:
        prelabels: the name of each picture and its classes, uint8 [h, w].
        classes: names of the classes.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    for index, (name, labels) in enumerate(prelabels):
        height, width = labels.shape
        image = ElementTree.SubElement(
            root, "image", {"id": str(index), "name": name, "width": str(width), "height": str(height)}
        )
        for number in np.unique(labels).tolist():
            image.append(_mask_element(labels == number, classes[number]))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def read_export(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Reads an export: an XML file, a zip, or a folder of what was in it."""
    if path.is_file() and path.suffix.lower() == ".xml":
        yield from _read_annotations(path.read_bytes, classes, str(path))
        return
    files = _files(path)
    if files is not None and ANNOTATIONS in files:
        yield from _read_annotations(files[ANNOTATIONS], classes, f"{path}, {ANNOTATIONS}")
    elif files is not None and LABELMAP in files:
        yield from _read_masks(files, classes, str(path))
    else:
        reason = "the file cannot be read as a zip archive"
        if files is not None:
            reason = f"it holds neither {ANNOTATIONS} (CVAT for images 1.1) nor {LABELMAP} (Segmentation mask 1.1)"
        yield Refusal(name=path.name, source=str(path), reason=reason)


def _files(path: Path) -> Files | None:
    if path.is_dir():
        return {one.relative_to(path).as_posix(): one.read_bytes for one in sorted(path.rglob("*")) if one.is_file()}
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        return None

    def reader(name: str) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                return archive.read(name)
            except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{name} in the archive cannot be read: {error}.") from error

        return read

    return {name: reader(name) for name in sorted(archive.namelist()) if not name.endswith("/")}


# ---- CVAT for images 1.1 ------------------------------------------------------------------------------------------------


def _mask_element(where: np.ndarray, name: str) -> ElementTree.Element:
    """A mask as CVAT writes it: its box, and the lengths of runs in it row by row, unpainted and painted in turn."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    flat = where[top:bottom, left:right].reshape(-1)
    edges: np.ndarray = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    if flat[0]:
        runs.insert(0, 0)
    values = {
        "label": name,
        "source": "auto",
        "occluded": "0",
        "rle": ", ".join(map(str, runs)),
        "left": str(left),
        "top": str(top),
        "width": str(right - left),
        "height": str(bottom - top),
        "z_order": "0",
    }
    return ElementTree.Element("mask", values)


def _read_annotations(read: Callable[[], bytes], classes: Sequence[str], source: str) -> Iterator[Found]:
    try:
        root = ElementTree.fromstring(read())
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, LookupError, ValueError) as error:
        # An encoding that Python does not know is a LookupError, one that its parser does not take a ValueError.
        yield Refusal(name=source, source=source, reason=f"the file cannot be read as XML: {error}")
        return
    if root.tag != "annotations" or root.find("track") is not None:
        yield Refusal(
            name=source, source=source, reason="the file is not a CVAT export of the format 'CVAT for images 1.1'"
        )
        return
    for image in root.iter("image"):
        name = PurePosixPath(image.get("name", "")).stem
        try:
            size = (int(image.get("height", "")), int(image.get("width", "")))
            shapes = sorted((one for one in image if one.tag != "tag"), key=lambda one: int(one.get("z_order", "0")))
            yield found(name, paint(size, (_layer(one, classes, size) for one in shapes)), source)
        except InputError as error:
            yield Refusal(name=name, source=source, reason=str(error))
        except (ValueError, OverflowError, MemoryError):
            reason = f"The image '{image.get('name')}' has a number that cannot be read; whole numbers of pixels are expected."
            yield Refusal(name=name, source=source, reason=reason)


def _layer(shape: ElementTree.Element, classes: Sequence[str], size: tuple[int, int]) -> tuple[int, np.ndarray]:
    if shape.tag != "mask":
        raise InputError(
            f"There is a {shape.tag} in it; masks are expected, so export as 'Segmentation mask 1.1', where CVAT draws it."
        )
    label = shape.get("label", "")
    if label not in classes:
        raise InputError(f"The class '{label}' is not known{nearest_name(label, classes)}")
    left, top, width, height = (int(float(shape.get(key, ""))) for key in ("left", "top", "width", "height"))
    runs = [int(run) for run in shape.get("rle", "").split(",")]
    if min(runs) < 0 or sum(runs) != width * height:
        raise InputError(f"A mask of {width}×{height} pixels has runs over {sum(runs)} pixels.")
    if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
        raise InputError(f"A mask reaches beyond its image of {size[1]}×{size[0]} pixels (width×height).")
    where: np.ndarray = np.zeros(size, dtype=bool)
    painted = np.arange(len(runs)) % 2 == 1
    where[top : top + height, left : left + width] = np.repeat(painted, runs).reshape(height, width)
    return list(classes).index(label), where


# ---- Segmentation mask 1.1 ----------------------------------------------------------------------------------------------


def _read_masks(files: Files, classes: Sequence[str], source: str) -> Iterator[Found]:
    try:
        colours = _read_labelmap(files[LABELMAP]().decode(), classes)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        yield Refusal(name=LABELMAP, source=source, reason=str(error))
        return
    for member, read in files.items():
        path = PurePosixPath(member)
        if MASKS not in path.parts[:1] or path.suffix.lower() != ".png":
            continue
        place = f"{source}, {member}"
        try:
            yield _read_colours(path.stem, read(), colours, classes, place)
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            yield Refusal(name=path.stem, source=place, reason=str(error))


def _read_labelmap(text: str, classes: Sequence[str]) -> dict[int, str]:
    """The name of the class of every colour, which is packed into one number."""
    names: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.rsplit(":", 3)
        try:
            red, green, blue = (int(value) for value in parts[1].split(","))
        except (IndexError, ValueError):
            raise InputError(
                f"Line {number} of {LABELMAP} is '{line}'; 'name:red,green,blue:parts:actions' is expected."
            ) from None
        colour = red << 16 | green << 8 | blue
        if colour in names:
            raise InputError(
                f"{LABELMAP} gives '{names[colour]}' and '{parts[0]}' one colour, {parts[1]}; change one in CVAT."
            )
        names[colour] = parts[0]
    return names


def _read_colours(name: str, content: bytes, names: dict[int, str], classes: Sequence[str], source: str) -> Found:
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    colours, inverse = np.unique(packed, return_inverse=True)
    numbers: np.ndarray = np.full(len(colours), UNLABELLED, dtype=np.uint8)
    for index, colour in enumerate(colours.tolist()):
        if colour not in names:
            raise InputError(
                f"A mask has the colour {colour >> 16},{colour >> 8 & 255},{colour & 255}, which is not in {LABELMAP}."
            )
        if names[colour] in classes:
            numbers[index] = list(classes).index(names[colour])
        elif names[colour] != BACKGROUND:
            raise InputError(f"The class '{names[colour]}' is not known{nearest_name(names[colour], classes)}")
    labels = numbers[inverse].reshape(packed.shape)
    if names[int(colours[0])] == BACKGROUND and len(colours) == 1:
        # Nothing is painted; even where 'background' is a class, this is what an image looks like that nobody opened.
        labels = np.full_like(labels, UNLABELLED)
    return found(name, labels, source)
