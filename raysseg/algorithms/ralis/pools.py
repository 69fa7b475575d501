"""Which regions may be asked for at a step: the grid over every image, and K pools of N candidates (Sec. 3.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from raysseg.errors import InputError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pools:
    """K pools of N candidates; one region of every pool is labelled.

    Args:
        rows: image of every candidate, a row of its split, int64 `[K, N]`.
        regions: its number within the image, int64 `[K, N]`.
        distinct: the first candidates of every pool that differ, N or fewer; where fewer than K·N regions are left, the
            further places repeat them, so that shapes stay and every choice is a region.
    """

    rows: np.ndarray
    regions: np.ndarray
    distinct: int

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the images that candidates come from, int64 `[M]`, and of every candidate the place therein `[K, N]`."""
        images, places = np.unique(self.rows, return_inverse=True)
        return images, places.reshape(self.rows.shape)


def draw_pools(
    unlabelled: np.ndarray, rows: np.ndarray, per_step: int, pool_size: int, generator: np.random.Generator
) -> Pools:
    """Draws images without replacement until they hold K·N unlabelled regions, and cuts K pools from these.

    A step therefore looks at a few images only. Where fewer than K·N regions are left, pools shrink to an equal number.

    Args:
        unlabelled: bool `[M, R]`, which regions have no label yet.
        rows: of these images in their split, int64 `[M]`.
        per_step: K.
        pool_size: N.
        generator: of this step.

    Raises:
        InputError: fewer than K regions are left.

    Source: the authors' code; it draws an image, then a region in it, where this draws uniformly among the images' regions.
    """
    left = unlabelled.sum(1)
    if left.sum() < per_step:
        raise InputError(f"{left.sum()} regions have no label yet, but a step labels per_step, {per_step} of them.")
    distinct = min(pool_size, int(left.sum()) // per_step)
    count = per_step * distinct
    order = generator.permutation(np.flatnonzero(left))
    touched = order[: int(np.searchsorted(left[order].cumsum(), count)) + 1]
    image, region = np.nonzero(unlabelled[touched])
    drawn = generator.permutation(len(image))[:count].reshape(per_step, distinct)
    drawn = drawn[:, np.arange(pool_size) % distinct]
    return Pools(rows=rows[touched[image[drawn]]], regions=region[drawn].astype(np.int64), distinct=distinct)


def check_grid(keys: Sequence[str], sizes: Sequence[tuple[int, int]], rows: int, columns: int) -> None:
    """Checks that the grid cuts every image into regions of one size.

    Args:
        keys: of the images.
        sizes: (height, width) of each in pixels.
        rows: regions over the height.
        columns: regions over the width.

    Raises:
        InputError: naming the first image that it does not divide, and the nearest grid that divides all of them.

    Source: reconstruction; the authors' grids divide their images.
    """
    for key, (height, width) in zip(keys, sizes, strict=True):
        if height % rows or width % columns:
            nearest = (
                _nearest_divisor(math.gcd(*(size[0] for size in sizes)), rows),
                _nearest_divisor(math.gcd(*(size[1] for size in sizes)), columns),
            )
            raise InputError(
                f"The image '{key}' is {width}x{height} pixels (width x height), which the grid of {columns} columns x {rows} "
                f"rows does not divide; the nearest grid that divides all images is ralis.regions.columns={nearest[1]}, "
                f"ralis.regions.rows={nearest[0]}."
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    return min(divisors, key=lambda one: (abs(one - wanted), one))


def check_budget(name: str, budget: int, images: int, regions: int) -> None:
    """Checks that a pool holds what is to be labelled of it.

    Args:
        name: the setting that holds the budget.
        budget: regions to label.
        images: of the pool.
        regions: R of each.

    Raises:
        InputError: the budget is larger than the pool.
    """
    if budget > images * regions:
        raise InputError(
            f"{name} is {budget} regions, but the {images} images to label have only {images * regions} "
            f"({regions} each); lower it, or keep fewer images in the other sets (ralis.sets)."
        )


def check_oracle(keys: Sequence[str]) -> None:
    """Checks that the oracle can answer.

    Args:
        keys: of the images to label that have no ground truth.

    Raises:
        InputError: there are any.

    Source: reconstruction.
    """
    if keys:
        raise InputError(
            f"{len(keys)} of the images to label have no ground truth, the first is '{keys[0]}': here an oracle answers; people "
            "label such images with `raysseg label`."
        )
