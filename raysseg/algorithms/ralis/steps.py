"""RALIS' played episodes: one Arrow record per step, and the bytes of a whole episode in memory and in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.core.replay import check_schema
from raysseg.core.replay_files import named_by_content, read_checked, write_once
from raysseg.errors import InputError, NonFiniteError

SCHEMA_VERSION = 1
MOST_BYTES = 2**31 - 1
"""Of one column of a record batch: its offsets have 32 bits."""


def _numbers(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))


STEP_SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("step", pa.int16(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("miou", pa.float32(), nullable=False),
        pa.field("epsilon", pa.float32(), nullable=False),
        pa.field("mean_q", pa.float32()),
        pa.field("rows", _numbers(pa.int32()), nullable=False),
        pa.field("regions", _numbers(pa.int32()), nullable=False),
        pa.field("chosen", _numbers(pa.int16()), nullable=False),
        pa.field("state", pa.binary(), nullable=False),
        pa.field("candidates", pa.binary(), nullable=False),
        pa.field("segmenter_version", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
    ],
    metadata={b"raysseg_step_schema": str(SCHEMA_VERSION).encode()},
)
"""One step of a played episode. `rows` and `regions` `[K]` are what was labelled, `chosen` `[K]` its index within each
pool; `state` `[S, d_state]` and `candidates` `[K, N, d_action]` are float16 in C order; `miou` is that after the step.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepShapes:
    """Shapes of what a step holds.

    Args:
        state: regions of D_S and numbers of each, `(S, d_state)`.
        candidates: pools, candidates of each and numbers of each, `(K, N, d_action)`.
    """

    state: tuple[int, int]
    candidates: tuple[int, int, int]

    @property
    def per_step(self) -> int:
        """K, the transitions of a step."""
        return self.candidates[0]


