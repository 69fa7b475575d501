"""Correlation and label precision against numpy and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raysseg.errors import InputError
from raysseg.functional import PADDING, UNLABELLED, correlation, label_precision


def test_correlation_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = 0.3 * x + generator.normal(size=50)
    assert correlation(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(torch.from_numpy(x), torch.from_numpy(-2 * x + 1)).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("values", [[], [1.0], [0.1, 0.1, 0.1]])
def test_correlation_is_not_a_number_where_it_is_undefined(values: list[float]) -> None:
    varied = torch.arange(len(values), dtype=torch.float32)
    assert math.isnan(correlation(torch.tensor(values), varied).item())
    assert math.isnan(correlation(varied, torch.tensor(values)).item())


def test_correlation_needs_two_series_of_one_length() -> None:
    with pytest.raises(InputError, match="expected"):
        correlation(torch.ones(3), torch.ones(3, 1))


def test_precision_equals_the_loop_over_pixels() -> None:
    generator = np.random.default_rng(1)
    shape = (3, 9, 8)
    values = np.array([0, 1, 2, 3, PADDING, UNLABELLED], dtype=np.uint8)
    labels, truth = generator.choice(values, shape), generator.choice(values, shape)
    scribbles = np.where(generator.random(shape) < 0.3, labels, UNLABELLED).astype(np.uint8)
    expected_correct: np.ndarray = np.zeros((3, 4), dtype=int)
    expected_total: np.ndarray = np.zeros((3, 4), dtype=int)
    for b, y, x in np.ndindex(*shape):
        if labels[b, y, x] < 4 and scribbles[b, y, x] == UNLABELLED and truth[b, y, x] < 4:
            expected_total[b, labels[b, y, x]] += 1
            expected_correct[b, labels[b, y, x]] += labels[b, y, x] == truth[b, y, x]
    maps = (torch.from_numpy(labels), torch.from_numpy(scribbles), torch.from_numpy(truth))
    correct, total = label_precision(*maps, 4)
    assert np.array_equal(correct.numpy(), expected_correct)
    assert np.array_equal(total.numpy(), expected_total)
    assert expected_correct.sum() > 0


def test_precision_needs_three_maps_of_one_shape() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="truth"):
        label_precision(labels, labels, labels[:, :2], 2)
