"""The assessor's gate, and quantile thresholds against sorted confidences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import confidence_histogram, moving_average, quantiles_from_histogram, select_labels


def test_the_gate_keeps_maps_of_positive_value_only() -> None:
    labels = torch.zeros(4, 2, 3, dtype=torch.uint8)
    inferred = torch.ones_like(labels)
    values = torch.tensor([0.1, 0.0, -0.1, torch.nan])
    chosen, accepted = select_labels(labels, inferred, values, gate=True)
    assert accepted.tolist() == [True, False, False, False]
    assert torch.equal(chosen[0], inferred[0])
    assert torch.equal(chosen[1:], labels[1:])
    chosen, accepted = select_labels(labels, inferred, values, gate=False)
    assert accepted.tolist() == [True] * 4
    assert torch.equal(chosen, inferred)
    with pytest.raises(InputError, match="values"):
        select_labels(labels, inferred, values[:2], gate=True)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), p=st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]), count=st.integers(1, 200))
def test_a_quantile_is_within_a_bin_of_the_sorted_confidences(seed: int, p: float, count: int) -> None:
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, 3, (2, count)).astype(np.uint8)
    confidence = generator.random((2, count)).astype(np.float32) ** 2
    confidence[0, 0] = 1.0
    valid = generator.random((2, count)) < 0.8
    arguments = (torch.from_numpy(classes), torch.from_numpy(confidence), torch.from_numpy(valid))
    histogram = confidence_histogram(*arguments, 4, 1000)
    assert histogram.dtype == torch.int64
    assert int(histogram.sum()) == int(valid.sum())
    # The parts of a set add up to the whole.
    parts = [confidence_histogram(c, f, v, 4, 1000) for c, f, v in zip(*arguments, strict=True)]
    assert torch.equal(parts[0] + parts[1], histogram)

    quantiles = quantiles_from_histogram(histogram, p)
    for k in range(4):
        members = np.sort(confidence[valid & (classes == k)])
        # The smallest value with at least p of the class at or below it.
        expected = members[max(0, int(np.ceil(p * len(members) - 1e-9)) - 1)] if len(members) else 1.0
        assert quantiles[k].item() == pytest.approx(expected, abs=1 / 1000 + 1e-6)


def test_quantiles_of_a_uniform_distribution_are_their_share() -> None:
    confidence = (torch.arange(100_000) + 0.5) / 100_000
    histogram = confidence_histogram(
        torch.zeros(100_000, dtype=torch.uint8), confidence, torch.ones(100_000, dtype=torch.bool), 1, 10
    )
    for p in (0.05, 0.333, 0.9, 1.0):
        assert quantiles_from_histogram(histogram, p).item() == pytest.approx(p, abs=1e-5)


def test_what_is_wrong_is_named() -> None:
    histogram = torch.ones(2, 10, dtype=torch.int64)
    for p in (0.0, 1.1):
        with pytest.raises(InputError, match="share in"):
            quantiles_from_histogram(histogram, p)
    with pytest.raises(InputError, match="valid"):
        confidence_histogram(torch.zeros(3, dtype=torch.uint8), torch.zeros(3), torch.ones(2, dtype=torch.bool), 2)
    with pytest.raises(InputError, match="previous"):
        moving_average(torch.ones(2), torch.ones(3), 0.9)


def test_the_moving_average_leans_on_the_past() -> None:
    assert moving_average(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]), 0.9).tolist() == pytest.approx(
        [0.55, 0.9]
    )
