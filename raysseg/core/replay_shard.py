"""One shard of a replay buffer, as the process of an actor runs it: neither torch nor RLlib is loaded here.

Transitions come and go as Arrow IPC bytes, which cost a sixth of a pickled record batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raysseg.core import rollout
from raysseg.core.replay_rows import ReplayRows


class ReplayShard:
    """`ReplayRows` whose every change answers with the new length of the line of places, so that a draw need not ask.

    Args:
        capacity: largest number of transitions.
        priority_exponent: 0 makes every transition weigh the same.

    Source: design.
    """

    def __init__(self, capacity: int, priority_exponent: float) -> None:
        self._rows = ReplayRows(capacity, priority_exponent)

    def size(self) -> int:
        """Returns the number of transitions."""
        return self._rows.size()

    def nbytes(self) -> int:
        """Returns the bytes of all record batches held."""
        return self._rows.nbytes()

    def add(self, data: bytes, first_id: int, priority: float) -> float:
        """Adds the transitions of one Arrow IPC stream; see `ReplayRows.add`."""
        for batch in rollout.from_bytes(data):
            self._rows.add(batch, first_id, priority)
        return self._rows.extent()

    def at(self, places: np.ndarray) -> bytes:
        """Returns the transitions at some places as one Arrow IPC stream; see `ReplayRows.at`."""
        return rollout.to_bytes([self._rows.at(places)])

    def update_priorities(self, ids: np.ndarray, priorities: np.ndarray) -> float:
        """Gives transitions new priorities where they are here; see `ReplayRows.update_priorities`."""
        self._rows.update_priorities(ids, priorities)
        return self._rows.extent()

    def drop_older(self, segmenter_version: int, policy_version: int) -> tuple[int, float]:
        """Drops what is older and returns how many; see `ReplayRows.drop_older`."""
        return self._rows.drop_older(segmenter_version, policy_version), self._rows.extent()

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes what is not in the folder yet; see `ReplayRows.save`."""
        return self._rows.save(folder)

    def load(self, folder: Path, state: dict[str, Any]) -> float:
        """Replaces everything by what `save` wrote; see `ReplayRows.load`."""
        self._rows.load(folder, state)
        return self._rows.extent()
