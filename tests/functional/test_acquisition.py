"""The baselines' scores against loops over pixels and points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError, NonFiniteError
from raysseg.functional import acquisition as module
from raysseg.functional import add_bald_pass, bald_map, follow_direction, greedy_cover, margin_map

seeds = st.integers(0, 2**32 - 1)


def probabilities(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Softmax over axis 1 of numbers far apart, some of them equal."""
    logits = np.random.default_rng(seed).integers(-6, 7, shape).astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, num_classes=st.integers(1, 20), height=st.integers(1, 5), width=st.integers(1, 5))
def test_the_margin_is_that_of_sorted_probabilities(seed: int, num_classes: int, height: int, width: int) -> None:
    values = probabilities(seed, (2, num_classes, height, width))
    found = margin_map(torch.tensor(values))
    assert found.dtype == torch.float32
    for b, y, x in np.ndindex(2, height, width):
        first, second = sorted([*values[b, :, y, x].tolist(), 0.0], reverse=True)[:2]
        assert found[b, y, x].item() == pytest.approx(1 - (first - second), abs=1e-6)


def test_margins_by_hand() -> None:
    values = torch.tensor([[0.5, 1.0, 0.4], [0.5, 0.0, 0.35], [0.0, 0.0, 0.25]]).view(1, 3, 1, 3)
    assert margin_map(values).flatten().tolist() == pytest.approx([1.0, 0.0, 0.95])
    assert margin_map(torch.ones(1, 1, 1, 1)).item() == 0.0


@settings(deadline=None, max_examples=30)
@given(seed=seeds, passes=st.integers(1, 6), num_classes=st.integers(1, 8), batch=st.integers(1, 3))
def test_bald_in_running_sums_is_that_of_all_passes(seed: int, passes: int, num_classes: int, batch: int) -> None:
    each = np.stack([probabilities(seed + t, (batch, num_classes, 3, 2)) for t in range(passes)])
    sums = None
    for one in each:
        sums = add_bald_pass(sums, torch.tensor(one).float())
    assert sums is not None
    assert sums.passes == passes
    expected = scipy.stats.entropy(each.mean(0), axis=1) - scipy.stats.entropy(each, axis=2).mean(0)
    found = bald_map(sums)
    assert found.numpy() == pytest.approx(expected, abs=1e-5)
    assert (found >= 0).all()


def test_bald_by_hand() -> None:
    certain = torch.eye(2).view(2, 2, 1, 1)
    opposed = add_bald_pass(add_bald_pass(None, certain[:1]), certain[1:])
    assert bald_map(opposed).item() == pytest.approx(math.log(2))
    undecided = torch.full((1, 2, 1, 1), 0.5)
    assert bald_map(add_bald_pass(add_bald_pass(None, undecided), undecided)).item() == pytest.approx(0.0, abs=1e-6)


def test_the_first_pass_is_not_changed_by_later_ones() -> None:
    first = torch.full((1, 2, 1, 1), 0.5)
    add_bald_pass(add_bald_pass(None, first), torch.eye(2)[:1].view(1, 2, 1, 1))
    assert first.flatten().tolist() == [0.5, 0.5]


def slow_cover(points: list[list[int]], covered: list[list[int]], pools: list[list[int]]) -> list[int]:
    covered, chosen = list(covered), []
    for pool in pools:
        nearest = [min((math.dist(points[i], other) for other in covered), default=math.inf) for i in pool]
        chosen.append(nearest.index(max(nearest)))
        covered.append(points[pool[chosen[-1]]])
    return chosen


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    m=st.integers(1, 12),
    dimensions=st.integers(1, 3),
    labelled=st.integers(0, 5),
    shape=st.tuples(st.integers(0, 5), st.integers(1, 5)),
    spread=st.sampled_from([2, 50]),
)
def test_the_cover_matches_a_loop(
    seed: int, m: int, dimensions: int, labelled: int, shape: tuple[int, int], spread: int
) -> None:
    # Whole numbers have exact squared distances, so that ties (many with a small spread) are ties on both sides.
    generator = np.random.default_rng(seed)
    points, covered = (generator.integers(0, spread, (n, dimensions)) for n in (m, labelled))
    pools = generator.integers(0, m, shape)
    found = greedy_cover(torch.tensor(points).float(), torch.tensor(covered).float(), torch.tensor(pools))
    assert found.dtype == torch.int64
    assert found.tolist() == slow_cover(points.tolist(), covered.tolist(), pools.tolist())


def test_a_choice_covers_for_the_pools_after_it() -> None:
    points = torch.tensor([[0.0], [10.0], [9.0], [4.0]])
    pools = torch.tensor([[0, 1], [2, 3]])
    assert greedy_cover(points, points[:1], pools).tolist() == [1, 1]
    assert greedy_cover(points, points[:0], pools).tolist() == [0, 0]


def test_covering_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    points, covered = (torch.randint(0, 40, (n, 3), generator=generator).float() for n in (20, 13))
    pools = torch.arange(20).view(5, 4)
    whole = greedy_cover(points, covered, pools)
    monkeypatch.setattr(module, "_DISTANCES_AT_ONCE", 41)
    assert torch.equal(greedy_cover(points, covered, pools), whole)


def test_bad_input_is_refused() -> None:
    maps, points, pools = torch.ones(2, 2, 2), torch.ones(3, 2), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"probabilities is \[2, 2, 2\]"):
        margin_map(maps)
    with pytest.raises(InputError, match=r"expected \[1, 2, 2, 2\] as in the passes before"):
        add_bald_pass(add_bald_pass(None, maps[None]), maps[None, :, :, :1])
    with pytest.raises(InputError, match=r"covered \[0, 3\], expected \[M, D\] and \[L, D\]"):
        greedy_cover(points, torch.ones(0, 3), pools)
    with pytest.raises(InputError, match=r"pools is torch\.int32"):
        greedy_cover(points, points, pools.int())
    with pytest.raises(InputError, match="at least one candidate"):
        greedy_cover(points, points, pools[:, :0])
    with pytest.raises(InputError, match="names the points 0 to 3, expected 0 to 2"):
        greedy_cover(points, points, torch.tensor([[0, 3]]))
    with pytest.raises(InputError, match="names the points -1 to 0"):
        greedy_cover(points, points, torch.tensor([[0, -1]]))
    with pytest.raises(NonFiniteError, match=r"points \[3, 2\] is not finite"):
        greedy_cover(points * torch.nan, points, pools)
    with pytest.raises(NonFiniteError, match=r"covered \[3, 2\] is not finite"):
        greedy_cover(points, points / 0, pools)


def test_a_direction_is_followed_in_every_pool_by_scaled_numbers() -> None:
    points = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.01]) + 7.0
    direction = torch.tensor([1.0, -1.0, 0.5])
    values = points.reshape(-1, 3).numpy()
    scaled = ((points.numpy() - values.mean(0)) / values.std(0)).reshape(4, 5, 3)
    slow = [int(np.argmax([sum(direction[g].item() * row[g] for g in range(3)) for row in pool])) for pool in scaled]
    assert follow_direction(points, direction).tolist() == slow
    assert follow_direction(torch.ones(2, 3, 1), torch.ones(1)).tolist() == [0, 0], (
        "numbers that are all equal say nothing"
    )
