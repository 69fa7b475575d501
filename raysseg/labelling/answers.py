"""What a person's files hold: for each region or image a map of classes, or the reason why it cannot be one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from raysseg.data.readers.images import classes_of, read_index_map
from raysseg.data.sample import default_palette
from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED
from raysseg.visualization.overlay import HATCH_LIGHT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """One answer as it stands in a file.

    `name` is a region's id or an image's name; `mask` uint8 [h, w] has classes and 255 where nothing is labelled; `source`
    is the file, and the place in it.
    """

    name: str
    mask: np.ndarray
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer that was not taken: the region's id (or what stands in its place), where it was, and why."""

    name: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A region that came without an answer: nobody has labelled it yet."""

    name: str
    source: str


Found = Given | Refusal | Open


def found(name: str, mask: np.ndarray, source: str) -> Found:
    """An answer, or nothing yet where no pixel of the mask uint8 [h, w] is labelled."""
    if bool((mask == UNLABELLED).all()):
        return Open(name=name, source=source)
    return Given(name=name, mask=mask, source=source)


def read_index_png(path: Path, classes: Sequence[str]) -> Found:
    """Reads an index PNG that is named by the region or the image that it answers for.

    Editors number the colours of a palette anew, or save them as RGB: then the colours of the pre-labels say the classes.
    """
    try:
        values = _read_colours(path, len(classes))
        if values is None:
            values = read_index_map(path, "answer")
        mask = classes_of(values, path, kind="answer", class_names=tuple(classes), unlabelled=[UNLABELLED])
    except InputError as error:
        return Refusal(name=path.stem, source=str(path), reason=str(error))
    return found(path.stem, mask, str(path))


def _read_colours(path: Path, classes: int) -> np.ndarray | None:
    """Returns classes and 255, uint8 [H, W], as the colours say them; None where the stored values are to be taken.

    Raises:
        InputError: the palette is neither the run's nor grey, and has a colour in use that is no class's.
    """
    try:
        with Image.open(path) as picture:
            if picture.format != "PNG" or picture.mode not in ("P", "RGB"):
                return None
            indices = np.asarray(picture) if picture.mode == "P" else None
            pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
            table = np.array(picture.getpalette() or [], dtype=np.int64).reshape(-1, 3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        # Whoever reads the values says what is wrong with the file.
        return None
    palette = default_palette(classes)
    if indices is not None:
        # In the files of `label next` values that are no class are black; many editors have another colour for 255.
        own: np.ndarray = np.zeros((256, 3), dtype=np.int64)
        own[:classes] = palette
        used = np.unique(indices)
        named = used[used != UNLABELLED]
        if used[-1] < len(table) and (
            np.array_equal(table[named], own[named]) or bool((table[used] == used[:, None]).all())
        ):
            return None
    packed = pixels @ np.array([1 << 16, 1 << 8, 1])
    number_of = {red << 16 | green << 8 | blue: number for number, (red, green, blue) in enumerate(palette)}
    number_of[HATCH_LIGHT[0] << 16 | HATCH_LIGHT[1] << 8 | HATCH_LIGHT[2]] = UNLABELLED
    colours, inverse = np.unique(packed, return_inverse=True)
    other = next((colour for colour in colours.tolist() if colour not in number_of), None)
    if other is None:
        numbers = np.array([number_of[colour] for colour in colours.tolist()], dtype=np.uint8)
        return numbers[inverse].reshape(packed.shape)
    if indices is None:
        return None
    raise InputError(
        f"The answer '{path}' has a palette of its own, with the colour {other >> 16},{other >> 8 & 255},{other & 255} in use; "
        "the colours of the pre-labels, a grey palette or a grey image are expected."
    )


def paint(size: tuple[int, int], layers: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    """Lays masks over one another; a later one covers an earlier one.

    Args:
        size: (H, W) in pixels.
        layers: the class of each mask, and where it is, bool [H, W].

    Returns:
        uint8 [H, W] with 255 where there is no mask.
    """
    labels: np.ndarray = np.full(size, UNLABELLED, dtype=np.uint8)
    for number, where in layers:
        labels[where] = number
    return labels
