"""The transitions of a replay buffer, or of one shard of it: compacted into immutable segments that are saved once.

    add ──▶ record batches as they came ── 1,024 rows, or a checkpoint ──▶ segment: one Arrow IPC stream in memory,
                                                                          and the very same bytes in a file

This module knows no settings, so that the process of a shard loads neither torch nor RLlib.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.core import rollout
from raysseg.core.replay_files import named_by_content, read_checked, write_once
from raysseg.core.replay_index import RowIndex

SEGMENT_ROWS = 1024

VERSIONS = ("segmenter_version", "policy_version")
"""Columns that every schema of transitions has."""


def drawn_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of drawn transitions: their own, `id` int64 and `mass` float64. Source: design."""
    return schema.append(pa.field("id", pa.int64(), nullable=False)).append(
        pa.field("mass", pa.float64(), nullable=False)
    )


@dataclasses.dataclass(slots=True, kw_only=True)
class _Piece:
    """A record batch of transitions; sealed ones have the bytes of their file in `data`, and `batch` is a view of it."""

    batch: pa.RecordBatch
    live: int
    data: pa.Buffer | None = None
    entry: dict[str, Any] | None = None
    folders: set[Path] = dataclasses.field(default_factory=set)

    @property
    def nbytes(self) -> int:
        return rollout.wire_bytes(self.batch) if self.data is None else self.data.size


