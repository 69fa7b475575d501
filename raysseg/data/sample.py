"""One image with what is known of it, and what a whole dataset says about its classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Returns one RGB colour (0…255) per class: the PASCAL VOC colour map, class 0 black.

    Source: the bit-interleaving rule of the VOC development kit.
    """
    palette = []
    for index in range(num_classes):
        red = green = blue = 0
        rest = index
        for shift in range(7, -1, -1):
            red |= (rest & 1) << shift
            green |= (rest >> 1 & 1) << shift
            blue |= (rest >> 2 & 1) << shift
            rest >>= 3
        palette.append((red, green, blue))
    return tuple(palette)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What holds for all samples of a dataset.

    `class_names` are the K classes 0…K−1 in order, `palette` one RGB colour (0…255) for each of them;
    `has_background` says that class 0 is the background; `source` says in words where the data came from.

    Raises:
        InputError: where there are no classes or too many, or the palette has another length or values outside 0…255.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    has_background: bool
    source: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.class_names) <= MAX_CLASSES:
            raise InputError(
                f"The dataset '{self.name}' has {len(self.class_names)} classes; 1 to {MAX_CLASSES} are expected."
            )
        if len(self.palette) != len(self.class_names):
            raise InputError(
                f"The dataset '{self.name}' has {len(self.class_names)} classes but a palette of "
                f"{len(self.palette)} colours; one colour per class is expected."
            )
        for colour in self.palette:
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise InputError(
                    f"The palette of the dataset '{self.name}' holds the colour {colour}; "
                    "three values 0 to 255 are expected."
                )

    @property
    def num_classes(self) -> int:
        """K, the number of classes including the background."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expression:
    """A sentence that refers to a part of one image; `mask` bool [H, W] is that part."""

    text: str
    mask: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One image with what is known of it.

    `key` is its stable identifier, unique in the dataset; `image` uint8 [H, W, 3] RGB; `label` the ground truth and
    `scribble` the given strokes, uint8 [H, W] with classes 0…K−1 and 255 = unlabelled, or None where not known;
    `tags` the classes that the image is said to contain; `instances` the dataset's own number of the object that each
    pixel is of, uint16 [H, W], or None where not known.
    """

    key: str
    image: np.ndarray
    split: str
    label: np.ndarray | None = None
    scribble: np.ndarray | None = None
    tags: tuple[int, ...] = ()
    expressions: tuple[Expression, ...] = ()
    instances: np.ndarray | None = None
