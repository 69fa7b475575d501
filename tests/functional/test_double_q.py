"""Double Q-learning against loops, numbers worked out by hand, and where the gradient goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import discounted_sums, double_q_targets, q_loss


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 6),
    number=st.integers(1, 5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    rule=st.sampled_from(["standard", "paper"]),
)
def test_targets_match_a_loop(seed: int, batch: int, number: int, gamma: float, rule: Any) -> None:
    generator = np.random.default_rng(seed)
    # Few different values, so that candidates often tie.
    online, target = (generator.integers(0, 3, (batch, number)).astype(np.float32) for _ in range(2))
    rewards, terminated = generator.normal(size=batch).astype(np.float32), generator.random(batch) < 0.3
    found = double_q_targets(
        torch.tensor(rewards),
        torch.tensor(terminated),
        torch.tensor(online),
        torch.tensor(target),
        gamma=gamma,
        rule=rule,
    )
    expected = []
    for b in range(batch):
        chooser, judge = (online[b], target[b]) if rule == "standard" else (target[b], online[b])
        best = chooser.tolist().index(max(chooser.tolist()))
        expected.append(rewards[b] + (0.0 if terminated[b] else gamma * judge[best]))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 6),
    count=st.integers(1, 9),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_sums_of_rewards_match_a_loop(seed: int, steps: int, count: int, gamma: float) -> None:
    rewards = np.random.default_rng(seed).normal(size=(2, steps))
    expected = [
        [sum(gamma**i * rewards[b, t + i] for i in range(min(count, steps - t))) for t in range(steps)]
        for b in range(2)
    ]
    found = discounted_sums(torch.tensor(rewards), count, gamma)
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert discounted_sums(torch.tensor(rewards), 1, gamma).tolist() == rewards.tolist()


def test_the_two_rules_by_hand() -> None:
    online = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]], requires_grad=True)
    target = torch.tensor([[7.0, 3.0, 4.0], [torch.nan, torch.nan, torch.nan]])
    rewards, terminated = torch.tensor([10.0, 20.0]), torch.tensor([False, True])
    standard = double_q_targets(rewards, terminated, online, target, gamma=0.5, rule="standard")
    assert standard.tolist() == [11.5, 20.0]
    paper = double_q_targets(rewards, terminated, online, target, gamma=0.5, rule="paper")
    assert paper.tolist() == [10.5, 20.0]
    assert not paper.requires_grad


def test_losses_by_hand() -> None:
    values, targets = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.5, -1.0, 1.0])
    weights = torch.tensor([2.0, 0.5, 0.0])
    assert q_loss(values, targets, kind="squared").item() == pytest.approx((0.25 + 9 + 1) / 3)
    assert q_loss(values, targets, weights, kind="squared").item() == pytest.approx((0.5 + 4.5) / 3)
    assert q_loss(values, targets, kind="huber").item() == pytest.approx((0.125 + 2.5 + 0.5) / 3)
    assert q_loss(values, targets, weights, kind="huber").item() == pytest.approx((0.25 + 1.25) / 3)


@pytest.mark.parametrize(("kind", "slopes"), [("squared", [-1.0, 6.0]), ("huber", [-0.5, 1.0])])
def test_the_gradient_reaches_the_values_alone(kind: Any, slopes: list[float]) -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    targets = torch.tensor([1.5, -1.0], requires_grad=True)
    q_loss(values, targets, kind=kind).backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([slope / 2 for slope in slopes])
    assert targets.grad is None


def test_bad_input_is_refused() -> None:
    values, next_values, ends = torch.ones(3), torch.ones(3, 2), torch.zeros(3, dtype=torch.bool)
    wrong: Any = "reverse"
    with pytest.raises(InputError, match=r"rewards is \[3\] and terminated \[1\]"):
        double_q_targets(values, ends[:1], next_values, next_values, gamma=1.0, rule="standard")
    with pytest.raises(InputError, match=r"target_next \[3, 1\], expected \[3, N\] twice"):
        double_q_targets(values, ends, next_values, next_values[:, :1], gamma=1.0, rule="standard")
    with pytest.raises(InputError, match=r"online_next is \[2, 2\]"):
        double_q_targets(values, ends, next_values[:2], next_values[:2], gamma=1.0, rule="standard")
    with pytest.raises(InputError, match="no candidate"):
        double_q_targets(values, ends, next_values[:, :0], next_values[:, :0], gamma=1.0, rule="standard")
    with pytest.raises(InputError, match="rule is 'reverse'"):
        double_q_targets(values, ends, next_values, next_values, gamma=1.0, rule=wrong)
    with pytest.raises(InputError, match=r"targets is \[3, 1\], expected \[3\] as values"):
        q_loss(values, values[:, None], kind="squared")
    with pytest.raises(InputError, match=r"weights is \[1\], expected \[3\] as values"):
        q_loss(values, values, values[:1], kind="squared")
    with pytest.raises(InputError, match=r"values is \[0\]"):
        q_loss(values[:0], values[:0], kind="huber")
    with pytest.raises(InputError, match="kind is 'reverse'"):
        q_loss(values, values, kind=wrong)
