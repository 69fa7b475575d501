"""What RALIS tells the loop while it plays: which episodes actors play and what the query network learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from raysseg.algorithms.ralis.module import QUERY
from raysseg.core import rollout
from raysseg.core.seeding import draw_seeds, generator
from raysseg.core.work import LearnerWork

if TYPE_CHECKING:
    from raysseg.algorithms.ralis.algorithm import RALIS

START_VERSION = 0
"""Version of the segmenter that played episodes start with; it never changes while they are played."""


class PlayPlan:
    """The played episodes of a run; synchronous and asynchronous loops ask it the same questions.

    A rollout is one whole episode under one policy; an update of the loop is as many minibatches as the episodes that
    paid for it are worth, and waits for them: how many are played is part of the method.

    Args:
        algorithm: the run, which holds replay, versions and published weights.

    Source: RALIS, Algorithm of Sec. 3.1; that the policy rests within an episode is a reconstruction.
    """

    goes_on_from_replay = False

    def __init__(self, algorithm: RALIS) -> None:
        self._algorithm = algorithm
        self._settings = algorithm.settings
        self._learning = algorithm.settings.ralis.learning
        self.fresh: list[pa.RecordBatch] = []

    def rollout_order(self, number: int, policy_version: int) -> Mapping[str, Any]:
        """Returns the arguments of the n-th episode, with its place on the schedule of epsilon: steps played before."""
        context = {
            "episode": number,
            "first_step": number * self._settings.ralis.steps_per_episode,
            "segmenter_version": START_VERSION,
            "policy_version": policy_version,
        }
        seeds = draw_seeds(self._settings.seed, "play", number, count=1)
        return {"records": rollout.order(np.array([number]), seeds), "context": context}

    def keep(self, rollout: pa.RecordBatch) -> None:
        """Takes an episode into replay."""
        self._algorithm.replay.add(rollout)
        self.fresh.append(rollout)

    def drop_older(self, policy_version: int) -> int:
        """Drops and counts transitions of policies before this version."""
        self._algorithm.replay.drop_older(segmenter_version=START_VERSION, policy_version=policy_version)
        return 0

    def ready(self) -> bool:
        """Says whether replay holds anything."""
        return len(self._algorithm.replay) > 0

    def work(self, update: int) -> LearnerWork:
        """Draws the transitions of the n-th update from replay, in a random order as a draw comes by age."""
        size, count = self._learning.batch_size, self._algorithm.minibatches_per_update
        seed = self._settings.seed
        draw = self._algorithm.replay.sample(size * count, generator(seed, "replay", update))
        order = generator(seed, "replay-order", update).permutation(draw.records.num_rows)
        context = {
            "states": draw.states,
            "first_update": update * count,
            "total_updates": self._algorithm.play_updates * count,
        }
        records = draw.records.take(pa.array(order))
        return LearnerWork(kind="query", records=records, context=context, minibatches=(size,) * count)

    def learned(self, update: int, records: pa.RecordBatch, numbers: dict[str, Any]) -> None:
        """Takes over the errors of an update as priorities; the policy is one version further."""
        errors = np.asarray(numbers.pop("errors"))
        numbers["q_error"] = float(errors.mean())
        if self._learning.replay.priority_exponent > 0:
            self._algorithm.replay.update_priorities(np.asarray(records.column("id")), errors)
        self._algorithm.policy_version += 1

    def published(self, weights: ray.ObjectRef) -> None:
        """Takes the newest weights of the query network."""
        self._algorithm.take_weights(weights, QUERY)

    def weights(self) -> Mapping[str, tuple[int, list[ray.ObjectRef]]]:
        """Returns the newest weights of starting segmenter and query network."""
        return self._algorithm.weights
