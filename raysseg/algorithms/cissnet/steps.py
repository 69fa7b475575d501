"""What an actor sends of an episode: which crop, the compressed p-maps, bit-packed actions, and nothing dense.

    column          bytes at 713×713 (90×90 positions, T = 8)
    predictions     Y^0 … Y^T, zstd of uint8: the states of the learner are those that were played, whatever its weights
    actions         B^0 … B^{T−1}, one bit each: 8,100
    probabilities   μ(a | s) of the actions taken, zstd of float16: 130,000 at most; only where another policy may learn

Rewards are a function of p-maps, actions and labels, so the learner computes them again; their means travel to be logged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.errors import InputError

STEP_SCHEMA_VERSION = 1


def _numbers(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))


EPISODE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("predictions", pa.binary(), nullable=False),
        pa.field("actions", pa.binary(), nullable=False),
        pa.field("probabilities", pa.binary()),
        pa.field("reward", _numbers(pa.float32()), nullable=False),
        pa.field("context_share", _numbers(pa.float32()), nullable=False),
        pa.field("context_right", _numbers(pa.float32()), nullable=False),
        pa.field("accuracy", _numbers(pa.float32()), nullable=False),
        pa.field("segmenter_version", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
    ],
    metadata={b"raysseg_context_schema": str(STEP_SCHEMA_VERSION).encode()},
)
"""One episode. `height` and `width` are those of its maps; `reward`, `context_share` and `context_right` `[T]` are means over
its valid positions (of r, of what became context, of what did and is right), `accuracy` `[T+1]` the share of these that Y^t
has right.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeMaps:
    """The maps of B episodes of T steps, as they were played.

    Args:
        predictions: Y^0 … Y^T, uint8 `[T+1, B, h, w]`.
        actions: B^0 … B^{T−1}, bool `[T, B, h, w]`.
        probabilities: μ of the actions taken, float16 `[T, B, h, w]`, or None.
    """

    predictions: np.ndarray
    actions: np.ndarray
    probabilities: np.ndarray | None


def episode_records(columns: Mapping[str, Sequence[Any] | np.ndarray], maps: EpisodeMaps) -> pa.RecordBatch:
    """Builds the record batch of B episodes.

    Args:
        columns: B values for every column that is not a map or its size.
        maps: of the episodes.

    Source: design.
    """
    codec = pa.Codec("zstd", 3)
    count = maps.predictions.shape[1]
    height, width = maps.predictions.shape[2:]

    def packed(array: np.ndarray) -> list[bytes]:
        return [codec.compress(np.ascontiguousarray(array[:, index]), asbytes=True) for index in range(count)]

    every = {
        **columns,
        "height": [height] * count,
        "width": [width] * count,
        "predictions": packed(maps.predictions),
        "actions": [np.packbits(maps.actions[:, index]).tobytes() for index in range(count)],
        "probabilities": [None] * count if maps.probabilities is None else packed(maps.probabilities),
    }
    arrays = [pa.array(every[field.name], type=field.type) for field in EPISODE_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=EPISODE_SCHEMA)


def read_maps(records: pa.RecordBatch) -> EpisodeMaps:
    """Reads the maps of episodes.

    Args:
        records: of `EPISODE_SCHEMA`, B of them, all of one size and number of steps.

    Raises:
        InputError: where their sizes or steps differ.

    Source: design.
    """
    sizes = set(zip(records.column("height").to_pylist(), records.column("width").to_pylist(), strict=True))
    if len(sizes) != 1:
        raise InputError(f"Episodes of one minibatch have maps of the sizes {sorted(sizes)}, expected one size.")
    lengths = {len(one) for one in records.column("reward")}
    if len(lengths) != 1:
        raise InputError(f"Episodes of one minibatch have {sorted(lengths)} steps, expected one number of steps.")
    ((height, width),), (steps,) = sizes, lengths
    cells, count = height * width, records.num_rows

    def unpacked(name: str, kind: type, length: int) -> np.ndarray:
        size = length * cells * np.dtype(kind).itemsize
        values = [
            np.frombuffer(pa.decompress(one.as_buffer(), size, codec="zstd"), dtype=kind)
            for one in records.column(name)
        ]
        return np.stack(values).reshape(count, length, height, width).swapaxes(0, 1)

    bits = [
        np.unpackbits(np.frombuffer(one.as_buffer(), np.uint8), count=steps * cells)
        for one in records.column("actions")
    ]
    known = records.column("probabilities").null_count == 0
    return EpisodeMaps(
        predictions=unpacked("predictions", np.uint8, steps + 1),
        actions=np.stack(bits).astype(bool).reshape(count, steps, height, width).swapaxes(0, 1),
        probabilities=unpacked("probabilities", np.float16, steps) if known and steps else None,
    )
