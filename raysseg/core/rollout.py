"""The one schema of rollouts: what an actor sends, what the replay buffer holds and what is written as Parquet.

A transition carries decisions, never dense tensors: the sample's key, the augmentation's seed, the action, compressed
label maps, the reward and the versions of everything it was made with. The learner rebuilds the dense state next to
the loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1

TRANSITION_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("stage", pa.int16(), nullable=False),
        pa.field("step", pa.int16(), nullable=False),
        pa.field("labels", pa.binary()),
        pa.field("action", pa.binary(), nullable=False),
        pa.field("next_labels", pa.binary(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("reward_parts", pa.list_(pa.field("element", pa.float32()))),
        pa.field("value", pa.float32()),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("label_version", pa.int32(), nullable=False),
        pa.field("segmenter_version", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
    ],
    metadata={b"raysseg_rollout_schema": str(SCHEMA_VERSION).encode()},
)
"""`labels` is null where the label map before the action is exactly the stored one of `label_version` under the
seed's augmentation.
"""


def transitions(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.RecordBatch:
    """Builds a record batch of transitions.

    Args:
        columns: one sequence of N values for each field of `TRANSITION_SCHEMA`.

    Raises:
        KeyError: a field is missing.
        pyarrow.ArrowInvalid: a value does not fit its field.

    Source: reconstruction.
    """
    arrays = [pa.array(columns[field.name], type=field.type) for field in TRANSITION_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=TRANSITION_SCHEMA)


def order(rows: np.ndarray, seeds: np.ndarray) -> pa.RecordBatch:
    """Builds the record batch of a work order: which rows of the split `[N]` int, under which seeds `[N]` int64.

    Source: reconstruction.
    """
    return pa.RecordBatch.from_arrays(
        [pa.array(rows, type=pa.int32()), pa.array(seeds, type=pa.int64())], names=["row", "seed"]
    )


def to_bytes(batches: Sequence[pa.RecordBatch]) -> bytes:
    """Serialises record batches as one Arrow IPC stream; an empty list gives empty bytes. Source: reconstruction."""
    if not batches:
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> list[pa.RecordBatch]:
    """Reads what `to_bytes` wrote. Raises `pyarrow.ArrowInvalid` for torn data. Source: reconstruction."""
    if not data:
        return []
    with pa.ipc.open_stream(data) as reader:
        return list(reader)


def write_parquet(batches: Sequence[pa.RecordBatch], path: Path) -> None:
    """Writes record batches of one schema as a Parquet file, whose folder is made. Source: reconstruction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_batches(batches), path)


def remove_later(folder: Path, place: tuple[int, ...]) -> None:
    """Removes the files of iterations that a resumed run does again; one of them may write none, and another's would stay.

    Args:
        folder: of `write_parquet`'s files, named by the numbers of their place; need not exist.
        place: files whose numbers are these or later ones go.

    Source: reconstruction.
    """
    for path in folder.glob("*.parquet"):
        if tuple(int(number) for number in re.findall(r"\d+", path.stem)) >= place:
            path.unlink()


def wire_bytes(batch: pa.RecordBatch) -> int:
    """Returns the number of bytes of a record batch as an Arrow IPC message, which is what crosses a process boundary.

    Source: reconstruction.
    """
    return pa.ipc.get_record_batch_size(batch)
