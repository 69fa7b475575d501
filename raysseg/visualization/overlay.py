"""Label maps as pictures: in the classes' colours, over the image, and as index PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED

Palette = Sequence[tuple[int, int, int]]
"""The colour of each class, RGB 0…255."""

HATCH_LIGHT = (204, 204, 204)
HATCH_DARK = (178, 178, 178)
HATCH_PERIOD = 8
"""Pixels from one diagonal stripe of the unlabelled hatch to the next."""

DIMMED = 0.45
"""Brightness that the image keeps where nothing is labelled."""


def _lookup_table(palette: Palette) -> np.ndarray:
    """The colour of every value of a label map: `[256, 3]`; unlabelled is mid-grey, padding black."""
    if len(palette) > PADDING:
        raise InputError(f"The palette has {len(palette)} colours; a label map holds at most {PADDING} classes.")
    table: np.ndarray = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8).reshape(-1, 3)
    table[UNLABELLED] = HATCH_LIGHT
    table[PADDING] = 0
    return table


def _check_labels(labels: np.ndarray, palette: Palette) -> None:
    """Raises InputError unless `labels` is uint8 `[H, W]` with values of the palette or reserved."""
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise InputError(f"A label map is uint8 [H, W]; this one is {labels.dtype} {list(labels.shape)}.")
    present = np.bincount(labels.reshape(-1), minlength=256)
    present[[PADDING, UNLABELLED]] = 0
    unknown = np.flatnonzero(present[len(palette) :])
    if unknown.size:
        value = int(unknown[0]) + len(palette)
        raise InputError(
            f"The label map holds the value {value}; expected are the classes 0…{len(palette) - 1}, "
            f"{PADDING} (padding) and {UNLABELLED} (unlabelled)."
        )


def colour_map(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Paints a label map in the classes' colours.

    Args:
        labels: uint8 `[H, W]`; 255 unlabelled becomes a mid-grey diagonal hatch, 254 padding becomes black.
        palette: one RGB colour per class.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        InputError: for another shape or dtype, or a value that is neither a class of the palette nor reserved.
    """
    _check_labels(labels, palette)
    picture = _lookup_table(palette)[labels]
    height, width = labels.shape
    diagonal = (np.arange(height)[:, None] + np.arange(width)[None, :]) % HATCH_PERIOD
    picture[(labels == UNLABELLED) & (diagonal < HATCH_PERIOD // 2)] = HATCH_DARK
    return picture


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, *, alpha: float = 0.5) -> np.ndarray:
    """Lays a label map over its image; where nothing is labelled the image shows, dimmed; padding is black.

    Args:
        image: uint8 `[H, W, 3]`.
        labels: uint8 `[H, W]`.
        palette: one RGB colour per class.
        alpha: weight of the class colour on labelled pixels, 0…1.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        InputError: for shapes that do not agree, unknown label values, or an alpha outside 0…1.
    """
    _check_labels(labels, palette)
    if image.dtype != np.uint8 or image.shape != (*labels.shape, 3):
        raise InputError(
            f"The image is {image.dtype} {list(image.shape)}; expected is uint8 {[*labels.shape, 3]}, as the label map."
        )
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"The overlay's alpha is {alpha}; expected is a number from 0 to 1.")
    pixels: np.ndarray = image.astype(np.float32)
    blended = (1.0 - alpha) * pixels + alpha * _lookup_table(palette)[labels]
    blended = np.where((labels == UNLABELLED)[..., None], DIMMED * pixels, blended)
    blended[labels == PADDING] = 0.0
    return np.round(blended).astype(np.uint8)


def save_index_png(path: Path, labels: np.ndarray, palette: Palette) -> None:
    """Writes a label map as an 8-bit palette PNG whose indices are the classes (254 and 255 stay as they are).

    Args:
        path: the file to write.
        labels: uint8 `[H, W]`.
        palette: one RGB colour per class; seen by picture viewers only.

    Raises:
        InputError: as `colour_map`.
    """
    _check_labels(labels, palette)
    picture = Image.fromarray(labels)
    picture.putpalette(_lookup_table(palette).reshape(-1).tolist())
    picture.save(path, format="PNG")
