"""What a budget buys: the label maps that the segmenter is then trained on, and the numbers of the regions asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

from raysseg.algorithms.ralis.config import RegionOptions
from raysseg.data.label_store import LabelRow
from raysseg.data.store import Store
from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Regions of the training split in the order in which they were labelled.

    Args:
        rows: their images, int64 `[L]`.
        regions: their numbers within these, int64 `[L]`.
    """

    rows: np.ndarray
    regions: np.ndarray

    @classmethod
    def everything(cls, rows: np.ndarray, count: int) -> Labelled:
        """All regions of some images, `count` each."""
        return cls(rows=np.repeat(rows, count), regions=np.tile(np.arange(count), len(rows)))

    def first(self, budget: int) -> Labelled:
        """Returns the first regions."""
        return Labelled(rows=self.rows[:budget], regions=self.regions[:budget])

    def __len__(self) -> int:
        return len(self.rows)


def truth_of(store: Store, key: str) -> np.ndarray:
    """Returns the ground truth of a training image, uint8 `[H, W]`.

    Raises:
        InputError: the image has none.

    Source: RALIS, Sec. 3.1 (the oracle).
    """
    label = store.label(key)
    if label is None:
        raise InputError(
            f"The training image '{key}' of '{store.uri}' has no ground truth, from which its regions could be labelled; "
            "`raysseg label` asks people instead."
        )
    return label


def window(size: tuple[int, int], region: int, options: RegionOptions) -> tuple[slice, slice]:
    """Returns where a region lies in an image of a size (H, W) that the grid divides. Source: RALIS, Sec. 4.1."""
    height, width = size[0] // options.rows, size[1] // options.columns
    row, column = divmod(region, options.columns)
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def count_classes(store: Store, keys: Sequence[str], num_classes: int) -> np.ndarray:
    """Counts the ground-truth pixels of each class in whole images, int64 `[C]`. Source: reconstruction."""
    counts = [np.bincount(truth_of(store, key).reshape(-1), minlength=256) for key in keys]
    return np.sum(counts, axis=0)[:num_classes]


def count_regions(store: Store, keys: Sequence[str], labelled: Labelled, options: RegionOptions) -> np.ndarray:
    """Counts the ground-truth pixels of each value in labelled regions, int64 `[L, 256]`. Source: reconstruction.

    Args:
        store: where the images are.
        keys: of the training split.
        labelled: L regions.
        options: the grid.
    """
    counts: np.ndarray = np.zeros((len(labelled), 256), dtype=np.int64)
    for row in np.unique(labelled.rows):
        truth = truth_of(store, keys[row])
        for place in np.flatnonzero(labelled.rows == row):
            part = truth[window(truth.shape, int(labelled.regions[place]), options)]
            counts[place] = np.bincount(part.reshape(-1), minlength=256)
    return counts


def label_maps(
    store: Store, keys: Sequence[str], whole: np.ndarray, labelled: Labelled, options: RegionOptions
) -> Iterator[LabelRow]:
    """Makes the label maps of one budget: some images whole, and of others the labelled regions, 255 everywhere else.

    Args:
        store: where the ground truth is.
        keys: of the training split.
        whole: int64 `[M]`, rows of the images that are labelled whole.
        labelled: regions of other images.
        options: the grid.

    Source: RALIS, Sec. 4.1; that D_T stays among the labels is a reconstruction.
    """
    for row in whole:
        yield LabelRow(key=keys[row], label=truth_of(store, keys[row]))
    for row in np.unique(labelled.rows):
        truth = truth_of(store, keys[row])
        label = np.full_like(truth, UNLABELLED)
        for region in labelled.regions[labelled.rows == row]:
            place = window(truth.shape, int(region), options)
            label[place] = truth[place]
        yield LabelRow(key=keys[row], label=label)


def count_budgets(
    store: Store,
    keys: Sequence[str],
    labelled: Labelled,
    budgets: Sequence[int],
    *,
    known: np.ndarray,
    pool: int,
    options: RegionOptions,
) -> list[dict[str, Any]]:
    """Counts what every budget bought.

    Args:
        store: where the ground truth is.
        keys: of the training split.
        labelled: the regions in their order.
        budgets: numbers of them.
        known: rows of D_T, whose classes say which are rare.
        pool: images of D_V.
        options: the grid.

    Returns:
        For each budget `budget`, `labelled_share` (of all regions of D_V), `labelled_images`, `class_shares` `[C]` (of the
        pixels asked for that have a class), `class_entropy` of these shares in nats, and `rare_share`, that of the rare classes
        together; None where no pixel has one.

    Source: RALIS, Fig. 3 (the entropy); what is rare is a reconstruction.
    """
    num_classes = store.info.num_classes
    rare = rare_classes(count_classes(store, [keys[row] for row in known], num_classes))
    counts = count_regions(store, keys, labelled, options)[:, :num_classes]
    found = []
    for budget in budgets:
        pixels = counts[:budget].sum(0)
        shares = pixels / pixels.sum() if pixels.any() else None
        found.append(
            {
                "budget": budget,
                "labelled_share": budget / (pool * options.count),
                "labelled_images": len(np.unique(labelled.rows[:budget])),
                "rare_share": None if shares is None else float(shares[rare].sum()),
                "class_entropy": None if shares is None else float(special.entr(shares).sum()),
                "class_shares": None if shares is None else shares.tolist(),
            }
        )
    return found


def rare_classes(counts: np.ndarray) -> np.ndarray:
    """Returns the rarer half of the classes, those of the fewest pixels, int64 `[C // 2]`, ascending.

    Args:
        counts: pixels of each class `[C]` where labels are known from the start.

    Source: reconstruction.
    """
    return np.sort(np.argsort(counts, kind="stable")[: len(counts) // 2])
