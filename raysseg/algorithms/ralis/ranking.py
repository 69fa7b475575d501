"""Which regions to label next where nobody knows the labels: one step of the game with people in the oracle's place."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch

from raysseg.algorithms.ralis.config import RALISOptions
from raysseg.algorithms.ralis.maps import Autocast, FreshMaps, ImageSource
from raysseg.algorithms.ralis.module import QueryNetwork
from raysseg.algorithms.ralis.policies import POLICIES, Exploration
from raysseg.algorithms.ralis.pools import draw_pools
from raysseg.algorithms.ralis.state import LabelledRegions, RegionDescriber, Wanted
from raysseg.core.seeding import generator
from raysseg.errors import InputError
from raysseg.segmenters import Segmenter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedRegions:
    """Regions to label now, one of every pool.

    Args:
        rows: their images, int64 `[K]`.
        regions: their numbers therein, int64 `[K]`.
        scores: what the policy thinks of each, float32 `[K]`; None where it gives no number (uniform, coreset).
    """

    rows: np.ndarray
    regions: np.ndarray
    scores: np.ndarray | None


def rank_regions(
    segmenter: Segmenter,
    query: QueryNetwork | None,
    images: ImageSource,
    unlabelled: np.ndarray,
    *,
    state_images: ImageSource,
    state_rows: np.ndarray,
    labelled_shares: torch.Tensor,
    options: RALISOptions,
    policy: str,
    per_step: int,
    pool_size: int,
    seed: int,
    batch_size: int = 8,
    autocast: Autocast = contextlib.nullcontext,
) -> RankedRegions:
    """Chooses regions with the code of the game: the same pools, descriptions and policies, without any label of `images`.

    Args:
        segmenter: f.
        query: the query network, for the policy `query`.
        images: what is to be labelled, on the segmenter's device; the grid of `options` divides each image (`check_grid`).
        unlabelled: bool `[M, R]`, what may be asked for of its rows 0…M−1. Everything else counts as labelled.
        state_images: where D_S is.
        state_rows: its rows, int64 `[|D_S|]`.
        labelled_shares: class shares of the labels that there are already, float32 `[L, C]`; L may be 0.
        options: the grid and what is known of a region.
        policy: one of `POLICIES`.
        per_step: K, how many regions are wanted.
        pool_size: N, candidates for each.
        seed: of pools and choices; another one for each round.
        batch_size: images per pass.
        autocast: the precision.

    Raises:
        InputError: fewer than K regions have no label, the policy is unknown or lacks its query network.
        NonFiniteError: a value is not finite.

    Source: RALIS, Sec. 3.1, with people in the oracle's place.
    """
    if policy not in POLICIES:
        raise InputError(f"The policy '{policy}' chooses no regions; known are {', '.join(POLICIES)}.")
    if policy == "query" and query is None:
        raise InputError("The policy 'query' needs a trained query network; known without one are the baselines.")
    chooser = POLICIES[policy]
    rows: np.ndarray = np.arange(len(unlabelled), dtype=np.int64)
    pools = draw_pools(unlabelled, rows, per_step, pool_size, generator(seed, "pools"))
    describer = RegionDescriber(options, segmenter.num_classes, autocast)
    maps = FreshMaps(images, batch_size, autocast)
    features = None
    if chooser.wanted.features and not unlabelled.all():
        begun = np.flatnonzero(~unlabelled.all(1))
        known = describer.describe(segmenter, maps, begun, Wanted(features=True)).features
        assert known is not None
        features = known[torch.as_tensor(~unlabelled[begun], device=known.device)]
    observation = describer.observe(
        segmenter,
        pools,
        chooser.wanted,
        maps=maps,
        state_maps=FreshMaps(state_images, batch_size, autocast),
        state_rows=state_rows,
        labelled=LabelledRegions(shares=labelled_shares, features=features),
        seed=seed,
    )
    choice = chooser.choose(observation, Exploration(seed=seed, query=query))
    return RankedRegions(rows=choice.rows(observation), regions=choice.regions(observation), scores=choice.scores)
