"""All randomness is a pure function of the run's seed and of where in the run it is drawn, so that nothing random
has to be saved.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, *where: int | str) -> np.random.Generator:
    """Returns the NumPy generator of one place in the run.

    Args:
        seed: the run's seed.
        where: what is drawn and when, e.g. `("explore", stage, update)`.

    Source: reconstruction.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in where]
    return np.random.default_rng([seed, *words])


def draw_seeds(seed: int, *where: int | str, count: int) -> np.ndarray:
    """Returns `count` item seeds, int64 `[count]` in [0, 2^62), one per sample of a batch. Source: reconstruction."""
    return generator(seed, *where).integers(0, 2**62, size=count, dtype=np.int64)


def draw_order(seed: int, *where: int | str, count: int) -> np.ndarray:
    """Returns a permutation of the rows of a split, int64 `[count]`. Source: reconstruction."""
    return generator(seed, *where).permutation(count).astype(np.int64)
