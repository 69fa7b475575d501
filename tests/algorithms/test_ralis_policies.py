"""Who chooses the regions: every policy against its obvious form, on the same pools."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from algorithms.tiny_ralis import CLASSES, PER_STEP, GameBench, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raysseg.algorithms.ralis.maps import FreshMaps
from raysseg.algorithms.ralis.policies import (
    POLICIES,
    Direction,
    Exploration,
    choose_by_query,
    choose_uniformly,
    epsilon_at,
)
from raysseg.algorithms.ralis.pools import Pools, check_grid, draw_pools
from raysseg.algorithms.ralis.state import Observation, RegionDescriber, Wanted
from raysseg.errors import InputError, NonFiniteError
from raysseg.evaluation import predict_probabilities
from raysseg.segmenters import build_segmenter, evaluation_mode

Make = Callable[..., GameBench]


def observation_of(pools: int, candidates: int, *, distinct: int | None = None) -> Observation:
    """Returns pools of made-up regions."""
    rows = np.arange(pools * candidates).reshape(pools, candidates)
    made = Pools(rows=rows, regions=rows % 4, distinct=distinct or candidates)
    return Observation(pools=made, state=torch.zeros(2, 3), candidates=torch.zeros(pools, candidates, 4))


class Valued(nn.Module):
    """A query network whose values are given."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, state: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert candidates.shape[:2] == (1, self.values.numel()), "all pools pass with one state"
        return self.values.flatten()[None]


