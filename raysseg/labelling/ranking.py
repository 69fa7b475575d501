"""Ranks regions of plain images with RALIS' own pools, descriptions and policies; nobody knows any ground truth here.

regions not asked for ─▶ K pools of N candidates ─▶ what the policy looks at ─▶ one region of every pool
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysseg.algorithms.ralis.config import RALISOptions
from raysseg.algorithms.ralis.maps import Autocast, Encoded, EncoderMaps, FreshMaps
from raysseg.algorithms.ralis.module import QueryNetwork
from raysseg.algorithms.ralis.policies import POLICIES, Exploration
from raysseg.algorithms.ralis.pools import Pools, draw_pools
from raysseg.algorithms.ralis.state import LabelledRegions, Observation, RegionDescriber, Wanted
from raysseg.core.seeding import generator
from raysseg.errors import InputError
from raysseg.functional.regions import label_shares
from raysseg.labelling.folder_images import FolderImages
from raysseg.labelling.ledger import Answer, read_mask
from raysseg.labelling.project import Project
from raysseg.labelling.regions import Region
from raysseg.segmenters import Segmenter

OnImages = Callable[[int], None]
"""Is told how many images have passed the segmenter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A chosen region, and its score: larger is wanted more; None where the policy gives none."""

    region: Region
    score: float | None


class _CountedMaps:
    """Encoder maps that say how many images they were made of."""

    def __init__(self, maps: EncoderMaps, on_images: OnImages) -> None:
        self._maps, self._on_images = maps, on_images
        self._count = 0

    def batches(self, segmenter: Segmenter, rows: np.ndarray, most: int | None = None) -> Iterator[Encoded]:
        """Yields the maps of images in batches; see `EncoderMaps`."""
        for batch in self._maps.batches(segmenter, rows, most):
            yield batch
            self._count += len(batch.places)
            self._on_images(self._count)


class RegionRanker:
    """Chooses the regions of a round.

    Args:
        project: the run.
        options: of the labelling game.
        segmenter: on the device of `source`, in evaluation mode.
        query: the query network, on the same device, where the policy is `query`.
        source: the images.
        autocast: the precision.
        on_images: shows how far it is.
    """

    def __init__(
        self,
        project: Project,
        options: RALISOptions,
        segmenter: Segmenter,
        query: QueryNetwork | None,
        source: FolderImages,
        autocast: Autocast,
        on_images: OnImages,
    ) -> None:
        self._project, self._options = project, options
        self._segmenter, self._query, self._device = segmenter, query, source.device
        fresh = FreshMaps(source, project.settings.inference_batch_size, autocast)
        self._maps = _CountedMaps(fresh, on_images)
        self._describer = RegionDescriber(options, len(project.settings.classes), autocast)

    @staticmethod
    def check_left(project: Project, asked: Mapping[str, object], count: int) -> None:
        """Raises `InputError` where fewer regions than `count` were not asked for yet."""
        left = project.total - len(asked)
        if count > left:
            hint = f"use at most --n {left}" if left else "every region was asked for"
            raise InputError(
                f"--n is {count}, but only {left} of the {project.total} regions were not asked for yet; {hint}."
            )

    def rank(
        self, count: int, policy: str, asked: Mapping[str, object], answers: Mapping[str, Answer], *, round_number: int
    ) -> list[Ranked]:
        """Chooses regions that were not asked for yet, the most wanted first.

        Args:
            count: K, how many.
            policy: its name.
            asked: the ids of those that were.
            answers: by the id of their region.
            round_number: all randomness depends on it and the run's seed.

        Raises:
            NonFiniteError: the segmenter or the query network gives a value that is not finite.
        """
        project, seed = self._project, self._project.settings.seed
        free: np.ndarray = np.ones((len(project.names), project.grid.count), dtype=bool)
        number_of = {name: row for row, name in enumerate(project.names)}
        for region in filter(None, map(project.find, asked)):
            free[number_of[region.image], region.number] = False
        draws, left = generator(seed, "pools", round_number), int(free.sum())
        # Pools of one region each leave nothing to choose, so then all that is left is scored and the best of it taken.
        few = left < 2 * count
        pools = draw_pools(
            free, np.arange(len(free)), left if few else count, 1 if few else project.settings.pool_size, draws
        )
        own_seed = int(generator(seed, "rank", round_number).integers(2**62))
        observation = self._observe(pools, POLICIES[policy].wanted, asked, answers, number_of, own_seed)
        choice = POLICIES[policy].choose(observation, Exploration(seed=own_seed, query=self._query))
        scores = [None] * len(pools.rows) if choice.scores is None else choice.scores.tolist()
        ranked = [
            Ranked(region=project.region(project.names[row], int(number)), score=score)
            for row, number, score in zip(choice.rows(observation), choice.regions(observation), scores, strict=True)
        ]
        return sorted(ranked, key=lambda one: -(one.score or 0.0))[:count]

    def _observe(
        self,
        pools: Pools,
        wanted: Wanted,
        asked: Mapping[str, object],
        answers: Mapping[str, Answer],
        number_of: Mapping[str, int],
        seed: int,
    ) -> Observation:
        if wanted.features:
            return self._observe_features(pools, wanted, asked, number_of)
        shares = self._answer_shares(answers) if wanted.description else torch.zeros(0, 0)
        return self._describer.observe(
            self._segmenter,
            pools,
            wanted,
            maps=self._maps,
            state_rows=self._state_rows() if wanted.description else np.zeros(0, dtype=np.int64),
            known_rows=np.zeros(0, dtype=np.int64),
            labelled=LabelledRegions(shares=shares),
            seed=seed,
        )

    def _observe_features(
        self, pools: Pools, wanted: Wanted, asked: Mapping[str, object], number_of: Mapping[str, int]
    ) -> Observation:
        """What the core-set looks at: all regions that were asked for are covered, as people have them or will."""
        before = [region for region in map(self._project.find, asked) if region is not None]
        images, places = pools.images()
        rows = np.unique(np.concatenate([images, [number_of[region.image] for region in before]]).astype(np.int64))
        features = self._describer.describe(self._segmenter, self._maps, rows, wanted).features
        assert features is not None
        count = self._project.grid.count
        place_of = {int(row): place for place, row in enumerate(rows)}
        row_of = np.array([place_of[int(row)] for row in images])
        index = torch.as_tensor(row_of[places] * count + pools.regions, device=features.device)
        covered = [place_of[number_of[region.image]] * count + region.number for region in before]
        flat = features.flatten(0, 1)
        return Observation(pools=pools, points=flat[index], covered=flat[torch.tensor(covered, dtype=torch.int64)])

    def _state_rows(self) -> np.ndarray:
        """The state's images, D_S, drawn once and for all: what the query network sees of them are predictions alone."""
        draws = generator(self._project.settings.seed, "state")
        chosen = draws.choice(len(self._project.names), size=self._options.sets.state, replace=False)
        return np.sort(chosen).astype(np.int64)

    def _answer_shares(self, answers: Mapping[str, Answer]) -> Tensor:
        """Shares of the classes in every answer, float32 [L, C]."""
        classes, smoothing = len(self._project.settings.classes), self._options.regions.smoothing
        shares = [
            label_shares(torch.tensor(read_mask(self._project.ledger, answer))[None], classes, smoothing)
            for answer in answers.values()
        ]
        return torch.cat(shares).to(self._device) if shares else torch.zeros(0, classes, device=self._device)
