"""The state (F, P, M) as input planes of the operators, the searcher and the assessor (EIL)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED
from raysseg.functional.counting import count_indices
from raysseg.functional.reward import cell_counts, cell_index


def plane_count(feature_channels: int, num_classes: int) -> int:
    """Counts the planes of [B, D+K+K+1, h, w] that `operator_planes` gives.

    Args:
        feature_channels: D.
        num_classes: K, 1…253.
    Returns:
        D + K + (K + 1): features, probabilities, labels with an unlabelled plane.
    Source: EIL, implementation details (reconstruction): 299 for 256 channels and VOC's 21 classes.
    """
    return feature_channels + 2 * num_classes + 1


def operator_planes(features: Tensor, probabilities: Tensor, labels: Tensor) -> Tensor:
    """Concatenates the state's planes at the resolution of the features: F, the mean of P, the shares of M's classes.

    Args:
        features: float [B, D, h, w], F.
        probabilities: float [B, K, H, W] in [0, 1], P; K ≤ 253.
        labels: uint8 [B, H, W], M; padding (254) is in no plane.
    Returns:
        [B, D+K+K+1, h, w] of the features' dtype: F as it is; P averaged over each cell (where H, W are no multiples of
        h, w neighbouring cells share a row or column of pixels, as in adaptive pooling); the share of the cell's pixels
        that carry class 0…K−1, then the share that is unlabelled, in [0, 1], 1 in sum where nothing is padding.
    Raises:
        InputError: where the shapes do not fit, or h, w exceed H, W.
    Source: EIL, state s = (F, P, M) (reconstruction: concatenated, averaged to stride 4).
    """
    batch, _, h, w = features.shape
    num_classes = probabilities.shape[1]
    if probabilities.shape != (batch, num_classes, *labels.shape[1:]) or labels.shape[0] != batch:
        raise InputError(
            f"features is {list(features.shape)}, probabilities {list(probabilities.shape)}, "
            f"labels is {list(labels.shape)}, expected [B, D, h, w], [B, K, H, W], [B, H, W]"
        )
    # Unlabelled becomes class K of K + 1, so that one count serves all planes; other values from K on stay out.
    unlabelled = (labels == UNLABELLED).view(torch.uint8)
    counts = cell_counts(labels - unlabelled * (UNLABELLED - num_classes), num_classes + 1, (h, w))
    rows, columns = (
        count_indices(cell_index(side, cells, labels.device), cells)
        for side, cells in zip(labels.shape[1:], (h, w), strict=True)
    )
    shares = counts / (rows[:, None] * columns)
    averages = _cell_means(probabilities, (h, w))
    return torch.cat((features, averages.to(features.dtype), shares.to(features.dtype)), dim=1)


def _cell_means(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages [B, C, H, W] over each cell, [B, C, h, w]."""
    height, width = values.shape[2:]
    if height % size[0] or width % size[1]:
        return adaptive_avg_pool2d(values, size)
    # Whole strips are added four times as fast on a CPU as its pooling walks from cell to cell.
    down, across = height // size[0], width // size[1]
    rows = functools.reduce(torch.add, (values[:, :, offset::down] for offset in range(down)))
    cells = functools.reduce(torch.add, (rows[..., offset::across] for offset in range(across)))
    return cells / (down * across)
