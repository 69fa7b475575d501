"""The segmenter's own training as work orders: which rows, in which order, at which place of which schedule."""

from __future__ import annotations

import dataclasses

import numpy as np

from raysseg.core import rollout
from raysseg.core.seeding import draw_order, draw_seeds
from raysseg.core.settings import TrainingSettings
from raysseg.core.work import LearnerWork, cut_minibatches


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmenterPhase:
    """Some updates of the segmenter on some rows of the training split.

    Args:
        rows: int64 `[N]`, those that an epoch goes through.
        version: label version of their maps.
        updates: of the whole phase; its last epoch may be cut.
        first_epoch: number of its first epoch, which orders and augmentations are drawn by.
        where: what these draws belong to.
        first_update: number of its first update on the learning-rate schedule.
        total_updates: length of that schedule.
        learning_rate: at the start of that schedule.
        self_training: whether self-training acts here, where the settings give it a weight.

    Source: design.
    """

    rows: np.ndarray
    version: int
    updates: int
    first_epoch: int
    where: tuple[int | str, ...] = ("segmenter",)
    first_update: int
    total_updates: int
    learning_rate: float
    self_training: bool = False

    def epoch_after(self, updates: int, batch_size: int) -> float:
        """Returns how many epochs are done after some updates of the phase, the earlier ones of the run included."""
        return self.first_epoch + updates / -(-len(self.rows) // batch_size)

    def work(self, step: int, updates: int, training: TrainingSettings, seed: int) -> LearnerWork:
        """Returns the next updates as one work order.

        Args:
            step: updates of the phase that are done.
            updates: how many follow now, at least 1.
            training: batch size, whether classes are weighted, and whether self-training has a weight.
            seed: of the run.
        """
        count, size = len(self.rows), training.batch_size
        per_epoch = -(-count // size)
        rows, seeds, ends, done = [], [], [], 0
        for update in range(step, step + updates):
            epoch, batch = divmod(update, per_epoch)
            part = slice(batch * size, min((batch + 1) * size, count))
            where = (*self.where, self.first_epoch + epoch)
            rows.append(self.rows[draw_order(seed, *where, count=count)[part]])
            seeds.append(draw_seeds(seed, *where, count=count)[part])
            done += len(rows[-1])
            if part.stop == count:
                ends.append(done)
        context = {
            "version": self.version,
            "rows": self.rows if training.class_balance_power > 0 else None,
            "first_update": self.first_update + step,
            "total_updates": self.total_updates,
            "learning_rate": self.learning_rate,
            "epoch_ends": ends,
            "seed": seed,
            "self_training": self.self_training and training.self_training.weight > 0,
        }
        records = rollout.order(np.concatenate(rows), np.concatenate(seeds))
        minibatches = cut_minibatches(records.num_rows, size, ends)
        return LearnerWork(kind="segmenter", records=records, context=context, minibatches=minibatches)
