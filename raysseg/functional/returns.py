"""Returns and advantages along an episode, for any number of positions at once: n-step, GAE and V-trace.

Time is the first dimension; all others are batch, and each of their positions is an episode of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError


def generalised_advantages(rewards: Tensor, values: Tensor, *, gamma: float, trace: float) -> Tensor:
    """Computes advantages by GAE; with `trace` 1 the discounted return to the end less the value (Eq. 5).

    Args:
        rewards: float [T, ...], r_t.
        values: float [T+1, ...], V(s_t); the last one values what follows the episode.
        gamma: γ in [0, 1].
        trace: λ in [0, 1].
    Returns:
        float [T, ...], Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t); without gradient.
    Raises:
        InputError: where the shapes do not fit.
    Source: CiSS-Net, Eq. 5 (trace 1); other traces are a reconstruction.
    """
    _check(rewards, values)
    deltas = (rewards + gamma * values[1:] - values[:-1]).detach()
    advantages, running = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        running = deltas[step] + gamma * trace * running
        advantages[step] = running
    return advantages


def n_step_advantages(rewards: Tensor, values: Tensor, *, gamma: float, steps: int) -> Tensor:
    """Computes advantages from the next k rewards and the value that follows them.

    Args:
        rewards: float [T, ...], r_t.
        values: float [T+1, ...], V(s_t); the last one values what follows the episode.
        gamma: γ in [0, 1].
        steps: k, from 1 on; near the end, what is left.
    Returns:
        float [T, ...], Σ_{l<k} γ^l r_{t+l} + γ^k V(s_{t+k}) − V(s_t); without gradient.
    Raises:
        InputError: where the shapes do not fit or k is below 1.
    Source: CiSS-Net, Eq. 5.
    """
    _check(rewards, values)
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1")
    deltas = (rewards + gamma * values[1:] - values[:-1]).detach()
    # The sum telescopes: k rewards and the value after them are k differences of one step each.
    padded = torch.cat([deltas, deltas.new_zeros(steps - 1, *deltas.shape[1:])])
    factors = gamma ** torch.arange(steps, dtype=deltas.dtype, device=deltas.device)
    windows = padded.unfold(0, steps, 1)
    return (windows * factors).sum(-1)


def v_trace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    *,
    gamma: float,
    clip_ratio: float,
    clip_trace: float,
    trace: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Corrects returns for actions that another policy took.

    Args:
        rewards: float [T, ...], r_t.
        values: float [T+1, ...], V(s_t) of the policy that learns; the last one values what follows the episode.
        log_ratios: float [T, ...], log π(a_t | s_t) − log μ(a_t | s_t) of the policies that learns and that acted.
        gamma: γ in [0, 1].
        clip_ratio: ρ̄, above 0.
        clip_trace: c̄, above 0.
        trace: λ in [0, 1], a factor on every c.
    Returns:
        Targets of the values v_t and advantages ρ_t (r_t + γ v_{t+1} − V(s_t)), float [T, ...] each, without gradient; with
        ratios of 1 the targets are V(s_t) plus `generalised_advantages` of the same trace, and so are with trace 1 the advantages.
    Raises:
        InputError: where the shapes do not fit.
    Source: reconstruction (V-trace of IMPALA, applied to every pixel).
    """
    _check(rewards, values)
    if log_ratios.shape != rewards.shape:
        raise InputError(f"log_ratios is {list(log_ratios.shape)}, expected {list(rewards.shape)}")
    rewards, values, ratios = rewards.detach(), values.detach(), log_ratios.detach().exp()
    weights, traces = ratios.clamp(max=clip_ratio), trace * ratios.clamp(max=clip_trace)
    deltas = weights * (rewards + gamma * values[1:] - values[:-1])
    targets, running = torch.empty_like(values), torch.zeros_like(values[0])
    targets[-1] = values[-1]
    for step in range(len(deltas) - 1, -1, -1):
        running = deltas[step] + gamma * traces[step] * running
        targets[step] = values[step] + running
    return targets[:-1], weights * (rewards + gamma * targets[1:] - values[:-1])


def _check(rewards: Tensor, values: Tensor) -> None:
    if rewards.ndim < 1 or not len(rewards) or values.shape != (len(rewards) + 1, *rewards.shape[1:]):
        raise InputError(
            f"rewards is {list(rewards.shape)} and values {list(values.shape)}, expected [T, ...] and [T+1, ...]"
        )