class ReplayRows:
    """Holds the newest `capacity` transitions; who owns it numbers them, and says at which places to draw.

    Args:
        capacity: largest number of transitions; the oldest go first, one by one.
        priority_exponent: 0 makes every transition weigh the same; else it weighs priority^exponent.
        schema: columns of a transition, among them `VERSIONS`.

    Raises:
        ValueError: the schema lacks one of `VERSIONS`.

    Source: design (principle 3: one Arrow schema).
    """

    def __init__(self, capacity: int, priority_exponent: float, schema: pa.Schema = rollout.TRANSITION_SCHEMA) -> None:
        if missing := [name for name in VERSIONS if name not in schema.names]:
            raise ValueError(f"Transitions need the column {missing[0]}, which is not among {schema.names}.")
        self._capacity = capacity
        self._exponent = priority_exponent
        self._schema, self._drawn_schema = schema, drawn_schema(schema)
        self._segment_schema = self._drawn_schema.remove(len(self._drawn_schema) - 1)
        self._index = RowIndex()
        self._pieces: dict[int, _Piece] = {}
        self._open: set[int] = set()
        self._next_piece = 0
        self._ends: np.ndarray | None = None

    def size(self) -> int:
        """Returns the number of transitions."""
        return len(self._index)

    def ids(self) -> np.ndarray:
        """Returns the identifiers of all transitions, int64 `[N]`, ascending; void after the next change."""
        return self._index["id"]

    def nbytes(self) -> int:
        """Returns the bytes of all record batches held, without the index (36 bytes a transition)."""
        return sum(piece.nbytes for piece in self._pieces.values())

    # ---- adding and dropping ----------------------------------------------------------------------------------------

    def add(self, batch: pa.RecordBatch, first_id: int, priority: float) -> None:
        """Adds transitions, and lets the oldest go that exceed the capacity.

        Args:
            batch: of the schema.
            first_id: identifier of the first one, above all before; the others follow consecutively.
            priority: of all of them, > 0.
        """
        count = batch.num_rows
        if count == 0:
            return
        batch = pa.RecordBatch.from_arrays(batch.columns, schema=self._schema)
        number = self._hold(_Piece(batch=batch, live=count))
        self._open.add(number)
        self._index.append(
            count,
            id=np.arange(first_id, first_id + count),
            piece=number,
            row=np.arange(count),
            **{name: batch.column(name).to_numpy() for name in VERSIONS},
            mass=self._masses(np.array(priority)),
        )
        self._evict()
        self._ends = None
        if sum(self._pieces[number].live for number in self._open) >= SEGMENT_ROWS:
            self._seal()

    def drop_older(self, segmenter_version: int, policy_version: int) -> int:
        """Drops transitions of an older segmenter or of an older policy, and returns how many."""
        index = self._index
        fresh = (index["segmenter_version"] >= segmenter_version) & (index["policy_version"] >= policy_version)
        dropped = len(index) - int(fresh.sum())
        if dropped:
            self._release(index["piece"][~fresh])
            index.keep(fresh)
            self._ends = None
            self._compact()
        return dropped

    def _hold(self, piece: _Piece) -> int:
        number = self._next_piece
        self._pieces[number] = piece
        self._next_piece += 1
        return number

    def _evict(self) -> None:
        over = len(self._index) - self._capacity
        if over > 0:
            self._release(self._index["piece"][:over])
            self._index.drop_front(over)

    def _release(self, pieces: np.ndarray) -> None:
        """Takes rows of the pieces `[N]` off their counts, and lets go of the pieces that no row is left of."""
        for number, count in zip(*np.unique(pieces, return_counts=True), strict=True):
            piece = self._pieces[number]
            piece.live -= int(count)
            if piece.live == 0:
                del self._pieces[number]
                self._open.discard(number)

    # ---- segments ---------------------------------------------------------------------------------------------------

    def _seal(self) -> None:
        """Makes segments of the record batches as they came, which hold the newest rows."""
        count = sum(self._pieces[number].live for number in self._open)
        self._rewrite(np.arange(len(self._index) - count, len(self._index)))

    def _compact(self) -> None:
        """Makes new segments of those of which less than half is left, so that what is gone never outweighs what is there."""
        sparse = [
            number
            for number, piece in self._pieces.items()
            if number not in self._open and 2 * piece.live < piece.batch.num_rows
        ]
        self._rewrite(np.flatnonzero(np.isin(self._index["piece"], sparse)))

    def _rewrite(self, places: np.ndarray) -> None:
        """Copies all rows that are left of some pieces into new segments, which take the pieces' place."""
        for start in range(0, len(places), SEGMENT_ROWS):
            part = places[start : start + SEGMENT_ROWS]
            columns = [*self._gather(part).columns, pa.array(self._index["id"][part])]
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, self._segment_schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._segment_schema))
            number = self._hold(self._sealed(sink.getvalue(), len(part)))
            self._release(self._index["piece"][part])
            self._index["piece"][part] = number
            self._index["row"][part] = np.arange(len(part))

    def _sealed(self, data: pa.Buffer, live: int) -> _Piece:
        """Returns the piece whose file has these bytes."""
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
        columns = batch.columns[: len(self._schema)]
        return _Piece(batch=pa.RecordBatch.from_arrays(columns, schema=self._schema), live=live, data=data)

    def _gather(self, places: np.ndarray) -> pa.RecordBatch:
        """Copies the transitions at some places of the index."""
        pieces, rows = self._index["piece"][places], self._index["row"][places]
        breaks: np.ndarray = np.flatnonzero((np.diff(pieces) != 0) | (np.diff(rows) != 1)) + 1
        starts = np.concatenate([[0], breaks])
        lengths = np.diff(np.concatenate([starts, [len(places)]]))
        slices = [
            self._pieces[pieces[start]].batch.slice(rows[start], length)
            for start, length in zip(starts, lengths, strict=True)
        ]
        if len(slices) == 1:
            # Joining copies; one slice alone would keep its whole segment alive, and a pickle of it would hold all of it.
            return slices[0].take(pa.array(np.arange(len(places))))
        return pa.Table.from_batches(slices).combine_chunks().to_batches()[0]

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def _masses(self, priorities: np.ndarray) -> np.ndarray:
        return np.power(priorities, self._exponent).astype(np.float32)

    def extent(self) -> float:
        """Returns the length of the line on which places are drawn: the transitions, or the sum of their masses."""
        if self._exponent == 0 or len(self._index) == 0:
            return len(self._index)
        return float(self._ends_of_rows()[-1])

    def _ends_of_rows(self) -> np.ndarray:
        """Returns where every row ends on the line, float64 `[N]`; kept until something changes."""
        if self._ends is None:
            self._ends = np.cumsum(self._index["mass"], dtype=np.float64)
        return self._ends

    def at(self, places: np.ndarray) -> pa.RecordBatch:
        """Returns the transitions at some places of the line, with the columns of `drawn_schema`.

        Args:
            places: ascending; int64 `[n]` in [0, size) where drawing is uniform, else float64 `[n]` in [0, extent).
        """
        if self._exponent > 0:
            places = np.minimum(np.searchsorted(self._ends_of_rows(), places, side="right"), len(self._index) - 1)
        columns = [
            *self._gather(places).columns,
            pa.array(self._index["id"][places]),
            pa.array(self._index["mass"][places].astype(np.float64)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._drawn_schema)

    def update_priorities(self, ids: np.ndarray, priorities: np.ndarray) -> None:
        """Gives transitions new priorities where they are still there.

        Args:
            ids: int64 `[n]`; of one that occurs twice the last priority counts.
            priorities: float64 `[n]`, > 0.
        """
        held = self._index["id"]
        if len(held) == 0:
            return
        places: np.ndarray = np.minimum(np.searchsorted(held, ids), len(held) - 1)
        there: np.ndarray = held[places] == ids
        self._index["mass"][places[there]] = self._masses(priorities[there])
        self._ends = None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the segments that are not in the folder yet, and returns what `load` needs besides them.

        Raises:
            OSError: a file could not be written.
        """
        self._seal()
        starts, entries, rows = {}, [], 0
        for number, piece in self._pieces.items():
            assert piece.data is not None
            if piece.entry is None:
                first = self._first_id(piece)
                piece.entry = named_by_content(f"{first:012d}", ".arrow", piece.data)
            write_once(folder, piece.entry, piece.data, trusted=folder in piece.folders)
            piece.folders.add(folder)
            entries.append(piece.entry)
            starts[number] = rows
            rows += piece.batch.num_rows
        live = np.sort(np.array([starts[number] for number in self._index["piece"]], np.int64) + self._index["row"])
        state: dict[str, Any] = {
            "segments": entries,
            "live": _ranges(live),
            "priority_exponent": self._exponent,
            "priorities": None,
        }
        if self._exponent > 0 and len(self._index):
            file = io.BytesIO()
            np.save(file, self._index["mass"])
            data = file.getvalue()
            state["priorities"] = named_by_content("priorities", ".npy", data)
            write_once(folder, state["priorities"], data, trusted=False)
        return state

    @staticmethod
    def _first_id(piece: _Piece) -> int:
        with pa.ipc.open_stream(piece.data) as reader:
            return int(reader.read_next_batch().column("id")[0].as_py())

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Replaces everything by what `save` wrote.

        Priorities of another exponent are converted; a smaller capacity keeps the newest.

        Raises:
            InputError: a file is missing, truncated or changed.
        """
        masses = self._load_masses(folder, state)
        self._index, self._pieces, self._open, self._ends = RowIndex(), {}, set(), None
        parts: list[dict[str, np.ndarray]] = []
        for entry in state["segments"]:
            data = pa.py_buffer(read_checked(folder, entry))
            with pa.ipc.open_stream(data) as reader:
                batch = reader.read_next_batch()
            piece = self._sealed(data, 0)
            piece.entry = entry
            piece.folders.add(folder)
            number = self._hold(piece)
            part = {name: batch.column(name).to_numpy() for name in ("id", *VERSIONS)}
            parts.append(part | {"piece": np.full(len(batch), number), "row": np.arange(len(batch))})
        if parts:
            live = np.concatenate([np.arange(first, stop) for first, stop in state["live"]])
            columns = {name: np.concatenate([part[name] for part in parts])[live] for name in parts[0]}
            order = np.argsort(columns["id"])
            self._index.append(len(live), **{name: column[order] for name, column in columns.items()}, mass=masses)
            for number, count in zip(*np.unique(columns["piece"], return_counts=True), strict=True):
                self._pieces[number].live = int(count)
        self._evict()

    def _load_masses(self, folder: Path, state: dict[str, Any]) -> np.ndarray | float:
        """Returns the masses in the order of the identifiers, `[N]`, or 1 where priorities were or are not in use."""
        if state["priorities"] is None or self._exponent == 0:
            return 1.0
        masses = np.load(io.BytesIO(read_checked(folder, state["priorities"])))
        if state["priority_exponent"] == self._exponent:
            return masses
        return self._masses(masses.astype(np.float64) ** (1 / state["priority_exponent"]))


def _ranges(values: np.ndarray) -> list[list[int]]:
    """Returns the half-open ranges that ascending integers `[N]` fill."""
    if len(values) == 0:
        return []
    breaks: np.ndarray = np.flatnonzero(np.diff(values) != 1) + 1
    starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(values)]])
    return [[int(values[start]), int(values[stop - 1]) + 1] for start, stop in zip(starts, stops, strict=True)]
