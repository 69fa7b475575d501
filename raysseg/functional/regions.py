"""What is known of an image's regions: shares of classes, entropies pooled over cells, means (RALIS, Sec. 3.2 and 3.3).

A grid of rows × columns cuts an image into R = rows · columns regions, numbered row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES

_COUNTED_AT_ONCE = 1 << 22
_TINY = torch.finfo(torch.float32).tiny


def cut_regions(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Cuts maps into the regions of a grid, region by region in row-major order.

    Args:
        maps: any dtype [B, H, W], or [B, C, H, W] and so on, with any number of dimensions between B and H.
        rows: regions over the height; divides H.
        columns: regions over the width; divides W.
    Returns:
        [B, R, h, w], or [B, R, C, h, w] and so on, with R = rows · columns, h = H / rows, w = W / columns.
    Raises:
        InputError: where the grid does not divide the maps.
    Source: RALIS, Sec. 3.1 (the grid itself: the authors' code).
    """
    if maps.ndim < 3:
        raise InputError(f"maps is {list(maps.shape)}, expected [B, ..., H, W]")
    _check_grid(maps, rows, columns)
    cut = maps.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))
    return cut.movedim((-4, -2), (1, 2)).flatten(1, 2)


def class_shares(classes: Tensor, num_classes: int, rows: int, columns: int, smoothing: float) -> Tensor:
    """Computes the shares of the predicted classes in every region.

    Args:
        classes: uint8 [B, H, W], predicted classes; values from C on (padding, unlabelled) are not counted.
        num_classes: C, 1…254.
        rows: regions over the height.
        columns: regions over the width.
        smoothing: share of a class that does not occur, above 0, before the shares are divided by their sum.
    Returns:
        float32 [B, R, C] above 0, 1 in sum over C; a region in which nothing is counted has 1 / C everywhere.
    Raises:
        InputError: where the grid does not divide the maps, or for another dtype, C or smoothing.
    Source: RALIS, Sec. 3.2; division by the sum is the paper's word, the smoothing that of the authors' code.
    """
    regions = cut_regions(classes, rows, columns)
    return label_shares(regions.flatten(0, 1), num_classes, smoothing).unflatten(0, regions.shape[:2])


