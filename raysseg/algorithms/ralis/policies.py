"""Who chooses one region of every pool: the query network, and every baseline of the paper's tables and ours.

All of them see the same pools under the same seed, as long as they choose alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from raysseg.algorithms.ralis.config import LearningOptions
from raysseg.algorithms.ralis.module import QueryNetwork
from raysseg.algorithms.ralis.state import Observation, Wanted
from raysseg.core.seeding import generator
from raysseg.errors import NonFiniteError
from raysseg.functional.acquisition import follow_direction, greedy_cover
from raysseg.segmenters import evaluation_mode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """What candidates are compared by where exploration is coherent.

    Args:
        groups: how many consecutive numbers of a candidate say the same, G of them.
        weights: of their means, float64 `[G]`.

    Source: reconstruction.
    """

    groups: tuple[int, ...]
    weights: np.ndarray

    @classmethod
    def draw(cls, groups: tuple[int, ...], seed: int) -> Direction:
        """Draws the direction of an episode from its seed."""
        return cls(groups=groups, weights=generator(seed, "direction").standard_normal(len(groups)))

    def follow(self, candidates: torch.Tensor) -> np.ndarray:
        """Chooses in every pool what lies farthest along it, int64 `[K]` of candidates float `[K, N, F]`."""
        parts = candidates[..., : sum(self.groups)].split(self.groups, -1)
        points = torch.stack([part.mean(-1) for part in parts], -1)
        weights = torch.as_tensor(self.weights, dtype=points.dtype, device=points.device)
        return follow_direction(points, weights).cpu().numpy()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """Everything beside the observation that a choice depends on.

    Args:
        seed: of this step.
        query: the query network; None for the baselines.
        epsilon: probability of a random choice in place of the query network's.
        coin: whether one coin decides for all pools of a step, or each pool has its own.
        direction: what an explored step follows; None: explored regions are drawn uniformly.
    """

    seed: int
    query: QueryNetwork | None = None
    epsilon: float = 0.0
    coin: str = "step"
    direction: Direction | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """One region of every pool.

    Args:
        chosen: the position within each pool, int64 `[K]`.
        scores: what the policy thinks of each, float32 `[K]`; None where it gives no number.
        mean_q: mean over pools of the largest value, where there is a query network.
    """

    chosen: np.ndarray
    scores: np.ndarray | None = None
    mean_q: float | None = None

    def rows(self, observation: Observation) -> np.ndarray:
        """Returns the images of the chosen regions, int64 `[K]`."""
        return observation.pools.rows[np.arange(len(self.chosen)), self.chosen]

    def regions(self, observation: Observation) -> np.ndarray:
        """Returns the chosen regions' numbers within their images, int64 `[K]`."""
        return observation.pools.regions[np.arange(len(self.chosen)), self.chosen]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionPolicy:
    """What a policy looks at, and how it chooses."""

    wanted: Wanted
    choose: Callable[[Observation, Exploration], Choice]


def choose_uniformly(observation: Observation, exploration: Exploration) -> Choice:
    """Chooses uniformly in every pool. Source: RALIS, Sec. 4.1, baseline U."""
    draws = generator(exploration.seed, "uniform").integers(observation.pools.distinct, size=_count(observation))
    return Choice(chosen=draws.astype(np.int64))


def choose_largest_score(observation: Observation, exploration: Exploration) -> Choice:
    """Chooses the most uncertain region of every pool. Source: RALIS, Sec. 4.1, baselines H and B."""
    assert observation.scores is not None
    scores, chosen = observation.scores.max(1)
    return Choice(chosen=chosen.cpu().numpy(), scores=scores.cpu().numpy())


def choose_cover(observation: Observation, exploration: Exploration) -> Choice:
    """Chooses what is farthest, in mean features, from D_S and all regions labelled or chosen before.

    Source: reconstruction; k-centre greedy of Sener and Savarese (2018), restricted to the pools.
    """
    assert observation.points is not None
    assert observation.covered is not None
    pools, candidates = observation.points.shape[:2]
    index = torch.arange(pools * candidates, device=observation.points.device).view(pools, candidates)
    chosen = greedy_cover(observation.points.flatten(0, 1), observation.covered, index)
    return Choice(chosen=chosen.cpu().numpy())


@torch.no_grad()
def choose_by_query(observation: Observation, exploration: Exploration) -> Choice:
    """Chooses the largest value of every pool, or with probability epsilon a random one.

    Raises:
        NonFiniteError: a value is not finite.

    Source: RALIS, Eq. 1; one coin for all pools of a step is the authors' code.
    """
    assert exploration.query is not None
    assert observation.state is not None
    assert observation.candidates is not None
    # The state's path does not depend on the candidate, so all pools pass as one.
    with evaluation_mode(exploration.query):
        values = exploration.query(observation.state[None], observation.candidates.flatten(0, 1)[None])
    values = values.float().view(observation.candidates.shape[:2])
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "A value of the query network is not finite; lower ralis.learning.optimiser.learning_rate."
        )
    best = values.max(1)
    draws = generator(exploration.seed, "explore")
    coins = draws.random(1 if exploration.coin == "step" else _count(observation)) < exploration.epsilon
    explored = draws.integers(observation.pools.distinct, size=_count(observation))
    if exploration.direction is not None and coins.all():
        explored = exploration.direction.follow(observation.candidates[:, : observation.pools.distinct])
    chosen = np.where(coins, explored, best.indices.cpu().numpy()).astype(np.int64)
    scores = values.cpu().numpy()[np.arange(len(chosen)), chosen]
    return Choice(chosen=chosen, scores=scores, mean_q=float(best.values.mean()))


POLICIES: dict[str, RegionPolicy] = {
    "uniform": RegionPolicy(wanted=Wanted(), choose=choose_uniformly),
    "entropy": RegionPolicy(wanted=Wanted(score="entropy"), choose=choose_largest_score),
    "margin": RegionPolicy(wanted=Wanted(score="margin"), choose=choose_largest_score),
    "bald": RegionPolicy(wanted=Wanted(score="bald"), choose=choose_largest_score),
    "coreset": RegionPolicy(wanted=Wanted(features=True), choose=choose_cover),
    "query": RegionPolicy(wanted=Wanted(description=True), choose=choose_by_query),
}


def epsilon_at(options: LearningOptions, step: int) -> float:
    """Returns the probability of a random choice at a step, counted over all episodes. Source: the authors' code."""
    return options.epsilon_end + (options.epsilon_start - options.epsilon_end) * math.exp(-step / options.epsilon_decay)


def _count(observation: Observation) -> int:
    return len(observation.pools.rows)