# ---- pools ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 12),
    regions=st.integers(1, 6),
    per_step=st.integers(1, 5),
    pool_size=st.integers(1, 6),
    share=st.floats(0.2, 1.0),
    seed=st.integers(0, 1000),
)
def test_pools_hold_distinct_unlabelled_regions_of_few_images(
    images: int, regions: int, per_step: int, pool_size: int, share: float, seed: int
) -> None:
    unlabelled = np.random.default_rng(seed).random((images, regions)) < share
    rows = 10 + 3 * np.arange(images)
    if unlabelled.sum() < per_step:
        with pytest.raises(InputError, match=rf"^{unlabelled.sum()} regions have no label yet.*{per_step} of them"):
            draw_pools(unlabelled, rows, per_step, pool_size, np.random.default_rng(seed))
        return
    pools = draw_pools(unlabelled, rows, per_step, pool_size, np.random.default_rng(seed))
    assert pools.rows.shape == pools.regions.shape == (per_step, pool_size)
    assert pools.distinct == min(pool_size, unlabelled.sum() // per_step)
    own = slice(0, pools.distinct)
    pairs = list(zip(pools.rows[:, own].flat, pools.regions[:, own].flat, strict=True))
    assert len(set(pairs)) == per_step * pools.distinct
    assert all(unlabelled[(row - 10) // 3, region] for row, region in pairs)
    left = {10 + 3 * image: int(unlabelled[image].sum()) for image in range(images)}
    touched, needed = set(pools.rows.flat), per_step * pools.distinct
    assert sum(sorted(left[row] for row in touched)[:-1]) < needed, "no image more than is needed"
    for place in range(pool_size):
        assert np.array_equal(pools.rows[:, place], pools.rows[:, place % pools.distinct])
    images_of, places = pools.images()
    assert np.array_equal(images_of[places], pools.rows)


def test_every_region_can_come_into_a_pool() -> None:
    unlabelled: np.ndarray = np.ones((6, 4), dtype=bool)
    unlabelled[2, 1] = False
    seen: np.ndarray = np.zeros((6, 4), dtype=int)
    for seed in range(400):
        pools = draw_pools(unlabelled, np.arange(6), 2, 2, np.random.default_rng(seed))
        seen[pools.rows, pools.regions] += 1
    assert seen[2, 1] == 0
    assert seen[unlabelled].min() > 0.5 * seen[unlabelled].mean()
    assert seen[unlabelled].max() < 1.6 * seen[unlabelled].mean()


def test_a_grid_is_checked_against_all_images() -> None:
    check_grid(["a", "b"], [(180, 240), (90, 120)], 2, 6)
    with pytest.raises(
        InputError, match=r"'b' is 120x90 pixels.*6 columns x 4 rows.*columns=6, ralis\.regions\.rows=3\."
    ):
        check_grid(["a", "b"], [(180, 240), (90, 120)], 4, 6)


def test_all_policies_see_the_same_pools_as_long_as_they_choose_alike(game_bench: Make) -> None:
    bench = game_bench()
    seen: dict[str, list[Pools]] = {}
    for policy, chooser in POLICIES.items():
        episode = bench.reset(seed=11)
        for number, chosen in enumerate(([0, 0, 0], [1, 1, 1], None)):
            assert episode.pools is not None
            seen.setdefault(policy, []).append(episode.pools)
            if number < 2:
                episode.observe(chooser.wanted)
                episode.label(np.array(chosen))
    first = seen.pop("uniform")
    for others in seen.values():
        for own, other in zip(first, others, strict=True):
            assert np.array_equal(own.rows, other.rows)
            assert np.array_equal(own.regions, other.regions)


# ---- the baselines --------------------------------------------------------------------------------------------------


def test_uniform_draws_every_place_and_no_repeated_one() -> None:
    observation = observation_of(4, 5, distinct=3)
    draws = np.stack([choose_uniformly(observation, Exploration(seed=seed)).chosen for seed in range(300)])
    counts = np.bincount(draws.flat, minlength=5)
    assert counts[3:].sum() == 0
    assert counts[:3].min() > 320
    again = choose_uniformly(observation, Exploration(seed=7))
    assert np.array_equal(again.chosen, draws[7])
    assert again.scores is None


@pytest.mark.parametrize("policy", ["entropy", "margin"])
def test_uncertainty_is_the_mean_over_a_region_and_the_largest_is_chosen(game_bench: Make, policy: str) -> None:
    bench = game_bench()
    bench.reset(seed=1)
    observation, choice = bench.choose(policy)
    data = bench.runner.workspace.train
    for pool in range(PER_STEP):
        scores = []
        for row, region in zip(observation.pools.rows[pool], observation.pools.regions[pool], strict=True):
            images, sizes = data.images(torch.tensor([row]))
            probabilities = predict_probabilities(bench.start, images, sizes)[0]
            down, across = divmod(int(region), 2)
            part = probabilities[:, 24 * down : 24 * down + 24, 24 * across : 24 * across + 24].double().flatten(1)
            ordered = part.sort(0).values
            score = -(part * part.log()).sum(0) if policy == "entropy" else 1 - (ordered[-1] - ordered[-2])
            scores.append(score.mean().item())
        assert choice.chosen[pool] == np.argmax(scores)
        assert choice.scores is not None
        assert choice.scores[pool] == pytest.approx(max(scores), abs=1e-4)


def test_bald_is_what_passes_with_dropout_disagree_on(game_bench: Make) -> None:
    bench = game_bench(ralis__policy="bald", ralis__dropout_passes=5)
    with torch.no_grad():
        # As sure of itself as a trained one.
        bench.start.decoder.head.weight.mul_(1000)
    bench.reset(seed=1)
    observation, choice = bench.choose("bald")
    again, same = bench.choose("bald")
    assert torch.equal(observation.scores, again.scores), "the passes are drawn from the episode's seed"
    assert np.array_equal(choice.chosen, same.chosen)
    assert observation.scores is not None
    assert observation.scores.max() > 0.01
    for part in bench.episode.segmenter.decoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 1e-12
    nothing, _ = bench.choose("bald")
    assert nothing.scores is not None
    assert nothing.scores.max() < 1e-5


def test_bald_needs_dropout(game_bench: Make) -> None:
    bench = game_bench(segmenter__dropout=0.0)
    bench.reset()
    with pytest.raises(InputError, match=r"'bald'.*segmenter\.dropout must be above 0"):
        bench.choose("bald")


@pytest.mark.parametrize(("architecture", "passes"), [("Unet", 1), ("DeepLabV3Plus", 6)])
def test_dropout_before_the_classifier_repeats_the_classifier_alone(
    game_bench: Make, architecture: str, passes: int
) -> None:
    bench = game_bench(ralis__dropout_passes=6)
    values = bench.settings.segmenter.model_copy(update={"architecture": architecture, "dropout": 0.5})
    torch.manual_seed(0)
    segmenter = build_segmenter(values, CLASSES)
    autocast = bench.runner.workspace.autocast
    describer = RegionDescriber(bench.settings.ralis, CLASSES, autocast)
    maps = FreshMaps(bench.runner.workspace.train, 4, autocast)
    decoder = segmenter.decoder
    with mock.patch.object(decoder, "represent", side_effect=decoder.represent) as represent:
        scores = describer.describe(segmenter, maps, np.array([0, 1]), Wanted(score="bald"), seed=3).scores
    assert represent.call_count == passes, "nothing is decoded without dropout that nobody looks at"
    assert scores is not None
    assert scores.min() > 0
    with evaluation_mode(segmenter):
        assert not decoder.dropout.training


def test_coreset_covers_greedily_starting_from_what_is_known(game_bench: Make) -> None:
    bench = game_bench(ralis__policy="coreset")
    bench.reset(seed=2, known=bench.sets.start)
    for step in range(2):
        observation, choice = bench.choose("coreset")
        assert observation.points is not None
        assert observation.covered is not None
        assert len(observation.covered) == len(bench.sets.start) * 4 + PER_STEP * step, "what is labelled"
        covered = [row.double() for row in observation.covered]
        for pool in range(PER_STEP):
            points = observation.points[pool].double()
            nearest = [min(float((point - one).norm()) for one in covered) for point in points]
            assert choice.chosen[pool] == np.argmax(nearest)
            covered.append(points[choice.chosen[pool]])
        chosen = observation.points[torch.arange(PER_STEP), torch.as_tensor(choice.chosen)]
        bench.episode.label(choice.chosen)
    following, _ = bench.choose("coreset")
    assert following.covered is not None
    assert torch.equal(following.covered[-PER_STEP:], chosen), "features stay as they were when a region was chosen"


# ---- the query network ----------------------------------------------------------------------------------------------


def test_the_query_networks_largest_value_is_chosen() -> None:
    values = torch.tensor([[0.1, 0.9, -1.0], [2.0, 1.0, 1.5]])
    choice = choose_by_query(observation_of(2, 3), Exploration(seed=0, query=Valued(values)))
    assert choice.chosen.tolist() == [1, 0]
    np.testing.assert_allclose(choice.scores, [0.9, 2.0])
    assert choice.mean_q == pytest.approx(1.45)


@pytest.mark.parametrize("coin", ["step", "region"])
def test_epsilon_is_the_share_of_random_choices(coin: str) -> None:
    values = torch.zeros(4, 5)
    values[:, 4] = 1.0
    observation, network = observation_of(4, 5, distinct=4), Valued(values)
    chosen = np.stack(
        [
            choose_by_query(observation, Exploration(seed=seed, query=network, epsilon=0.4, coin=coin)).chosen
            for seed in range(600)
        ]
    )
    explored = chosen != 4
    assert explored.mean() == pytest.approx(0.4, abs=0.05)
    assert np.bincount(chosen[explored], minlength=4).min() > 0.18 * explored.sum()
    together = explored.all(1) | (~explored).all(1)
    assert together.all() == (coin == "step")


def test_an_explored_step_may_follow_one_direction_in_all_pools() -> None:
    points = torch.tensor([[[0.0, 9.0], [1.0, 7.0]], [[3.0, 1.0], [2.0, 3.0]]])
    candidates = torch.cat([points[..., :1], points[..., 1:] - 1, points[..., 1:] + 1, torch.full((2, 2, 3), 7.0)], -1)
    made = Pools(rows=np.arange(4).reshape(2, 2), regions=np.zeros((2, 2), np.int64), distinct=2)
    observation = Observation(pools=made, state=torch.zeros(2, 3), candidates=candidates)
    network, seen = Valued(torch.zeros(2, 2)), set()
    for seed in range(60):
        exploration = Exploration(seed=0, query=network, epsilon=1.0, direction=Direction.draw((1, 2), seed))
        seen.add(tuple(choose_by_query(observation, exploration).chosen.tolist()))
    # The first number rises where the second falls in one pool, and falls where it rises in the other.
    assert seen == {(0, 1), (1, 0)}, (
        "a direction along either number, or between them, never prefers the same place in both"
    )
    exploration = Exploration(seed=0, query=network, epsilon=0.0, direction=Direction.draw((1, 2), 0))
    greedy = choose_by_query(observation, exploration)
    assert greedy.chosen.tolist() == [0, 0]


def test_epsilon_falls_over_all_episodes() -> None:
    learning = settings_of().ralis.learning
    assert [round(epsilon_at(learning, step), 3) for step in (0, 10, 20, 30)] == [0.9, 0.363, 0.165, 0.092]


def test_values_that_are_not_finite_stop_the_run() -> None:
    with pytest.raises(NonFiniteError, match="value of the query network"):
        choose_by_query(observation_of(1, 2), Exploration(seed=0, query=Valued(torch.tensor([[0.0, np.nan]]))))
