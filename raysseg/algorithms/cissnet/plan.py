"""What CiSS-Net tells the loop: which crops actors play, and that every episode is learned from once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from raysseg.algorithms.cissnet.module import CONTEXT
from raysseg.core import rollout
from raysseg.core.seeding import draw_order, draw_seeds
from raysseg.core.work import LearnerWork

if TYPE_CHECKING:
    from raysseg.algorithms.cissnet.algorithm import CiSSNet


class ContextPlan:
    """The learning of a run, on policy; synchronous and asynchronous loops ask it the same questions.

    Args:
        algorithm: the run, which holds fresh rollouts, versions and published weights.
        steps: of every episode.
        first: updates that came before this plan's; crops, the schedule and dropout count them.

    Source: the order of crops is a reconstruction; what is learned is Eq. 5-7.
    """

    goes_on_from_replay = False

    def __init__(self, algorithm: CiSSNet, *, steps: int, first: int) -> None:
        self._algorithm, self._steps, self._first = algorithm, steps, first
        self._settings = algorithm.settings
        self.learned_from: list[pa.RecordBatch] = []
        self._under_way = 0

    def rollout_order(self, number: int, policy_version: int) -> Mapping[str, Any]:
        """Returns the arguments of the n-th rollout: all images in a new order each epoch, each crop under its own seed.

        The n-th crop of a run is the same however many actors share an update.
        """
        size, seed = self._settings.rollout_size, self._settings.seed
        count = len(self._algorithm.train_keys)
        number += self._first * self._settings.rollouts_per_update
        epochs, at = np.divmod(np.arange(number * size, (number + 1) * size), count)
        orders = {epoch: draw_order(seed, "context", int(epoch), count=count) for epoch in np.unique(epochs)}
        seeds = {epoch: draw_seeds(seed, "context-crops", int(epoch), count=count) for epoch in orders}
        places = list(zip(epochs, at, strict=True))
        context = {
            "segmenter_version": self._algorithm.segmenter_version,
            "policy_version": policy_version,
            "steps": self._steps,
            "probabilities": self._settings.engine.mode == "asynchronous",
        }
        rows = np.array([orders[epoch][index] for epoch, index in places])
        return {
            "records": rollout.order(rows, np.array([seeds[epoch][index] for epoch, index in places])),
            "context": context,
        }

    def keep(self, rollout: pa.RecordBatch) -> None:
        """Takes a rollout to be learned from."""
        self._algorithm.fresh.append(rollout)

    def drop_older(self, policy_version: int) -> int:
        """Drops rollouts of policies before this version, which have to be played again; returns how many.

        What comes next meets the policy after the updates that are with the learner, so these count as done.
        """
        oldest = policy_version + self._under_way
        kept = [one for one in self._algorithm.fresh if one.column("policy_version")[0].as_py() >= oldest]
        dropped = len(self._algorithm.fresh) - len(kept)
        self._algorithm.fresh[:] = kept
        return dropped

    def ready(self) -> bool:
        """Says whether an update's rollouts are there."""
        return len(self._algorithm.fresh) >= self._settings.rollouts_per_update

    def work(self, update: int) -> LearnerWork:
        """Takes the oldest rollouts for the n-th update; where those of the next one are there too, they can be made ready."""
        count, fresh = self._settings.rollouts_per_update, self._algorithm.fresh
        taken, fresh[:] = fresh[:count], fresh[count:]
        self.learned_from += taken
        upcoming = _together(fresh[:count]) if self._settings.engine.prefetch and self.ready() else None
        records = _together(taken)
        version = self._algorithm.policy_version + self._under_way
        self._under_way += 1
        context = {"update": self._first + update, "policy_version": version, "seed": self._settings.seed}
        return LearnerWork(
            kind="context", records=records, context=context, minibatches=(records.num_rows,), upcoming=upcoming
        )

    def learned(self, update: int, records: pa.RecordBatch, numbers: dict[str, Any]) -> None:
        """The policy is one version further."""
        self._algorithm.policy_version += 1
        self._under_way -= 1

    def published(self, weights: ray.ObjectRef) -> None:
        """Takes the newest weights of the networks on X."""
        self._algorithm.take_weights(weights, CONTEXT)

    def weights(self) -> Mapping[str, tuple[int, list[ray.ObjectRef]]]:
        """Returns the newest weights of the segmenter and of the networks on X."""
        return self._algorithm.weights


def _together(rollouts: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(rollouts).combine_chunks().to_batches()[0]
