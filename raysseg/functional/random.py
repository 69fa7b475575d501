"""Random numbers that are a function of a seed alone: counter-based, batched, the same on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysseg.errors import InputError


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's signed int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_NORMAL = 0x6E6F726D
"""Keeps the draws of `normal` apart from those of `uniform` with the same seed and stream."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    """splitmix64's output function, a bijection of the 64-bit integers: every input bit reaches every output bit."""
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def mix(seeds: Tensor, *values: int) -> Tensor:
    """Hashes each seed together with some integers into a new seed.

    Args:
        seeds: int64 [B], any value.
        values: any number of Python integers (taken modulo 2^64); their order matters.
    Returns:
        int64 [B], the same bits on every device.
    Raises:
        InputError: where `seeds` is not int64 [B].
    Source: reconstruction (our choice): the output function of splitmix64 (Steele, Lea and Flood 2014) over a chain.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise InputError(f"seeds is {seeds.dtype} {list(seeds.shape)}, expected int64 [B]")
    state = _finalise(seeds + _GOLDEN)
    for value in values:
        state = _finalise(state ^ _signed((value + 1) * _GOLDEN)) + _GOLDEN
    return state


def uniform(seeds: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """Draws n uniform numbers per seed; the first m of n numbers are those that n = m would give.

    Args:
        seeds: int64 [B].
        n: numbers per seed.
        stream: independent numbers of the same seed; any integer.
    Returns:
        float32 [B, n] in [0, 1), multiples of 2^-24, the same bits on every device.
    Raises:
        InputError: where `seeds` is not int64 [B].
    Source: reconstruction (our choice): splitmix64's sequence from a hashed start, its top 24 bits.
    """
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=seeds.device)
    bits = _finalise(mix(seeds, stream)[:, None] + counter * _GOLDEN)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def normal(seeds: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """Draws n standard normal numbers per seed; the first m of n numbers are those that n = m would give.

    Args:
        seeds: int64 [B].
        n: numbers per seed.
        stream: independent numbers of the same seed, also independent of `uniform` with that stream; any integer.
    Returns:
        float32 [B, n], |x| < 5.8; devices may differ in the last bit.
    Raises:
        InputError: where `seeds` is not int64 [B].
    Source: reconstruction (our choice): Box and Muller's transform of `uniform`, in float64.
    """
    pairs = (n + 1) // 2
    u = uniform(mix(seeds, _NORMAL), 2 * pairs, stream=stream).to(torch.float64).view(-1, pairs, 2)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[..., 0]))
    angle = 2.0 * math.pi * u[..., 1]
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return both.flatten(1)[:, :n].to(torch.float32)
