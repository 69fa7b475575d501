"""DDPG's equations on numbers worked out by hand, and where their gradients go."""

from __future__ import annotations

import pytest
import torch

from raysseg.errors import InputError
from raysseg.functional import assessor_loss, bootstrap_target, explore, searcher_loss, soft_update


def test_the_target_bootstraps_except_at_the_end() -> None:
    next_values = torch.tensor([2.0, 3.0, torch.nan], requires_grad=True)
    target = bootstrap_target(torch.tensor([1.0, -1.0, 0.5]), next_values, torch.tensor([False, False, True]), 0.9)
    assert target.tolist() == pytest.approx([2.8, 1.7, 0.5])
    assert not target.requires_grad


def test_the_assessors_loss_is_a_mean_square_and_moves_values_only() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    targets = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = assessor_loss(values, targets)
    loss.backward()
    assert loss.item() == 2.5
    assert values.grad is not None
    assert values.grad.tolist() == [-2.0, 1.0]
    assert targets.grad is None


def test_the_searchers_loss_raises_the_value() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = searcher_loss(values)
    loss.backward()
    assert loss.item() == -1.5
    assert values.grad is not None
    assert values.grad.tolist() == [-0.5, -0.5]


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(InputError, match=r"values is \[3, 1\], expected \[3\] as targets"):
        assessor_loss(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(InputError, match="next_values"):
        bootstrap_target(torch.ones(3), torch.ones(3, 1), torch.ones(3, dtype=torch.bool), 0.9)
    with pytest.raises(InputError, match="terminated"):
        bootstrap_target(torch.ones(3), torch.ones(3), torch.ones(1, dtype=torch.bool), 0.9)


def test_targets_move_by_kappa_in_place() -> None:
    source = torch.nn.BatchNorm1d(3)
    target = torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        source.weight.copy_(torch.tensor([2.0, 3.0, 5.0]))
    source.num_batches_tracked += 7
    before = target.weight
    soft_update(target.state_dict().values(), source.state_dict().values(), 0.25)
    assert target.weight is before
    assert target.weight.tolist() == [1.25, 1.5, 2.0]
    assert target.num_batches_tracked.item() == 7
    assert source.weight.tolist() == [2.0, 3.0, 5.0]
    soft_update(target.parameters(), source.parameters(), 1.0)
    assert torch.equal(target.weight, source.weight)


def test_targets_of_another_shape_or_number_are_refused() -> None:
    with pytest.raises(InputError, match="tensor 1 is"):
        soft_update([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(1)], 0.5)
    with pytest.raises(InputError, match="target has 1 tensors, source has 2"):
        soft_update([torch.ones(2)], [torch.ones(2), torch.ones(2)], 0.5)


def test_exploration_adds_seeded_noise_and_replaces_whole_actions() -> None:
    seeds = torch.arange(20_000)
    actions = torch.tensor([[0.5, 0.4, 0.6]]).expand(20_000, -1)
    assert torch.equal(explore(actions, seeds, noise_std=0.0, uniform_share=0.0), actions)

    noisy = explore(actions, seeds, noise_std=0.1, uniform_share=0.0)
    assert torch.equal(noisy, explore(actions, seeds, noise_std=0.1, uniform_share=0.0))
    assert (noisy - actions).mean(0).tolist() == pytest.approx([0.0] * 3, abs=0.003)
    assert noisy.std(0).tolist() == pytest.approx([0.1] * 3, abs=0.003)
    clipped = explore(actions, seeds, noise_std=5.0, uniform_share=0.0)
    assert clipped.min() == 0
    assert clipped.max() == 1

    mixed = explore(actions, seeds, noise_std=0.0, uniform_share=0.3)
    replaced = mixed != actions
    assert torch.equal(replaced.any(1), replaced.all(1))
    assert replaced[:, 0].float().mean().item() == pytest.approx(0.3, abs=0.01)
    drawn = mixed[replaced[:, 0]]
    assert drawn.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.02)
    assert drawn.std(0).tolist() == pytest.approx([12**-0.5] * 3, abs=0.01)


def test_exploration_needs_one_seed_per_image() -> None:
    with pytest.raises(InputError, match="seeds"):
        explore(torch.ones(2, 2), torch.arange(3), noise_std=0.1, uniform_share=0.0)
