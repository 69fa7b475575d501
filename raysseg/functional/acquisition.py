"""Scores of the acquisition functions that a learned policy is measured against: margin, BALD, core-set (RALIS, Sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysseg.errors import InputError, NonFiniteError
from raysseg.functional.regions import entropy_map

_DISTANCES_AT_ONCE = 1 << 24


@torch.no_grad()
def margin_map(probabilities: Tensor) -> Tensor:
    """Computes how little the most likely class of a pixel leads: 1 − (p₁ − p₂).

    Args:
        probabilities: float [B, C, H, W] in [0, 1], 1 in sum over C.
    Returns:
        float32 [B, H, W] in [0, 1], 1 where two classes are equally likely; p₂ is 0 where there is one class alone.
        Carries no gradient.
    Raises:
        InputError: for another shape.
    Source: reconstruction (margin sampling, Scheffer et al. 2001; a baseline that the paper does not have).
    """
    if probabilities.ndim != 4:
        raise InputError(f"probabilities is {list(probabilities.shape)}, expected [B, C, H, W]")
    first = probabilities.new_zeros(probabilities[:, 0].shape, dtype=torch.float32)
    second = torch.zeros_like(first)
    # A running pair of the two largest: sorting every pixel's classes takes many times as long.
    for plane in probabilities.unbind(1):
        share = plane.float()
        torch.maximum(second, torch.minimum(first, share), out=second)
        torch.maximum(first, share, out=first)
    return second.sub_(first).add_(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaldSums:
    """What BALD keeps of the passes with dropout so far, whatever their number."""

    probabilities: Tensor
    """float32 [B, C, H, W], the sum of the passes' probabilities."""
    entropies: Tensor
    """float32 [B, H, W], the sum of the passes' entropies in nats."""
    passes: int
    """How many passes were added."""


@torch.no_grad()
def add_bald_pass(sums: BaldSums | None, probabilities: Tensor) -> BaldSums:
    """Adds one pass with dropout to the sums.

    Args:
        sums: of the passes before, whose tensors are changed in place; None: this is the first.
        probabilities: float [B, C, H, W] in [0, 1], 1 in sum over C, of this pass.
    Returns:
        BaldSums with this pass; use these alone from now on.
    Raises:
        InputError: for another shape than before.
    Source: RALIS, Sec. 4.1, baseline B (sums instead of all passes: reconstruction).
    """
    if sums is None:
        entropies = entropy_map(probabilities)
        return BaldSums(probabilities=probabilities.detach().float().clone(), entropies=entropies, passes=1)
    if probabilities.shape != sums.probabilities.shape:
        raise InputError(
            f"probabilities is {list(probabilities.shape)}, expected {list(sums.probabilities.shape)} as in the passes before"
        )
    return BaldSums(
        probabilities=sums.probabilities.add_(probabilities),
        entropies=sums.entropies.add_(entropy_map(probabilities)),
        passes=sums.passes + 1,
    )


def bald_map(sums: BaldSums) -> Tensor:
    """Computes what the passes with dropout disagree on: the entropy of their mean less the mean of their entropies.

    Args:
        sums: of `add_bald_pass`, T passes.
    Returns:
        float32 [B, H, W] in nats, 0…ln C; 0 after a single pass. Carries no gradient.
    Source: RALIS, Sec. 4.1, baseline B (BALD; T = 20 and the mean over a region: the authors' code).
    """
    mutual = entropy_map(sums.probabilities / sums.passes) - sums.entropies / sums.passes
    return mutual.clamp_min_(0)


@torch.no_grad()
def follow_direction(points: Tensor, direction: Tensor) -> Tensor:
    """Finds, in every pool, the candidate that lies farthest along one direction.

    Every number is centred and scaled over all candidates first, so that a direction means the same for all of them.

    Args:
        points: float [K, N, G], what is known of the candidates.
        direction: float [G].
    Returns:
        int64 [K], positions within each pool; the first of equals.
    Source: reconstruction.
    """
    flat = points.flatten(0, 1)
    scaled = (points - flat.mean(0)) / flat.std(0, correction=0).clamp(min=1e-6)
    return (scaled @ direction).argmax(1)


def greedy_cover(points: Tensor, covered: Tensor, pools: Tensor) -> Tensor:
    """Chooses, pool by pool, the candidate that is farthest from everything covered; it is covered from then on.

    Args:
        points: float [M, D], the candidates' features.
        covered: float [L, D], features of what is labelled already; L may be 0.
        pools: int64 [K, N], the numbers 0…M−1 of the candidates in each pool.
    Returns:
        int64 [K], each choice's position 0…N−1 within its pool; of equally far ones the first, as where nothing is
        covered yet.
    Raises:
        InputError: where the shapes do not fit, a pool is empty or names a point that does not exist.
        NonFiniteError: where points or covered is not finite.
    Source: reconstruction (k-centre greedy of Sener and Savarese 2018 in the pools of RALIS, Sec. 3.1).
    """
    if points.ndim != 2 or covered.ndim != 2 or points.shape[1] != covered.shape[1]:
        raise InputError(
            f"points is {list(points.shape)} and covered {list(covered.shape)}, expected [M, D] and [L, D]"
        )
    if pools.ndim != 2 or pools.dtype != torch.int64 or not pools.shape[1]:
        raise InputError(
            f"pools is {pools.dtype} {list(pools.shape)}, expected int64 [K, N] with at least one candidate"
        )
    if pools.numel() and not (pools.min() >= 0 and pools.max() < points.shape[0]):
        raise InputError(
            f"pools names the points {pools.min()} to {pools.max()}, expected 0 to {points.shape[0] - 1} of {points.shape[0]}"
        )
    for name, values in (("points", points), ("covered", covered)):
        if not values.isfinite().all():
            raise NonFiniteError(f"{name} {list(values.shape)} is not finite, expected features of regions")
    candidates = points.float()[pools]
    nearest = _nearest(candidates.flatten(0, 1), covered.float()).view(pools.shape)
    chosen = torch.zeros(pools.shape[0], dtype=torch.int64, device=points.device)
    # One pool after the other: what a pool offers depends on all choices before it.
    for pool in range(pools.shape[0]):
        chosen[pool] = nearest[pool].argmax()
        newest = candidates[pool].index_select(0, chosen[pool : pool + 1])
        later = candidates[pool + 1 :].flatten(0, 1)
        distances = torch.cdist(later, newest, compute_mode="donot_use_mm_for_euclid_dist")
        nearest[pool + 1 :] = torch.minimum(nearest[pool + 1 :], distances.view(-1, pools.shape[1]))
    return chosen


def _nearest(points: Tensor, covered: Tensor) -> Tensor:
    """The distance of each point [M, D] to the nearest of [L, D], [M]; infinite where there is none."""
    nearest = torch.full_like(points[:, 0], torch.inf)
    at_once = max(1, _DISTANCES_AT_ONCE // max(1, points.shape[0]))
    for first in range(0, covered.shape[0], at_once):
        part = covered[first : first + at_once]
        distances = torch.cdist(points, part, compute_mode="use_mm_for_euclid_dist")
        nearest = torch.minimum(nearest, distances.amin(dim=1))
    return nearest
