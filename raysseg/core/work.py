"""Work for the learners: an Arrow record batch, what to do with it, and which rows of every minibatch are whose.

    records   |------ minibatch 1 ------|------ minibatch 2 ------|- minibatch 3 -|
    learner 0 |-- own --|               |-- own --|               |-- own --|
    learner 1           |---- own ------|         |---- own ------|         |own -|

It has the form that RLlib's LearnerGroup passes on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from ray.rllib.core.learner.training_data import TrainingData


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The rows of one minibatch that one learner passes through its networks.

    Args:
        total: rows of the whole minibatch.
        start: the first row that is this learner's.
        stop: one beyond its last row.
    """

    total: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of this learner's rows."""
        return self.stop - self.start

    @property
    def is_split(self) -> bool:
        """Whether other learners have other rows of the same minibatch; otherwise every learner has all of them."""
        return self.count < self.total

    def pieces(self, parts: int, world: int) -> list[Share]:
        """Cuts the share into pieces that are passed one after the other.

        All learners cut equally often, and never so finely that a piece is a single row of a larger minibatch: batch
        normalisation could make nothing of it.

        Args:
            parts: how many are asked for; fewer come where the minibatch is too small.
            world: number of learners.
        """
        smallest = self.total // world if self.is_split else self.total
        parts = max(1, min(parts, smallest, self.total // 2))
        edges = [self.start + self.count * part // parts for part in range(parts + 1)]
        return [Share(total=self.total, start=start, stop=stop) for start, stop in itertools.pairwise(edges)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """One learner's records of a minibatch.

    Args:
        records: its own rows.
        share: which rows of the whole minibatch these are.
        stop: number of records of the whole work order up to the end of this minibatch.
    """

    records: pa.RecordBatch
    share: Share
    stop: int


def share_of(total: int, part: int, world: int) -> Share:
    """Returns the rows of a minibatch that are one learner's.

    Args:
        total: rows of the minibatch; fewer than there are learners go whole to every learner.
        part: number of the learner, 0 to `world` − 1.
        world: number of learners.

    Source: design.
    """
    if total < world:
        return Share(total=total, start=0, stop=total)
    return Share(total=total, start=total * part // world, stop=total * (part + 1) // world)


def cut_minibatches(count: int, size: int, ends: Iterable[int] = ()) -> tuple[int, ...]:
    """Cuts consecutive records into minibatches that never cross the end of an epoch.

    Args:
        count: number of records.
        size: records of a minibatch; the last one of an epoch may be smaller.
        ends: numbers of records after which an epoch ends.

    Returns:
        The sizes of the minibatches, `count` together.

    Source: design.
    """
    sizes, start = [], 0
    for end in sorted({*ends, count}):
        while start < end:
            sizes.append(min(size, end - start))
            start += sizes[-1]
    return tuple(sizes)


@dataclasses.dataclass
class LearnerWork(TrainingData):
    """One call of the learners. RLlib's `TrainingData` is what `LearnerGroup.update` ships, shards and resolves.

    Args:
        kind: which of the learner's update functions takes it (`segmenter`, or a method's own, e.g. `operators`).
        records: the decisions to learn from; after `shard`, this learner's rows of them.
        context: plain values that hold for the whole record batch (label version, position in the schedule, seeds).
        minibatches: sizes of the consecutive minibatches of all records; empty: one minibatch of all.
        upcoming: the records of the next work order of the same kind, one minibatch, so that the learner can make them
            ready meanwhile; the next order repeats them, so a learner that has not made them ready loses nothing.
        part: which learner this work is for.
        world: number of learners that share the work.
    """

    kind: str = ""
    records: pa.RecordBatch | None = None
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    minibatches: tuple[int, ...] = ()
    upcoming: pa.RecordBatch | None = None
    part: int = 0
    world: int = 1

    def validate(self) -> None:
        """Raises `ValueError` unless the work names its kind and carries the records that its minibatches say."""
        if not self.kind or self.records is None:
            raise ValueError("Learner work needs a kind and records.")
        expected = sum(share.count for share in self._shares())
        if expected != self.records.num_rows or min(self.minibatches, default=1) < 1:
            raise ValueError(
                f"Learner work has {self.records.num_rows} records, but its minibatches {self.minibatches} "
                f"ask for {expected} of learner {self.part} of {self.world}."
            )

    def shard(self, num_shards: int, len_lookback_buffer: int | None = None, **kwargs: Any) -> list[Any]:
        """Returns the work of each learner: its own rows of every minibatch, as RLlib's pairs with further arguments.

        Args:
            num_shards: number of learners.
            len_lookback_buffer: RLlib's, of no use here.
            kwargs: RLlib's, of no use here.
        """
        if num_shards == 1:
            return [(self, {})]
        assert self.records is not None
        minibatches = self.minibatches or (self.records.num_rows,)
        return [
            (
                dataclasses.replace(
                    self,
                    records=_own_rows(self.records, minibatches, part, num_shards),
                    upcoming=None
                    if self.upcoming is None
                    else _own_rows(self.upcoming, (self.upcoming.num_rows,), part, num_shards),
                    minibatches=minibatches,
                    part=part,
                    world=num_shards,
                ),
                {},
            )
            for part in range(num_shards)
        ]

    def solve_refs(self) -> None:
        """The records travel by value: there is nothing to resolve."""

    def own_minibatches(self) -> list[Minibatch]:
        """Returns this learner's records of every minibatch, in order."""
        assert self.records is not None
        result, offset, stop = [], 0, 0
        for share in self._shares():
            stop += share.total
            result.append(Minibatch(records=self.records.slice(offset, share.count), share=share, stop=stop))
            offset += share.count
        return result

    def _shares(self) -> list[Share]:
        assert self.records is not None
        return [share_of(total, self.part, self.world) for total in self.minibatches or (self.records.num_rows,)]


def _own_rows(records: pa.RecordBatch, minibatches: tuple[int, ...], part: int, world: int) -> pa.RecordBatch:
    """Takes one learner's rows of every minibatch; a copy, as a slice would travel with everything around it."""
    rows, first = [], 0
    for total in minibatches:
        share = share_of(total, part, world)
        rows.append(np.arange(first + share.start, first + share.stop))
        first += total
    return records.take(pa.array(np.concatenate(rows)))
