"""The options of every command that runs a trained segmenter."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from raysseg.errors import InputError

ScalesOption = Annotated[
    str | None,
    typer.Option(metavar="0.5,1,1.5", help="Factors on the images' sides to average over; by default the variant's."),
]
FlipOption = Annotated[
    bool | None,
    typer.Option("--flip/--no-flip", help="Also run the images mirrored left to right; by default as the variant."),
]


def parse_scales(text: str | None) -> tuple[float, ...] | None:
    """Returns the numbers of `0.5,1,1.5`, or None where nothing was given.

    Raises:
        InputError: for anything but positive numbers separated by commas.
    """
    if text is None:
        return None
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise InputError(f"--scales takes positive numbers separated by commas, as 0.5,1,1.5, not '{text}'.")
    return scales
