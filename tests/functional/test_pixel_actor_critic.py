"""Returns, V-trace and the losses of a policy over pixels: against loops, RLlib, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.algorithms.impala.torch.vtrace_torch_v2 import vtrace_torch

from raysseg.errors import InputError
from raysseg.functional import (
    action_entropy,
    action_log_probabilities,
    actor_critic_losses,
    generalised_advantages,
    n_step_advantages,
    v_trace,
)

GAMMAS = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 5), gamma=GAMMAS, trace=st.sampled_from([0.0, 0.5, 1.0]))
def test_advantages_match_a_loop(seed: int, steps: int, gamma: float, trace: float) -> None:
    source = np.random.default_rng(seed)
    rewards, values = source.normal(size=(steps, 2, 3)), source.normal(size=(steps + 1, 2, 3))
    deltas = rewards + gamma * values[1:] - values[:-1]
    expected = [sum((gamma * trace) ** k * deltas[t + k] for k in range(steps - t)) for t in range(steps)]
    found = generalised_advantages(torch.tensor(rewards), torch.tensor(values), gamma=gamma, trace=trace)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_with_a_full_trace_they_are_the_return_to_the_end_less_the_value() -> None:
    rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25, 4.0], requires_grad=True)
    found = generalised_advantages(rewards, values, gamma=0.5, trace=1.0)
    assert found.tolist() == [1.0 + 0.5 * 2.0 + 0.25 * 4.0 - 0.5, 2.0 + 0.5 * 4.0 - 0.25]
    assert not found.requires_grad


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 5), gamma=GAMMAS, steps=st.integers(1, 7))
def test_n_step_advantages_match_a_loop(seed: int, length: int, gamma: float, steps: int) -> None:
    source = np.random.default_rng(seed)
    rewards, values = source.normal(size=(length, 2, 3)), source.normal(size=(length + 1, 2, 3))
    expected = np.zeros_like(rewards)
    for step in range(length):
        k = min(steps, length - step)
        for ahead in range(k):
            expected[step] += gamma**ahead * rewards[step + ahead]
        expected[step] += gamma**k * values[step + k] - values[step]
    found = n_step_advantages(torch.tensor(rewards), torch.tensor(values), gamma=gamma, steps=steps)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_n_step_advantages_by_hand() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 8.0, 16.0], requires_grad=True)
    found = n_step_advantages(rewards, values, gamma=0.5, steps=2)
    assert found.tolist() == [
        1.0 + 0.5 * 2.0 + 0.25 * 8.0 - 0.5,
        2.0 + 0.5 * 4.0 + 0.25 * 16.0 - 0.25,
        4.0 + 0.5 * 16.0 - 8.0,
    ]
    assert not found.requires_grad


@pytest.mark.parametrize(("steps", "trace"), [(1, 0.0), (4, 1.0), (9, 1.0)])
def test_one_step_and_all_steps_are_generalised_advantages(steps: int, trace: float) -> None:
    source = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 2, 3, generator=source, dtype=torch.float64)
    values = torch.randn(5, 2, 3, generator=source, dtype=torch.float64)
    found = n_step_advantages(rewards, values, gamma=0.9, steps=steps)
    torch.testing.assert_close(found, generalised_advantages(rewards, values, gamma=0.9, trace=trace))
    other = generalised_advantages(rewards, values, gamma=0.9, trace=1.0 - trace)
    assert not torch.allclose(found, other), "the two ends of the trace must differ for this test to say anything"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 5), gamma=GAMMAS, clip=st.sampled_from([0.5, 1.0, 3.0]))
def test_v_trace_is_that_of_rllib(seed: int, steps: int, gamma: float, clip: float) -> None:
    source = torch.Generator().manual_seed(seed)
    rewards, target, behaviour = torch.randn(3, steps, 4, generator=source)
    values = torch.randn(steps + 1, 4, generator=source)
    theirs = vtrace_torch(
        target_action_log_probs=target,
        behaviour_action_log_probs=behaviour,
        discounts=torch.full_like(rewards, gamma),
        rewards=rewards,
        values=values[:-1],
        bootstrap_values=values[-1],
        clip_rho_threshold=torch.tensor(clip),
        clip_pg_rho_threshold=torch.tensor(clip),
    )
    ours = v_trace(rewards, values, target - behaviour, gamma=gamma, clip_ratio=clip, clip_trace=1.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_on_policy_v_trace_is_the_plain_return() -> None:
    rewards, values = torch.randn(4, 2, 3), torch.randn(5, 2, 3)
    targets, advantages = v_trace(rewards, values, torch.zeros(4, 2, 3), gamma=0.9, clip_ratio=1.0, clip_trace=1.0)
    plain = generalised_advantages(rewards, values, gamma=0.9, trace=1.0)
    torch.testing.assert_close(advantages, plain)
    torch.testing.assert_close(targets, plain + values[:-1])


@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_a_trace_cuts_on_policy_targets_as_gae_does(trace: float) -> None:
    source = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, 2, 3, generator=source, dtype=torch.float64)
    values = torch.randn(5, 2, 3, generator=source, dtype=torch.float64)
    options = {"gamma": 0.9, "clip_ratio": 1.0, "clip_trace": 1.0, "trace": trace}
    targets, advantages = v_trace(rewards, values, torch.zeros_like(rewards), **options)
    plain = generalised_advantages(rewards, values, gamma=0.9, trace=trace)
    torch.testing.assert_close(targets, plain + values[:-1])
    following = torch.cat([plain[1:], torch.zeros_like(plain[:1])])
    torch.testing.assert_close(advantages, rewards + 0.9 * values[1:] - values[:-1] + 0.9 * following)
    assert torch.allclose(advantages, plain) == (trace == 1.0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 4), trace=st.sampled_from([0.0, 0.5, 1.0]))
def test_v_trace_with_a_trace_matches_the_sum_of_its_definition(seed: int, steps: int, trace: float) -> None:
    source = np.random.default_rng(seed)
    rewards, logs, values = (source.normal(size=(count, 3)) for count in (steps, steps, steps + 1))
    gamma, ratios = 0.8, np.exp(logs)
    weights, traces = np.minimum(ratios, 0.9), trace * np.minimum(ratios, 1.1)
    expected = values.copy()
    for step in range(steps):
        for ahead in range(steps - step):
            delta = rewards[step + ahead] + gamma * values[step + ahead + 1] - values[step + ahead]
            product = np.prod(traces[step : step + ahead], axis=0)
            expected[step] += gamma**ahead * product * weights[step + ahead] * delta
    found, advantages = v_trace(
        *map(torch.tensor, (rewards, values, logs)), gamma=gamma, clip_ratio=0.9, clip_trace=1.1, trace=trace
    )
    np.testing.assert_allclose(found, expected[:-1], atol=1e-12)
    np.testing.assert_allclose(advantages, weights * (rewards + gamma * expected[1:] - values[:-1]), atol=1e-12)


def test_probabilities_and_entropies_by_hand() -> None:
    logits = torch.tensor([[[[0.0, math.log(3.0)]], [[0.0, 0.0]]]])
    actions = torch.tensor([[[True, False]]])
    assert action_log_probabilities(logits, actions).exp().flatten().tolist() == pytest.approx([0.5, 0.75])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert action_entropy(logits).flatten().tolist() == pytest.approx([math.log(2.0), entropy])


def test_losses_are_means_over_valid_positions_of_all_steps() -> None:
    shape, source = (2, 1, 2, 2), torch.Generator().manual_seed(0)
    terms = [torch.randn(shape, generator=source) for _ in range(5)]
    for term in terms:
        term[:, 0, 1, 1] = 1e6
    logs, advantages, values, targets, entropy = (term.requires_grad_() for term in terms)
    valid = torch.tensor([[[True, True], [True, False]]])
    losses = actor_critic_losses(logs, advantages, values, targets, entropy, valid)
    kept = [term.detach()[:, valid].double() for term in terms]
    expected = [-(kept[0] * kept[1]).mean(), (kept[3] - kept[2]).square().mean(), -kept[4].mean()]
    assert [loss.item() for loss in losses] == pytest.approx([value.item() for value in expected], rel=1e-5)
    sum(losses).backward()
    assert advantages.grad is None
    assert targets.grad is None
    for term in (logs, values, entropy):
        assert term.grad is not None
        assert (term.grad[:, valid] != 0).all()
        assert not term.grad[:, ~valid].any(), "void positions teach nothing"


def test_without_a_valid_position_the_losses_are_zero() -> None:
    zeros = torch.zeros(1, 1, 2, 2)
    losses = actor_critic_losses(zeros + 1, zeros + 1, zeros + 1, zeros, zeros + 1, torch.zeros(1, 2, 2).bool())
    assert [loss.item() for loss in losses] == [0.0, 0.0, 0.0]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"expected \[T, \.\.\.\] and \[T\+1, \.\.\.\]"):
        generalised_advantages(torch.zeros(2), torch.zeros(2), gamma=0.9, trace=1.0)
    with pytest.raises(InputError, match="steps is 0, expected at least 1"):
        n_step_advantages(torch.zeros(2), torch.zeros(3), gamma=0.9, steps=0)
    with pytest.raises(InputError, match=r"expected \[T, \.\.\.\] and \[T\+1, \.\.\.\]"):
        n_step_advantages(torch.zeros(2), torch.zeros(4), gamma=0.9, steps=1)
    with pytest.raises(InputError, match="log_ratios is"):
        v_trace(torch.zeros(2), torch.zeros(3), torch.zeros(3), gamma=0.9, clip_ratio=1.0, clip_trace=1.0)
    with pytest.raises(InputError, match="logits is"):
        action_log_probabilities(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    four = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="values is"):
        actor_critic_losses(four, four, four[0], four, four, four[0].bool())