def step_records(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.RecordBatch:
    """Builds the record batch of an episode's steps.

    Args:
        columns: T values for each field of `STEP_SCHEMA`; `state` float `[T, S, d_state]` and `candidates` float
            `[T, K, N, d_action]` become float16.

    Raises:
        KeyError: a field is missing.
        NonFiniteError: a reward, a state or a candidate is not finite in half precision.

    Source: design (principle 3: one Arrow schema).
    """
    arrays = []
    for field in STEP_SCHEMA:
        values = columns[field.name]
        if field.name not in ("reward", "state", "candidates"):
            arrays.append(pa.array(list(values), field.type))
            continue
        packed = field.name != "reward"
        with np.errstate(over="ignore"):
            numbers: np.ndarray = np.asarray(values, np.float16 if packed else np.float32)
        finite = np.isfinite(numbers).reshape(len(numbers), -1).all(axis=1)
        if not finite.all():
            wrong = np.flatnonzero(~finite).tolist()
            raise NonFiniteError(f"The {field.name} of episode {columns['episode'][0]} is not finite at steps {wrong}.")
        arrays.append(to_binary(numbers) if packed else pa.array(numbers))
    return pa.RecordBatch.from_arrays(arrays, schema=STEP_SCHEMA)


def to_binary(vectors: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    """Packs numbers as half precision bytes in C order.

    Args:
        vectors: float `[n, ...]`, one entry per row that is not null.
        valid: bool `[rows]`, False where a row is null; None: no row is.

    Raises:
        ValueError: they are 2 GiB or more.

    Source: design.
    """
    data = np.ascontiguousarray(vectors, np.float16)
    if data.nbytes > MOST_BYTES:
        raise ValueError(f"{data.nbytes} bytes do not fit into one column, which holds {MOST_BYTES}.")
    valid = np.ones(len(data), np.bool_) if valid is None else valid
    offsets = np.concatenate([[0], np.cumsum(valid)]) * (prod(data.shape[1:]) * data.itemsize)
    mask = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    buffers = [mask, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(valid), buffers, null_count=int((~valid).sum()))


def from_binary(column: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Returns what `to_binary` packed without the null rows, float16 `[n, *shape]`; a view where no row is null.

    Raises:
        ValueError: an entry has another number of bytes.

    Source: design.
    """
    if column.null_count:
        column = column.drop_null()
    size, count = prod(shape) * 2, len(column)
    if count == 0:
        return np.empty((0, *shape), np.float16)
    _, offsets, data = column.buffers()
    starts: np.ndarray = np.frombuffer(offsets, np.int32, count + 1, 4 * column.offset)
    if (wrong := np.diff(starts) != size).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"Row {row} has {starts[row + 1] - starts[row]} bytes; {size} are expected of half precision {list(shape)}."
        )
    return np.frombuffer(data, np.float16, count * prod(shape), int(starts[0])).reshape(count, *shape)


class Episode:
    """One episode in the bytes of its file, and its columns as views of them.

    Args:
        data: Arrow IPC stream of one record batch of `STEP_SCHEMA`.
        shapes: what the columns' entries must have.

    Raises:
        ValueError: the columns are not those of one whole episode.
    """

    def __init__(self, data: pa.Buffer, shapes: StepShapes) -> None:
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
        check_schema(batch, STEP_SCHEMA)
        self.data, self.steps = data, batch.num_rows
        self.states = from_binary(batch.column("state"), shapes.state)
        self.candidates = from_binary(batch.column("candidates"), shapes.candidates)
        lengths = batch.column("chosen").value_lengths().to_numpy()
        if (lengths != shapes.per_step).any():
            raise ValueError(
                f"A step chose {lengths.tolist()} regions; one of each of {shapes.per_step} pools is expected."
            )
        self.chosen = batch.column("chosen").flatten().to_numpy().reshape(self.steps, -1)
        if self.chosen.min() < 0 or self.chosen.max() >= shapes.candidates[1]:
            raise ValueError(f"A step chose outside of a pool of {shapes.candidates[1]} candidates.")
        self.rewards = batch.column("reward").to_numpy()
        self.number = int(batch.column("episode")[0].as_py())
        numbers = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("episode", "step", "terminated"))
        episodes, steps, terminated = numbers
        if (episodes != self.number).any() or (steps != np.arange(self.steps)).any():
            raise ValueError(f"Steps {steps.tolist()} of the episodes {episodes.tolist()} are not one whole episode.")
        if terminated[:-1].any() or not terminated[-1]:
            raise ValueError(f"Episode {self.number} must end at its last step, and not before.")
        self._entry: dict[str, Any] | None = None
        self._folders: set[Path] = set()

    @classmethod
    def copy_of(cls, batch: pa.RecordBatch, shapes: StepShapes) -> Episode:
        """Copies a record batch, which may lie in memory that others want back, into just as many bytes as it needs."""
        size = pa.MockOutputStream()
        _write(size, batch)
        data = pa.allocate_buffer(size.size())
        _write(pa.FixedSizeBufferWriter(data), batch)
        return cls(data, shapes)

    @classmethod
    def read(cls, folder: Path, entry: dict[str, Any], shapes: StepShapes) -> Episode:
        """Reads what `write` wrote; raises InputError where it is missing, changed or of other shapes."""
        data = pa.py_buffer(read_checked(folder, entry))
        try:
            episode = cls(data, shapes)
        except ValueError as error:
            raise InputError(f"The episode {entry['file']} in {folder} does not fit the settings: {error}") from None
        episode._entry = entry
        episode._folders.add(folder)
        return episode

    def transitions(
        self, steps: np.ndarray, pools: np.ndarray, return_steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies what some transitions have besides their states.

        Args:
            steps: int64 `[n]`.
            pools: int64 `[n]`.
            return_steps: how far a transition reaches.

        Returns:
            Actions float16 `[n, d_action]`, the same pools so many steps later float16 `[m, N, d_action]` where the episode goes
            on for as long, and the episode's number int64 `[n]`.
        """
        goes_on = steps + return_steps < self.steps
        return (
            self.candidates[steps, pools, self.chosen[steps, pools]],
            self.candidates[steps[goes_on] + return_steps, pools[goes_on]],
            np.full(len(steps), self.number),
        )

    def write(self, folder: Path, first_id: int) -> dict[str, Any]:
        """Writes the bytes where they are not in the folder yet, and returns the file's entry."""
        if self._entry is None:
            self._entry = named_by_content(f"episode-{first_id:012d}", ".arrow", self.data)
        write_once(folder, self._entry, self.data, trusted=folder in self._folders)
        self._folders.add(folder)
        return self._entry


def _write(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, STEP_SCHEMA) as writer:
        writer.write_batch(batch)
