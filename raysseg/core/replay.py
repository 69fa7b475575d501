"""The replay buffer:

Arrow record batches of transitions, sampled uniformly, dropped by version, saved with the checkpoint.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raysseg.core import rollout


class ReplayBuffer:
    """Keeps the newest transitions as they came over the wire; drawing is a pure function of the seed it is given.

    Args:
        capacity: largest number of transitions; the oldest record batches go first.

    Source: design (principle 3: one Arrow schema); the paper names no replay buffer, so its use is a reconstruction.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.dropped = 0
        self._batches: list[pa.RecordBatch] = []

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes of all transitions in the buffer."""
        return sum(rollout.wire_bytes(batch) for batch in self._batches)

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds transitions and lets the oldest go that exceed the capacity (always whole record batches, never the
        newest one).
        """
        if batch.num_rows:
            self._batches.append(batch)
        size = len(self)
        while len(self._batches) > 1 and size - self._batches[0].num_rows >= self.capacity:
            size -= self._batches.pop(0).num_rows

    def drop_older(self, *, segmenter_version: int, policy_version: int) -> int:
        """Drops transitions made by an older segmenter, or by a policy older than `policy_version`; returns and
        counts how many.
        """
        kept: list[pa.RecordBatch] = []
        before = len(self)
        for batch in self._batches:
            fresh = (np.asarray(batch.column("segmenter_version")) >= segmenter_version) & (
                np.asarray(batch.column("policy_version")) >= policy_version
            )
            if fresh.all():
                kept.append(batch)
            elif fresh.any():
                kept.append(batch.filter(pa.array(fresh)))
        self._batches = kept
        dropped = before - len(self)
        self.dropped += dropped
        return dropped

    def sample(self, count: int, generator: np.random.Generator) -> pa.RecordBatch:
        """Draws `count` transitions uniformly, without replacement where the buffer holds enough.

        Raises:
            ValueError: the buffer is empty.
        """
        size = len(self)
        if size == 0:
            raise ValueError("The replay buffer is empty.")
        picks = np.sort(generator.choice(size, size=count, replace=size < count))
        starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        owner = np.searchsorted(starts, picks, side="right") - 1
        taken = [
            self._batches[index].take(pa.array(picks[owner == index] - starts[index])) for index in np.unique(owner)
        ]
        return pa.Table.from_batches(taken).combine_chunks().to_batches()[0]

    def get_state(self) -> dict[str, bytes | int]:
        """Returns everything the buffer holds, for the checkpoint."""
        return {"transitions": rollout.to_bytes(self._batches), "dropped": self.dropped}

    def set_state(self, state: dict[str, bytes | int]) -> None:
        """Restores what `get_state` gave."""
        data = state["transitions"]
        assert isinstance(data, bytes)
        self._batches = rollout.from_bytes(data)
        self.dropped = int(state["dropped"])
