"""What EIL tells the loop while it explores: which episodes actors play and what the learner learns from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from raysseg.algorithms.eil.module import OPERATORS
from raysseg.core import rollout
from raysseg.core.schedules import schedule_factor
from raysseg.core.seeding import draw_order, draw_seeds, generator
from raysseg.core.work import LearnerWork

if TYPE_CHECKING:
    from raysseg.algorithms.eil.algorithm import EIL


class ExplorationPlan:
    """The exploration of one stage; synchronous and asynchronous loops ask it the same questions.

    Args:
        algorithm: the run, which holds replay, versions and published weights.
        stage: t + 1 in 1…T.

    Source: the order of episodes and draws is a reconstruction; what is learned is Eq. 3-7.
    """

    goes_on_from_replay = True

    def __init__(self, algorithm: EIL, stage: int) -> None:
        self._algorithm = algorithm
        self._settings = algorithm.settings
        self._exploration = algorithm.settings.eil.exploration
        self._stage = stage
        self._before = (stage - 1) * algorithm.updates_per_stage
        self._total = algorithm.settings.eil.stages * algorithm.updates_per_stage
        self.fresh: list[pa.RecordBatch] = []

    def rollout_order(self, number: int, policy_version: int) -> Mapping[str, Any]:
        """Returns the arguments of the n-th rollout: all images in a new order each epoch, each under its own seed.

        Exploration noise decays with the searcher's learning rate.
        """
        size, seed = self._exploration.rollout_batch_size, self._settings.seed
        count = len(self._algorithm.train_keys)
        place = math.ceil(self._before * self._algorithm.rollouts_per_update) + number
        positions = np.arange(place * size, (place + 1) * size)
        epochs, at = np.divmod(positions, count)
        orders = {epoch: draw_order(seed, "explore", int(epoch), count=count) for epoch in np.unique(epochs)}
        rows = np.array([orders[epoch][index] for epoch, index in zip(epochs, at, strict=True)])
        progress = (self._before + number / self._algorithm.rollouts_per_update) / max(1, self._total)
        context = {
            "stage": self._stage,
            "label_version": self._algorithm.label_version,
            "segmenter_version": self._algorithm.segmenter_version,
            "policy_version": policy_version,
            "noise_std": self._exploration.noise_std
            * schedule_factor(self._exploration.searcher_optimiser, min(1.0, progress)),
            "uniform_share": self._exploration.uniform_share,
        }
        return {
            "records": rollout.order(rows, draw_seeds(seed, "explore-items", place, count=size)),
            "context": context,
        }

    def keep(self, rollout: pa.RecordBatch) -> None:
        """Takes a rollout into replay."""
        self._algorithm.replay.add(rollout)
        self.fresh.append(rollout)

    def drop_older(self, policy_version: int) -> int:
        """Drops and counts transitions of policies before this version, and of earlier segmenters."""
        self._algorithm.replay.drop_older(
            segmenter_version=self._algorithm.segmenter_version, policy_version=policy_version
        )
        return 0

    def ready(self) -> bool:
        """Says whether replay holds anything."""
        return len(self._algorithm.replay) > 0

    def work(self, update: int) -> LearnerWork:
        """Draws the transitions of the n-th update of the stage from replay."""
        number = self._before + update
        records = self._algorithm.replay.sample(
            self._exploration.batch_size, generator(self._settings.seed, "replay", number)
        )
        context = {"update": number, "total_updates": self._total, "seed": self._settings.seed}
        return LearnerWork(kind="operators", records=records, context=context)

    def learned(self, update: int, records: pa.RecordBatch, numbers: dict[str, Any]) -> None:
        """Takes over the errors of an update as priorities; the policy is one version further."""
        errors = numbers.pop("errors")
        if self._exploration.replay.priority_exponent > 0:
            self._algorithm.replay.update_priorities(np.asarray(records.column("id")), np.asarray(errors))
        self._algorithm.policy_version += 1

    def published(self, weights: ray.ObjectRef) -> None:
        """Takes the newest weights of searcher and assessor."""
        self._algorithm.take_weights(weights, OPERATORS)

    def weights(self) -> Mapping[str, tuple[int, list[ray.ObjectRef]]]:
        """Returns the newest weights of segmenter and operators."""
        return self._algorithm.weights
