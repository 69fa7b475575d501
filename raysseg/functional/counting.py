"""Counting, the one scatter that every statistic over pixels rests on."""

from __future__ import annotations

import torch
from torch import Tensor


def count_indices(index: Tensor, size: int, *, dtype: torch.dtype = torch.int64) -> Tensor:
    """Counts how often each integer 0…size−1 occurs, in one pass and without waiting for the device.

    Args:
        index: int64 [N], values in 0…size−1.
        size: S, the number of counters.
        dtype: of the counts; whole numbers are exact in float32 up to 2^24, so that no order of additions changes them.
    Returns:
        [S] of `dtype`.
    Source: reconstruction (torch.bincount would read its result's size back from the device; index_add_ does not).
    """
    one = torch.ones(1, dtype=dtype, device=index.device)
    return torch.zeros(size, dtype=dtype, device=index.device).index_add_(0, index, one.expand(index.shape[0]))
