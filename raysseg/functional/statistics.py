"""What is watched while a run goes on: how well values track rewards, and how right the inferred labels are."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.counting import count_indices


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Computes the linear (Pearson) correlation of two series.

    Args:
        x: float [N].
        y: float [N].
    Returns:
        float64 scalar [] in [−1, 1]; NaN where it is undefined: fewer than two values, or one of the series constant.
    Raises:
        InputError: where x and y are not both [N].
    Source: reconstruction (a diagnostic of ours: corr(q, r)).
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"x is {list(x.shape)} and y {list(y.shape)}, expected [N] and [N]")
    # The mean of equal values can be a rounding error away from them; the range tells a constant series exactly.
    x, y = x.double(), y.double()
    if x.shape[0] < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    constant = (x.amax() == x.amin()) | (y.amax() == y.amin())
    x, y = x - x.mean(), y - y.mean()
    value = (x @ y) / (x.norm() * y.norm())
    return torch.where(constant, torch.nan, value.clamp(-1.0, 1.0))


def label_precision(labels: Tensor, scribbles: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Counts, per image and class, the inferred labels and those of them that the truth confirms.

    Args:
        labels: uint8 [B, H, W], M.
        scribbles: uint8 [B, H, W], Y; what a person gave is not inferred and not counted.
        truth: uint8 [B, H, W]; pixels without a true class (254, 255) are not counted.
        num_classes: K, 1…254.
    Returns:
        correct int64 [B, K] and total int64 [B, K], by the class of the label; their quotient is the precision.
    Raises:
        InputError: where the three shapes differ.
    Source: reconstruction (a diagnostic of ours, for analysis only).
    """
    if not labels.shape == scribbles.shape == truth.shape or labels.ndim != 3:
        raise InputError(
            f"labels is {list(labels.shape)}, scribbles {list(scribbles.shape)}, truth {list(truth.shape)}, "
            "expected [B, H, W] three times"
        )
    batch = labels.shape[0]
    counted = (labels < num_classes) & (scribbles == UNLABELLED) & (truth < PADDING)
    planes = 2 * num_classes + 1
    # One count of 2K + 1 planes: wrong labels by class, right labels by class, and whatever does not count.
    index = torch.where(counted, labels.long() + num_classes * (labels == truth), 2 * num_classes)
    index += torch.arange(0, batch * planes, planes, device=labels.device).view(batch, 1, 1)
    counts = count_indices(index.flatten(), batch * planes).view(batch, planes)
    correct = counts[:, num_classes : 2 * num_classes]
    return correct, correct + counts[:, :num_classes]
