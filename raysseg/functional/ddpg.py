"""Deterministic policy gradient: targets, the two losses, moving-average targets and exploration (EIL, Eq. 4 to 7)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.random import normal, uniform


def _check_same(name: str, value: Tensor, like: str, reference: Tensor) -> None:
    # [B, 1] against [B] would broadcast to [B, B] and still train.
    if value.shape != reference.shape:
        raise InputError(f"{name} is {list(value.shape)}, expected {list(reference.shape)} as {like}")


def bootstrap_target(rewards: Tensor, next_values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """Computes the assessor's target q̄ = r + γ q̄', without q̄' where the episode ended.

    Args:
        rewards: float [B], r.
        next_values: float [B], q̄' of the target networks at the next state.
        terminated: bool [B]; True: nothing follows, the target is r alone.
        gamma: γ in [0, 1] (the paper: 0.9).
    Returns:
        float [B], carrying no gradient.
    Raises:
        InputError: where the shapes differ.
    Source: EIL, Eq. 4; the terminal case is a reconstruction.
    """
    _check_same("next_values", next_values, "rewards", rewards)
    _check_same("terminated", terminated, "rewards", rewards)
    return torch.where(terminated, rewards, rewards + gamma * next_values).detach()


def assessor_loss(values: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Computes the mean over the batch of w (q̄ − q)²; the gradient reaches q alone.

    Args:
        values: float [B], q.
        targets: float [B], q̄ of `bootstrap_target`.
        weights: float [B], w of each transition where they were not drawn uniformly; None: 1.
    Returns:
        float scalar [], the sum over B divided by B.
    Raises:
        InputError: where the shapes differ.
    Source: EIL, Eq. 5; the weights are those of prioritised experience replay.
    """
    _check_same("values", values, "targets", targets)
    squares = (targets.detach() - values).square()
    if weights is None:
        return squares.mean()
    _check_same("weights", weights, "values", values)
    return (weights * squares).mean()


def searcher_loss(values: Tensor) -> Tensor:
    """Computes the mean over the batch of −q(s, g(s)); the caller holds the assessor's parameters fixed.

    Args:
        values: float [B], the assessor's values of the searcher's own actions.
    Returns:
        float scalar [], the sum over B divided by B.
    Source: EIL, Eq. 7.
    """
    return -values.mean()


@torch.no_grad()
def soft_update(target: Iterable[Tensor], source: Iterable[Tensor], kappa: float) -> None:
    """Moves target tensors towards source tensors in place: x̄ ← (1 − κ) x̄ + κ x.

    Args:
        target: tensors [...], changed in place; those that hold integers (a counter of batches) are copied over.
        source: as many tensors [...] of the same shapes, in the same order.
        kappa: κ in [0, 1]; 1 copies.
    Raises:
        InputError: where numbers, shapes or dtypes differ.
    Source: reconstruction (DDPG's target update; EIL's copy lacks the equation between Eq. 3 and 4).
    """
    targets, sources = list(target), list(source)
    if len(targets) != len(sources):
        raise InputError(f"target has {len(targets)} tensors, source has {len(sources)}, expected as many")
    for position, (t, s) in enumerate(zip(targets, sources, strict=True)):
        if t.shape != s.shape or t.dtype != s.dtype:
            raise InputError(
                f"tensor {position} is {t.dtype} {list(t.shape)} in target, {s.dtype} {list(s.shape)} in source"
            )
    moving = [(t, s) for t, s in zip(targets, sources, strict=True) if t.is_floating_point()]
    if moving:
        torch._foreach_lerp_([t for t, _ in moving], [s for _, s in moving], kappa)
    counters = [(t, s) for t, s in zip(targets, sources, strict=True) if not t.is_floating_point()]
    if counters:
        torch._foreach_copy_([t for t, _ in counters], [s for _, s in counters])


def explore(actions: Tensor, seeds: Tensor, *, noise_std: float, uniform_share: float) -> Tensor:
    """Perturbs actions for exploration: Gaussian noise, and now and then a uniformly random action instead.

    Args:
        actions: float [B, A] in [0, 1].
        seeds: int64 [B]; the same seeds give the same noise.
        noise_std: standard deviation of the noise, in units of the action.
        uniform_share: probability, per image, that its whole action is replaced by one from U[0, 1]^A.
    Returns:
        float [B, A] of the actions' dtype, clipped to [0, 1].
    Raises:
        InputError: where `seeds` is not int64 [B] of the actions' B.
    Source: reconstruction (the paper's noise is not in our copy).
    """
    if actions.ndim != 2 or seeds.shape != actions.shape[:1]:
        raise InputError(f"actions is {list(actions.shape)} and seeds {list(seeds.shape)}, expected [B, A] and [B]")
    size = actions.shape[1]
    noisy = (actions + noise_std * normal(seeds, size).to(actions.dtype)).clamp(0.0, 1.0)
    random = uniform(seeds, size, stream=1).to(actions.dtype)
    return torch.where(uniform(seeds, 1, stream=2) < uniform_share, random, noisy)
