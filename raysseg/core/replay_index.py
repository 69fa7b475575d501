"""One entry per transition in a replay buffer, oldest first, in arrays that grow at one end and shrink at the other."""

from __future__ import annotations

import numpy as np

COLUMNS: dict[str, type[np.generic]] = {
    "id": np.int64,
    "piece": np.int64,
    "row": np.int64,
    "segmenter_version": np.int32,
    "policy_version": np.int32,
    "mass": np.float32,
}
"""`piece` and `row` say which record batch holds the transition and where; `mass` is |priority|^exponent, and 1 where
drawing is uniform.
"""


class RowIndex:
    """Columns of equal length; adding to the end and dropping from the front cost constant time on the mean.

    Source: design.
    """

    def __init__(self) -> None:
        self._arrays = {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
        self._start = self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, name: str) -> np.ndarray:
        """A view `[N]` of one column, which writes through and is void after the next change of length."""
        return self._arrays[name][self._start : self._stop]

    def append(self, count: int, **values: np.ndarray | float) -> None:
        """Adds entries at the end.

        Args:
            count: how many.
            values: one array `[count]` or number for each of `COLUMNS`.
        """
        if self._stop + count > len(self._arrays["id"]):
            room = max(2 * (len(self) + count), 1024) - len(self)
            self._arrays = {name: np.concatenate([self[name], np.empty(room, kind)]) for name, kind in COLUMNS.items()}
            self._start, self._stop = 0, len(self)
        for name in COLUMNS:
            self._arrays[name][self._stop : self._stop + count] = values[name]
        self._stop += count

    def drop_front(self, count: int) -> None:
        """Drops the oldest entries."""
        self._start += count

    def keep(self, mask: np.ndarray) -> None:
        """Keeps only the entries where `mask`, bool `[N]`, is true."""
        count = int(mask.sum())
        for name in COLUMNS:
            self._arrays[name][self._start : self._start + count] = self[name][mask]
        self._stop = self._start + count
