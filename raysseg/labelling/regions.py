"""Regions of images: the cells of a grid that divides every image, with the names by which people answer for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from raysseg.errors import InputError

_ID = re.compile(r"(?P<image>.+)_r(?P<row>\d{2,})c(?P<column>\d{2,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One cell of an image's grid.

    `image` is the image's name without its ending, `number` counts row by row from 0, `box` is (x0, y0, x1, y1) in pixels,
    the last two exclusive.
    """

    id: str
    image: str
    number: int
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0

    @property
    def cell(self) -> tuple[slice, slice]:
        """Where the region lies in an array [H, W, …] of its image."""
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """`rows` × `columns` regions of one size in every image."""

    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Regions of one image."""
        return self.rows * self.columns

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raises `InputError` where the grid does not divide an image, with the closest grid that divides all of them.

        Args:
            sizes: (H, W) in pixels of every image by its name.
        """
        for name, (height, width) in sizes.items():
            if height % self.rows or width % self.columns:
                rows = _divisor(math.gcd(*(size[0] for size in sizes.values())), self.rows)
                columns = _divisor(math.gcd(*(size[1] for size in sizes.values())), self.columns)
                raise InputError(
                    f"The grid {self.rows}x{self.columns} (rows x columns) does not divide the image '{name}' of "
                    f"{width}×{height} pixels (width×height); the closest grid that divides all images is {rows}x{columns}."
                )

    def region(self, image: str, number: int, size: tuple[int, int]) -> Region:
        """The region of a number in an image of `size` (H, W)."""
        row, column = divmod(number, self.columns)
        height, width = size[0] // self.rows, size[1] // self.columns
        return Region(
            id=f"{image}_r{row:02d}c{column:02d}",
            image=image,
            number=number,
            box=(column * width, row * height, (column + 1) * width, (row + 1) * height),
        )

    def parse(self, name: str) -> tuple[str, int] | None:
        """The image and the number that a region's id names; None where it is not the id of a cell of this grid."""
        match = _ID.fullmatch(name)
        if match is None:
            return None
        row, column = int(match["row"]), int(match["column"])
        if row >= self.rows or column >= self.columns or name != f"{match['image']}_r{row:02d}c{column:02d}":
            return None
        return match["image"], row * self.columns + column


def _divisor(side: int, wanted: int) -> int:
    """The divisor of a length that is closest to the wanted number of cells."""
    divisors = [cells for cells in range(1, side + 1) if side % cells == 0]
    return min(divisors, key=lambda cells: (abs(cells - wanted), cells))
