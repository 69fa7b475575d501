"""What a person's files hold: for each region or image a map of classes, or the reason why it cannot be one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysseg.data.readers.images import classes_of, read_index_map
from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED


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
    """Reads an index PNG that is named by the region or the image that it answers for."""
    try:
        values = read_index_map(path, "answer")
        mask = classes_of(values, path, kind="answer", class_names=tuple(classes), unlabelled=[UNLABELLED])
    except InputError as error:
        return Refusal(name=path.stem, source=str(path), reason=str(error))
    return found(path.stem, mask, str(path))


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
