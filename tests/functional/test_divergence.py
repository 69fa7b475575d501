"""Divergences and their histograms against SciPy and NumPy, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError, NonFiniteError
from raysseg.functional import divergence_histograms, kl_matrix

ROUNDING = 2e-5
seeds = st.integers(0, 2**32 - 1)


def distributions(generator: np.random.Generator, count: int, num_classes: int, smoothing: float) -> np.ndarray:
    """Shares of a few classes out of many, the others smoothed, as of regions."""
    shares = generator.dirichlet([0.3] * num_classes, count)
    shares = np.where(shares < 0.02, smoothing, shares)
    return shares / shares.sum(1, keepdims=True)


def slow_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array([[scipy.stats.entropy(one, other) for other in q] for one in p]).reshape(len(p), len(q))


def slow_histograms(divergences: np.ndarray, bins: int, limit: float) -> np.ndarray:
    edges = np.linspace(0, limit, bins + 1)
    return np.array([np.histogram(row.clip(0, limit), edges)[0] / len(row) for row in divergences])


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    m=st.integers(0, 6),
    number=st.integers(0, 6),
    num_classes=st.integers(1, 20),
    smoothing=st.sampled_from([1e-7, 1e-3]),
)
def test_the_matrix_is_scipys_entropy(seed: int, m: int, number: int, num_classes: int, smoothing: float) -> None:
    generator = np.random.default_rng(seed)
    p = distributions(generator, m, num_classes, smoothing)
    q = distributions(generator, number, num_classes, smoothing)
    found = kl_matrix(torch.tensor(p), torch.tensor(q))
    assert found.shape == (m, number)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert found.numpy() == pytest.approx(slow_kl(p, q), abs=ROUNDING)


def test_divergences_by_hand() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    expected = [[np.log(2), np.log(4)], [0.0, 0.5 * np.log(2) + 0.5 * np.log(2 / 3)]]
    assert kl_matrix(p, q).numpy() == pytest.approx(np.array(expected), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    m=st.integers(1, 9),
    number=st.integers(1, 30),
    num_classes=st.integers(1, 20),
    bins=st.sampled_from([2, 7, 32]),
    limit=st.sampled_from([0.5, 5.0, 16.0, 40.0]),
    chunk_elements=st.sampled_from([1, 3, 16, 1 << 20]),
)
def test_no_pair_is_counted_outside_its_bin(
    seed: int, m: int, number: int, num_classes: int, bins: int, limit: float, chunk_elements: int
) -> None:
    generator = np.random.default_rng(seed)
    p = distributions(generator, m, num_classes, 1e-7)
    q = distributions(generator, number, num_classes, 1e-7)
    found = divergence_histograms(
        torch.tensor(p), torch.tensor(q), bins=bins, limit=limit, chunk_elements=chunk_elements
    )
    assert found.shape == (m, bins)
    assert found.sum(1).tolist() == pytest.approx([1.0] * m)
    # Up to each inner edge: at least what is surely below it, at most what rounding could put there.
    below = np.rint(found.numpy() * number).cumsum(1)[:, :-1]
    divergences, edges = slow_kl(p, q)[:, :, None], np.linspace(0, limit, bins + 1)[1:-1]
    assert ((divergences < edges - ROUNDING).sum(1) <= below).all()
    assert (below <= (divergences < edges + ROUNDING).sum(1)).all()


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """More p's than a chunk has rows, some q's, and SciPy's divergences between them."""
    generator = np.random.default_rng(1)
    p, q = distributions(generator, 400, 4, 1e-7), distributions(generator, 20, 4, 1e-7)
    return p, q, slow_kl(p, q)


@pytest.mark.parametrize("chunk_elements", [1, 50, 700, 1 << 20])
@pytest.mark.parametrize("limit", [3.0, 16.0])
def test_the_histograms_are_numpys(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], limit: float, chunk_elements: int
) -> None:
    p, q, divergences = pairs
    steps = divergences * 32 / limit
    clear = (np.abs(steps - np.rint(steps)) > 1e-3).all(1)
    assert clear.sum() > 256
    found = divergence_histograms(
        torch.tensor(p[clear]), torch.tensor(q), bins=32, limit=limit, chunk_elements=chunk_elements
    )
    expected = slow_histograms(divergences[clear], 32, limit)
    assert np.array_equal(np.rint(found.numpy() * len(q)), np.rint(expected * len(q)))


def test_equal_ones_are_in_the_first_bin_and_far_ones_in_the_last() -> None:
    shares = torch.full((4, 3), 1e-7)
    shares[[0, 1, 2, 3], [0, 0, 1, 2]] = 1.0
    found = divergence_histograms(shares, shares, bins=4, limit=16.0)
    assert found.tolist() == [[0.5, 0, 0, 0.5], [0.5, 0, 0, 0.5], [0.25, 0, 0, 0.75], [0.25, 0, 0, 0.75]]
    alone = torch.ones(3, 1)
    assert divergence_histograms(alone, alone, bins=4, limit=16.0).tolist() == [[1.0, 0, 0, 0]] * 3


def test_nothing_to_compare_with_gives_zeros() -> None:
    p = torch.full((3, 4), 0.25)
    assert divergence_histograms(p, p[:0], bins=8, limit=16.0).tolist() == [[0.0] * 8] * 3
    assert divergence_histograms(p[:0], p, bins=8, limit=16.0).shape == (0, 8)
    assert kl_matrix(p, p[:0]).shape == (3, 0)


def test_low_precision_around_it_changes_nothing() -> None:
    p = torch.tensor(distributions(np.random.default_rng(2), 50, 19, 1e-7))
    histograms, matrix = divergence_histograms(p, p, bins=32, limit=16.0), kl_matrix(p, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(divergence_histograms(p, p, bins=32, limit=16.0), histograms)
        assert torch.equal(kl_matrix(p, p), matrix)


def test_bad_input_is_refused() -> None:
    p = torch.full((2, 4), 0.25)
    with pytest.raises(InputError, match=r"p is \[2, 4\] and q \[2, 3\], expected \[M, C\] and \[L, C\]"):
        kl_matrix(p, p[:, :3])
    with pytest.raises(InputError, match="q holds 0, expected shares above 0"):
        kl_matrix(p, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    with pytest.raises(InputError, match=r"p holds -0.5"):
        kl_matrix(torch.tensor([[1.5, -0.5, 0.0, 0.0]]), p)
    with pytest.raises(NonFiniteError, match=r"q \[2, 4\] is not finite"):
        divergence_histograms(p, p * torch.nan, bins=4, limit=1.0)
    with pytest.raises(NonFiniteError, match=r"p \[2, 4\] is not finite"):
        divergence_histograms(p * torch.inf, p, bins=4, limit=1.0)
    with pytest.raises(InputError, match="bins is 1,"):
        divergence_histograms(p, p, bins=1, limit=1.0)
    with pytest.raises(InputError, match="bins is 40000"):
        divergence_histograms(p, p, bins=40_000, limit=1.0)
    for limit in (0.0, math.inf, math.nan):
        with pytest.raises(InputError, match=f"limit is {limit}"):
            divergence_histograms(p, p, bins=4, limit=limit)
    with pytest.raises(InputError, match="chunk_elements is 0"):
        divergence_histograms(p, p, bins=4, limit=1.0, chunk_elements=0)
