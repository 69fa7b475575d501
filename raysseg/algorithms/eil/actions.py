"""Actions on the wire: thresholds as float32, masks as one byte per feature cell, compressed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

_CODEC = pa.Codec("zstd")


def quantise_mask(mask: torch.Tensor) -> torch.Tensor:
    """Rounds a mask `[B, N]` in [0, 1] to the 256 values that travel, so that actor and learner see the same action."""
    return (mask * 255).round() / 255


def pack_actions(actions: torch.Tensor, kind: str) -> list[bytes]:
    """Packs actions `[B, A]` float32 in [0, 1]; masks (kind `mask`) must be quantised. Source: reconstruction."""
    values = actions.cpu().numpy().astype(np.float32)
    if kind != "mask":
        return [row.tobytes() for row in values]
    return [_CODEC.compress(np.rint(row * 255).astype(np.uint8).tobytes(), asbytes=True) for row in values]


def unpack_actions(packed: Sequence[bytes], kind: str, size: int) -> torch.Tensor:
    """Unpacks what `pack_actions` made into float32 `[B, size]` on the CPU. Source: reconstruction."""
    if kind != "mask":
        return torch.from_numpy(np.stack([np.frombuffer(one, dtype=np.float32) for one in packed]))
    rows = [np.frombuffer(_CODEC.decompress(one, size), dtype=np.uint8) for one in packed]
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 255)
