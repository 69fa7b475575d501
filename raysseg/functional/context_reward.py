"""What a context was worth: the per-pixel reward of a whole episode (CiSS-Net, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.box_mean import box_mean
from raysseg.functional.constants import PADDING

GAINED, LOST, KEPT = 1.0, -1.0, 0.5
"""M of Eq. 4: wrong before and right after, right before and wrong after, right both times; wrong both times is 0."""


def improvement(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Scores the change of every prediction: 1 wrong to right, −1 right to wrong, 0.5 right to right, 0 wrong to wrong.

    Args:
        before: uint8 [..., H, W], predicted classes Y^t.
        after: uint8 [..., H, W], Y^{t+1}.
        labels: uint8 [..., H, W], L, or a shape that broadcasts to it.
    Returns:
        float32 [..., H, W], M; nothing says which labels are void.
    Source: CiSS-Net, Eq. 4 (M).
    """
    right_before, right_after = before == labels, after == labels
    score = torch.where(right_before, KEPT, GAINED)
    return torch.where(right_after, score, torch.where(right_before, LOST, 0.0))


def context_rewards(
    predictions: Tensor,
    actions: Tensor,
    labels: Tensor,
    *,
    box: tuple[int, int],
    correct_weight: float,
    uncertain_weight: float,
) -> Tensor:
    """Computes the rewards of all steps of some episodes.

    Args:
        predictions: uint8 [T+1, B, H, W], Y^0 … Y^T.
        actions: bool [T, B, H, W], B^0 … B^{T−1}: whether the prediction becomes context.
        labels: uint8 [B, H, W], L; 254 and 255 are void.
        box: (C_h, C_w) in positions, odd.
        correct_weight: β1, for a context that is the truth.
        uncertain_weight: β2, for a position that is left uncertain.
    Returns:
        float32 [T, B, H, W]; 0 at void positions, which no box counts either.
    Raises:
        InputError: where shapes or the box do not fit.
    Source: CiSS-Net, Eq. 4; that void counts nowhere is a reconstruction.
    """
    steps = actions.shape[0]
    if predictions.ndim != 4 or predictions.shape[0] != steps + 1 or predictions.shape[1:] != actions.shape[1:]:
        raise InputError(
            f"predictions is {list(predictions.shape)} and actions {list(actions.shape)}, "
            "expected [T+1, B, H, W] and [T, B, H, W]"
        )
    if labels.shape != actions.shape[1:]:
        raise InputError(f"labels is {list(labels.shape)}, expected {list(actions.shape[1:])}")
    valid = (labels < PADDING).expand(actions.shape)
    gains = box_mean(improvement(predictions[:-1], predictions[1:], labels), valid, box)
    correct = actions & (predictions[:-1] == labels)
    rewards = gains + correct_weight * correct + uncertain_weight * ~actions
    return rewards.masked_fill(~valid, 0.0)
