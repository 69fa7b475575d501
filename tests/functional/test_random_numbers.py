"""Counter-based random numbers: against splitmix64 in Python integers, and as distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import mix, normal, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def slow_finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_mix(seed: int, *values: int) -> int:
    state = slow_finalise((seed + GOLDEN) & MASK)
    for value in values:
        state = (slow_finalise(state ^ ((value + 1) * GOLDEN & MASK)) + GOLDEN) & MASK
    return state


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def seeds(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64)


def test_the_first_numbers_of_splitmix64_from_zero() -> None:
    # The published sequence of splitmix64 with the seed 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(torch.tensor([0])).item() == signed(published[0])
    assert [slow_finalise(i * GOLDEN & MASK) for i in (1, 2, 3)] == published


@given(seed=st.integers(-(2**63), 2**63 - 1), values=st.lists(st.integers(-(2**70), 2**70), max_size=3))
def test_mix_and_uniform_equal_python_integers(seed: int, values: list[int]) -> None:
    assert mix(torch.tensor([seed]), *values).item() == signed(slow_mix(seed, *values))
    start = slow_mix(seed, 5)
    expected = [(slow_finalise((start + i * GOLDEN) & MASK) >> 40) / 2**24 for i in (1, 2, 3)]
    assert uniform(torch.tensor([seed]), 3, stream=5)[0].tolist() == expected


def test_mix_depends_on_every_value_and_their_order() -> None:
    base = seeds(100)
    hashes = [mix(base), mix(base, 0), mix(base, 1), mix(base, 0, 1), mix(base, 1, 0), mix(base, 0, 0)]
    assert torch.cat(hashes).unique().numel() == 600


def test_uniform_is_uniform_and_streams_are_independent() -> None:
    u = uniform(seeds(2000), 50)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi_square < 45  # 19 degrees of freedom: 45 has p < 0.001
    for other in (uniform(seeds(2000), 50, stream=1), u.roll(1, 0), u.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack((u.flatten(), other.flatten())))[0, 1].item()) < 0.015


def test_normal_is_standard_and_apart_from_uniform() -> None:
    x = normal(seeds(2000), 51)
    assert x.shape == (2000, 51)
    assert abs(x.mean().item()) < 0.01
    assert abs(x.std().item() - 1) < 0.01
    for limit in (-1.5, -0.5, 0.7, 2.0):
        expected = 0.5 * (1 + math.erf(limit / math.sqrt(2)))
        assert (x < limit).float().mean().item() == pytest.approx(expected, abs=0.006)
    u = uniform(seeds(2000), 51)
    pairs = torch.stack((x[:, 0::2].abs().flatten(), u[:, 0::2].flatten()))
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 0.02
    assert abs(torch.corrcoef(torch.stack((x[:, :-1].flatten(), x[:, 1:].flatten())))[0, 1].item()) < 0.015


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_number_depends_on_its_seed_and_place_alone(draw: object) -> None:
    assert callable(draw)
    whole = draw(seeds(10), 7, stream=3)
    assert torch.equal(draw(seeds(10)[4:6], 3, stream=3), whole[4:6, :3])


def test_seeds_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match="expected int64"):
        mix(torch.zeros(3))
