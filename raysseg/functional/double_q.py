"""Double Q-learning: returns of several steps, targets in the standard form and in the paper's wording, and the loss (RALIS,
Eq. 2 and 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss, pad

from raysseg.errors import InputError

Rule = Literal["standard", "paper"]
Loss = Literal["squared", "huber"]


def discounted_sums(rewards: Tensor, count: int, gamma: float) -> Tensor:
    """Sums, from every step on, the next rewards: Σ_i γ^i r_{t+i} over i < `count`, as far as the episode goes.

    Args:
        rewards: float [..., T], of whole episodes.
        count: of steps, at least 1; with 1 they are the rewards themselves.
        gamma: γ in [0, 1].
    Returns:
        float [..., T].
    Source: reconstruction; the returns of n-step Q-learning.
    """
    windows = pad(rewards, (0, count - 1)).unfold(-1, count, 1)
    return windows @ (gamma ** torch.arange(count, dtype=rewards.dtype, device=rewards.device))


def double_q_targets(
    rewards: Tensor, terminated: Tensor, online_next: Tensor, target_next: Tensor, *, gamma: float, rule: Rule
) -> Tensor:
    """Computes y = r + γ Q(s', a*), where one network chooses a* and the other one values it.

    Args:
        rewards: float [B], r.
        terminated: bool [B]; True: nothing follows, the target is r alone, whatever the next values are.
        online_next: float [B, N], the query network's values of the N candidates at the next state.
        target_next: float [B, N], the target network's.
        gamma: γ in [0, 1].
        rule: `standard`: chosen by the query network, valued by the target network; `paper`: the reverse.
    Returns:
        float [B], carrying no gradient. Of candidates with one value the first is chosen.
    Raises:
        InputError: where the shapes do not fit, there is no candidate, or for another rule.
    Source: RALIS, Eq. 3 as printed is `paper`; `standard` is the authors' code; the terminal case is a reconstruction.
    """
    if rewards.ndim != 1 or terminated.shape != rewards.shape:
        raise InputError(
            f"rewards is {list(rewards.shape)} and terminated {list(terminated.shape)}, expected [B] twice"
        )
    if online_next.shape != target_next.shape or online_next.shape[:1] != rewards.shape or online_next.ndim != 2:
        raise InputError(
            f"online_next is {list(online_next.shape)} and target_next {list(target_next.shape)}, "
            f"expected [{rewards.shape[0]}, N] twice"
        )
    if not online_next.shape[1]:
        raise InputError("online_next has no candidate, expected [B, N] with at least one")
    if rule == "standard":
        chooser, judge = online_next, target_next
    elif rule == "paper":
        chooser, judge = target_next, online_next
    else:
        raise InputError(f"rule is {rule!r}, expected 'standard' or 'paper'")
    following = judge.gather(1, chooser.argmax(dim=1, keepdim=True)).squeeze(1)
    return rewards.where(terminated, rewards + gamma * following).detach()


def q_loss(values: Tensor, targets: Tensor, weights: Tensor | None = None, *, kind: Loss) -> Tensor:
    """Computes the mean over the batch of w ℓ(y − Q); the gradient reaches Q alone.

    Args:
        values: float [B], Q of the chosen candidates.
        targets: float [B], y of `double_q_targets`.
        weights: float [B], w of each transition where they were not drawn uniformly; None: 1.
        kind: `squared`: ℓ(x) = x²; `huber`: x² / 2 up to |x| = 1, |x| − 1/2 beyond.
    Returns:
        float scalar [], the sum over B divided by B.
    Raises:
        InputError: where the shapes differ, the batch is empty, or for another kind.
    Source: RALIS, Eq. 2; `huber` is the authors' code; the weights are those of prioritised experience replay.
    """
    # [B, 1] against [B] would broadcast to [B, B] and still train.
    for name, other in (("targets", targets), ("weights", weights)):
        if other is not None and other.shape != values.shape:
            raise InputError(f"{name} is {list(other.shape)}, expected {list(values.shape)} as values")
    if values.ndim != 1 or not values.shape[0]:
        raise InputError(f"values is {list(values.shape)}, expected [B] with at least one transition")
    if kind == "squared":
        losses = mse_loss(values, targets.detach(), reduction="none")
    elif kind == "huber":
        losses = huber_loss(values, targets.detach(), reduction="none")
    else:
        raise InputError(f"kind is {kind!r}, expected 'squared' or 'huber'")
    return (losses if weights is None else weights * losses).mean()