def label_shares(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Computes the shares of the labelled classes in regions that are cut already.

    Args:
        labels: uint8 [M, h, w]; values from C on (254 padding, 255 unlabelled) are not counted.
        num_classes: C, 1…254.
        smoothing: share of a class that does not occur, above 0, before the shares are divided by their sum.
    Returns:
        float32 [M, C] above 0, 1 in sum over C; a region without a labelled pixel has 1 / C everywhere.
    Raises:
        InputError: for another shape, dtype, C or smoothing.
    Source: RALIS, Sec. 3.3 (regions without labels: reconstruction; the authors' code counts void as a class).
    """
    if labels.dtype != torch.uint8 or labels.ndim != 3:
        raise InputError(f"labels are {labels.dtype} {list(labels.shape)}, expected uint8 [M, h, w]")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(f"num_classes is {num_classes}, expected 1 to {MAX_CLASSES}")
    if not 0 < smoothing < 1:
        raise InputError(f"smoothing is {smoothing}, expected a share above 0 and below 1")
    counts = _count_classes(labels, num_classes)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    shares = torch.where(counts > 0, shares, smoothing)
    return shares / shares.sum(dim=1, keepdim=True)


@torch.no_grad()
def entropy_map(probabilities: Tensor) -> Tensor:
    """Computes the entropy of every pixel's distribution over the classes.

    Args:
        probabilities: float [B, C, H, W] in [0, 1], 1 in sum over C.
    Returns:
        float32 [B, H, W] in nats, 0…ln C, carrying no gradient.
    Raises:
        InputError: for another shape.
    Source: RALIS, Sec. 3.2 (H = −Σ p ln p, per pixel).
    """
    if probabilities.ndim != 4:
        raise InputError(f"probabilities is {list(probabilities.shape)}, expected [B, C, H, W]")
    # Class by class through one buffer: all classes at once take five times as long, in fresh memory of their size.
    entropy = probabilities.new_zeros(probabilities[:, 0].shape, dtype=torch.float32)
    logarithm = torch.empty_like(entropy)
    for plane in probabilities.unbind(1):
        share = plane.float()
        torch.clamp_min(share, _TINY, out=logarithm).log_()
        entropy.addcmul_(share, logarithm, value=-1)
    return entropy.clamp_min_(0)


def entropy_map_of_logits(logits: Tensor, *, chunk_elements: int = 1 << 19) -> Tensor:
    """Computes the entropy of every pixel's distribution over the classes, without making the distribution.

    Args:
        logits: float [B, C, H, W], before the softmax.
        chunk_elements: logits that a CPU works on at once, some rows of all classes; at least one row.
    Returns:
        float32 [B, H, W] in nats, 0…ln C, carrying no gradient; NaN where a logit is not finite.
    Raises:
        InputError: for another shape.
    Source: RALIS, Sec. 3.2 (H = −Σ p ln p, per pixel).
    """
    if logits.ndim != 4:
        raise InputError(f"logits is {list(logits.shape)}, expected [B, C, H, W]")
    batch, classes, height, width = logits.shape
    entropy = torch.empty(batch, height, width, device=logits.device)
    # On a CPU some rows at a time stay in the cache: all at once take twice as long or more, in fresh memory.
    rows = max(1, chunk_elements // max(1, batch * classes * width)) if logits.device.type == "cpu" else max(1, height)
    for first in range(0, height, rows):
        shifted = logits.detach()[:, :, first : first + rows].float()
        shifted = shifted - shifted.amax(1, keepdim=True)
        shares = shifted.exp()
        total = shares.sum(1)
        entropy[:, first : first + rows] = total.log() - (shares * shifted).sum(1) / total
    return entropy.clamp_min_(0)


def pooled_entropies(entropy: Tensor, rows: int, columns: int, cells: int, poolings: Sequence[str]) -> Tensor:
    """Pools the entropy over cells × cells cells of every region, in one or more ways.

    Args:
        entropy: float [B, H, W], of `entropy_map`.
        rows: regions over the height.
        columns: regions over the width.
        cells: cells over a region's height and width; where it does not divide them, neighbouring cells share a row or
            column of pixels, so that no pixel is left out.
        poolings: of `min`, `mean`, `max`, P of them in the order of the result.
    Returns:
        [B, R, F] with F = P · cells², pooling by pooling, each row by row; the dtype of `entropy`, its range.
    Raises:
        InputError: where the grid does not divide the map, for no cell, no pooling or one of another name.
    Source: RALIS, Sec. 3.2 (8 × 8 cells: the authors' code; shared rows: reconstruction, theirs drops the rest).
    """
    if entropy.ndim != 3:
        raise InputError(f"entropy is {list(entropy.shape)}, expected [B, H, W]")
    if cells < 1:
        raise InputError(f"cells is {cells}, expected at least 1")
    if not poolings or not set(poolings) <= set(_ALONG):
        raise InputError(f"poolings is {list(poolings)}, expected one or more of {', '.join(_ALONG)}")
    _check_grid(entropy, rows, columns)
    pooled = [_pool_cells(entropy, rows, columns, cells, pooling) for pooling in poolings]
    return torch.cat(pooled, dim=-1)


def region_means(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Averages a map over every region.

    Args:
        maps: float [B, H, W], a score of every pixel.
        rows: regions over the height.
        columns: regions over the width.
    Returns:
        [B, R] of the maps' dtype.
    Raises:
        InputError: where the grid does not divide the maps.
    Source: RALIS, Sec. 4.1 (the score of a region in the baselines, as in the authors' code).
    """
    if maps.ndim != 3:
        raise InputError(f"maps is {list(maps.shape)}, expected [B, H, W]")
    _check_grid(maps, rows, columns)
    return _pool_cells(maps, rows, columns, 1, "mean").squeeze(-1)


_ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "min": lambda values, axis: values.amin(axis),
    "mean": lambda values, axis: values.mean(axis),
    "max": lambda values, axis: values.amax(axis),
}


def _check_grid(maps: Tensor, rows: int, columns: int) -> None:
    height, width = maps.shape[-2:]
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise InputError(
            f"a grid of {rows} × {columns} regions does not divide {height} × {width} pixels: "
            "expected rows that divide the height and columns that divide the width"
        )


def _count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Counts the classes 0…C−1 of regions uint8 [M, h, w], int64 [M, C]."""
    counts = labels.new_zeros(labels.shape[0], num_classes + 1, dtype=torch.int64)
    at_once = max(1, _COUNTED_AT_ONCE // max(1, labels.shape[1] * labels.shape[2]))
    for part, into in zip(labels.split(at_once), counts.split(at_once), strict=True):
        first = torch.arange(0, into.numel(), num_classes + 1, dtype=torch.int32, device=labels.device)
        index = part.clamp_max(num_classes) + first[:, None, None]
        into.view(-1).copy_(torch.bincount(index.flatten(), minlength=into.numel()))
    return counts[:, :num_classes]


def _pool_cells(values: Tensor, rows: int, columns: int, cells: int, pooling: str) -> Tensor:
    """Pools [B, H, W] over the cells of every region, [B, R, cells²]."""
    down, across = rows * cells, columns * cells
    if values.shape[1] % down or values.shape[2] % across:
        regions = cut_regions(values, rows, columns)
        return _pool_shared(regions.flatten(0, 1), cells, pooling).view(*regions.shape[:2], cells**2)
    # Over the height first: whole lines of pixels are reduced at once, and little is left for the slower width.
    along = _ALONG[pooling]
    lines = along(values.unflatten(1, (down, -1)), 2)
    return cut_regions(along(lines.unflatten(2, (across, -1)), 3), rows, columns).flatten(2)


def _pool_shared(regions: Tensor, cells: int, pooling: str) -> Tensor:
    """Pools [M, h, w] to [M, cells, cells] with cells that share pixels where they do not divide h, w."""
    if pooling == "mean":
        return adaptive_avg_pool2d(regions, cells)
    if pooling == "max":
        return adaptive_max_pool2d(regions, cells)
    return -adaptive_max_pool2d(-regions, cells)
