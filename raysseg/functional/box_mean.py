"""The mean over a box around every position that leaves out what lies beyond the border or does not count."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d

from raysseg.errors import InputError


def box_mean(values: Tensor, valid: Tensor, box: tuple[int, int]) -> Tensor:
    """Computes the mean of the valid positions in the box around each position.

    Args:
        values: float [..., H, W]; what stands at positions that are not valid is not looked at.
        valid: bool [..., H, W].
        box: (C_h, C_w), odd numbers of positions, at most 2 H − 1 and 2 W − 1: beyond that a box holds nothing more.
    Returns:
        Float [..., H, W] in the dtype of `values`; 0 where no position of the box is valid.
    Raises:
        InputError: where the shapes differ or the box is even, empty or larger than that.
    Source: CiSS-Net, Eq. 4 (its first term).
    """
    if values.shape != valid.shape or values.ndim < 3:
        raise InputError(f"values is {list(values.shape)} and valid {list(valid.shape)}, expected [..., H, W] twice")
    for name, side, length in zip(("C_h", "C_w"), box, values.shape[-2:], strict=True):
        if side % 2 == 0 or not 1 <= side <= 2 * length - 1:
            raise InputError(f"{name} is {side}, expected an odd number from 1 to {2 * length - 1} in maps of {length}")
    counted = valid.to(values.dtype)
    sums = _box_sum(values.masked_fill(~valid, 0.0), box)
    # Where nothing counts the sum is 0 as well.
    return sums / _box_sum(counted, box).clamp(min=1.0)


def _box_sum(values: Tensor, box: tuple[int, int]) -> Tensor:
    """Sums over boxes, first over columns and then over rows."""
    planes = values.reshape(-1, 1, *values.shape[-2:])
    for kernel in ((box[0], 1), (1, box[1])):
        padding = (kernel[0] // 2, kernel[1] // 2)
        planes = avg_pool2d(planes, kernel, stride=1, padding=padding, divisor_override=1)
    return planes.reshape(values.shape)
