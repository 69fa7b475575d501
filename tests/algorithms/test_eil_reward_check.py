"""The table that comes before training with a reward: correlations by hand, and rewards that are those of an episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import Bench

from raysseg.algorithms.eil.reward_check import CONSTANTS, Played, RewardRow, play
from raysseg.algorithms.eil.rewards import REWARDS, Transition
from raysseg.functional import PADDING, UNLABELLED, uniform
from raysseg.functional.random import mix

IMAGES, DRAWN = 5, 6
A = len(CONSTANTS) + DRAWN


def played(**rewards: np.ndarray) -> tuple[Played, np.ndarray]:
    """Returns a record of random gains, and the gains."""
    draw = np.random.default_rng(0)
    gain = draw.normal(size=(IMAGES, A))
    return (
        Played(
            rewards=dict(rewards) or {"gain": gain, "against": -gain},
            truths={key: np.array([1.0, 1, -1, 1, 1]) for key in rewards or ("gain", "against")},
            gain=gain,
            balanced=2 * gain + 1,
            share=np.abs(gain),
        ),
        gain,
    )


def test_a_reward_that_is_the_gain_follows_it_and_one_against_it_does_not() -> None:
    record, gain = played()
    same, against, ceiling = record.rows()
    assert (same.within, same.between, same.within_balanced, same.between_balanced) == pytest.approx((1, 1, 1, 1))
    assert (against.within, against.between) == pytest.approx((-1, -1))
    best = gain.max(1)
    assert (best > 0).all()
    assert same.greedy_gain == pytest.approx(best.mean())
    assert against.greedy_gain == pytest.approx(gain.min(1).mean())
    assert (same.truth, same.truth_positive) == pytest.approx((0.6, 0.8))
    assert ceiling.reward == "true gain"
    assert ceiling.greedy_gain == same.greedy_gain


def test_correlations_are_those_of_numpy_and_a_constant_says_nothing() -> None:
    draw = np.random.default_rng(1)
    reward = draw.normal(size=(IMAGES, A))
    reward[2] = 0.25
    record, gain = played(mine=reward)
    row: RewardRow = record.rows()[0]
    n = len(CONSTANTS)
    within = [np.corrcoef(reward[i, n:], gain[i, n:])[0, 1] for i in range(IMAGES) if i != 2]
    between = [np.corrcoef(reward[:, a], gain[:, a])[0, 1] for a in range(n)]
    assert row.within == pytest.approx(np.mean(within))
    assert row.between == pytest.approx(np.mean(between))
    flat = played(mine=np.full((IMAGES, A), -1.0))[0].rows()[0]
    assert np.isnan(flat.within)
    assert (flat.greedy_gain, flat.greedy_share) == (0.0, 0.0), "where no action pays, nothing is done"


def test_what_is_played_is_paid_as_in_an_episode(bench: Callable[..., Bench]) -> None:
    one = bench(eil__virtual_steps=1)
    builder, segmenter = one.learner.builder, one.learner._segmenter_module().online.eval()
    rows, seeds = torch.tensor([1, 3, 6]), torch.tensor([11, 12, 13])
    found = play(builder, segmenter, rows, seeds, stage=1, version=0, drawn=2, rewards=tuple(REWARDS))
    with torch.no_grad():
        state = builder.observe(segmenter, rows, 0)
        truth = builder.workspace.train.labels(rows, -1)
        actions = {3: torch.full((3, 2), CONSTANTS[3]), len(CONSTANTS) + 1: uniform(mix(seeds, 1), 2)}
        for place, action in actions.items():
            labels = builder.infer(state, action, 1)
            following = builder.advance(segmenter, state, labels)
            step = Transition(builder=builder, segmenter=segmenter, state=state, following=following, seeds=seeds)
            for key, reward in REWARDS.items():
                np.testing.assert_allclose(found.rewards[key][:, place], reward(step).reward, atol=1e-6)
            new = (labels < PADDING) & (state.labels == UNLABELLED)
            np.testing.assert_allclose(found.share[:, place], new.float().mean((1, 2)), atol=1e-6)
        told = builder.infer_truth(state, truth, 1)
    changed = told != state.labels
    assert changed.any()
    assert torch.equal(told[changed], truth[changed])


def test_batches_join(bench: Callable[..., Bench]) -> None:
    one = bench()
    builder, segmenter = one.learner.builder, one.learner._segmenter_module().online.eval()
    options: dict[str, Any] = {"stage": 1, "version": 0, "drawn": 2, "rewards": ("paper",)}
    rows, seeds = torch.arange(4), torch.arange(4) + 20
    whole = play(builder, segmenter, rows, seeds, **options)
    parts = [play(builder, segmenter, rows[part], seeds[part], **options) for part in (slice(0, 1), slice(1, 4))]
    joined = Played.join(parts)
    for name in ("gain", "balanced", "share"):
        np.testing.assert_allclose(getattr(whole, name), getattr(joined, name), atol=1e-6)
    np.testing.assert_allclose(whole.rewards["paper"], joined.rewards["paper"], atol=1e-5)
