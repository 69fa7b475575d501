"""A policy with one action of two per pixel, and the losses of its actor-critic (CiSS-Net, Eq. 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from raysseg.errors import InputError


def action_log_probabilities(logits: Tensor, actions: Tensor) -> Tensor:
    """Computes log π(a | s) of the actions taken.

    Args:
        logits: float [..., 2, H, W], of the actions 0 and 1.
        actions: bool [..., H, W].
    Returns:
        float [..., H, W].
    Raises:
        InputError: where the shapes do not fit.
    Source: CiSS-Net, Eq. 6.
    """
    if logits.shape[:-3] + logits.shape[-2:] != actions.shape or logits.shape[-3] != 2:
        raise InputError(
            f"logits is {list(logits.shape)} and actions {list(actions.shape)}, expected [..., 2, H, W] and [..., H, W]"
        )
    return log_softmax(logits, -3).gather(-3, actions.unsqueeze(-3).long()).squeeze(-3)


def action_entropy(logits: Tensor) -> Tensor:
    """Computes the entropy of the policy at every position.

    Args:
        logits: float [..., 2, H, W].
    Returns:
        float [..., H, W], −Σ_a π log π in nats, 0 to log 2.
    Source: CiSS-Net, Eq. 7 (Loss_e is its negative).
    """
    logs = log_softmax(logits, -3)
    return -(logs.exp() * logs).sum(-3)


def actor_critic_losses(
    log_probabilities: Tensor, advantages: Tensor, values: Tensor, targets: Tensor, entropy: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the losses of policy, value and entropy, each a mean over all valid positions of all steps.

    Args:
        log_probabilities: float [T, B, H, W], log π(a_t | s_t).
        advantages: float [T, B, H, W], A_t; no gradient passes.
        values: float [T, B, H, W], V(s_t).
        targets: float [T, B, H, W], R_t; no gradient passes.
        entropy: float [T, B, H, W].
        valid: bool [B, H, W]; the denominator is T times their number, or 1 where there is none.
    Returns:
        Loss_p = −mean(log π A), Loss_v = mean((R − V)²), Loss_e = −mean(entropy), float scalars [].
    Raises:
        InputError: where the shapes differ.
    Source: CiSS-Net, Eq. 6 and 7; means in place of the authors' sums, and the signs, are a reconstruction.
    """
    shape = log_probabilities.shape
    others = {"advantages": advantages, "values": values, "targets": targets, "entropy": entropy}
    for name, other in others.items():
        if other.shape != shape:
            raise InputError(f"{name} is {list(other.shape)}, expected {list(shape)} as log_probabilities")
    if len(shape) != 4 or valid.shape != shape[1:]:
        raise InputError(f"valid is {list(valid.shape)}, expected {list(shape[1:])}")
    counted = valid.expand(shape)
    count = counted.sum().clamp(min=1)

    def mean(term: Tensor) -> Tensor:
        return torch.where(counted, term, 0.0).sum() / count

    policy = -mean(log_probabilities * advantages.detach())
    return policy, mean((targets.detach() - values).square()), -mean(entropy)
