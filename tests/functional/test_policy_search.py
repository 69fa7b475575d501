"""Traits, agreement and the cross-entropy method against loops and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysseg.errors import InputError
from raysseg.evaluation import Scores
from raysseg.functional import (
    class_overlap,
    estimated_overlap,
    follow_elites,
    image_traits,
    pair_counts,
    policy_thresholds,
)

K = 3


def test_traits_equal_the_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2, 255, 255, 254], dtype=torch.uint8)[torch.randint(0, 5, (3, 6, 7), generator=generator)]
    labels[1] = 1
    confidence = torch.rand(3, 6, 7, generator=generator)
    found = image_traits(confidence, labels)
    for image in range(3):
        free, labelled, pixels = [], 0, 0
        for y, x in np.ndindex(6, 7):
            label = int(labels[image, y, x])
            pixels += label != 254
            labelled += label < 254
            if label == 255:
                free.append(float(confidence[image, y, x]))
        assert found[image].tolist() == pytest.approx([np.mean(free) if free else 1.0, labelled / pixels], abs=1e-6)


def test_thresholds_are_a_sigmoid_of_a_linear_function() -> None:
    parameters = torch.tensor([0.5, 1.0, -2.0, -1.0, 0.0, 3.0])
    traits = torch.tensor([[0.0, 0.0], [0.3, -0.2]])
    found = policy_thresholds(parameters, traits, 2)
    scores = np.array([[0.5, -1.0], [0.5 + 0.3 + 0.4, -1.0 - 0.6]])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-scores)), rtol=1e-6)


def test_agreement_is_the_mean_iou_of_two_predictions() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(0, K, (2, 5, 6), generator=generator).to(torch.uint8) for _ in range(2))
    counted = torch.rand(2, 5, 6, generator=generator) < 0.7
    counts = pair_counts(first, second, counted, K)
    slow = torch.zeros(K, K, dtype=torch.int64)
    for b, y, x in torch.nonzero(counted).tolist():
        slow[int(first[b, y, x]), int(second[b, y, x])] += 1
    assert torch.equal(counts, slow)
    assert class_overlap(counts).mean().item() == pytest.approx(Scores.from_confusion(slow).miou)


def test_the_estimate_by_hand() -> None:
    present = torch.ones(K, dtype=torch.bool)
    pair = torch.tensor([[80, 20, 0], [0, 100, 0], [0, 0, 50]])
    on_strokes = torch.diag(torch.tensor([10, 10, 10]))
    judged = torch.tensor([[10, 10, 0], [0, 20, 0], [0, 0, 20]])
    # Overlaps 80/100, 100/120, 1; of which on strokes 10/20, 20/30 and all is right.
    expected = (0.8 * 0.5 + 100 / 120 * 20 / 30 + 1.0) / 3
    assert estimated_overlap(pair, on_strokes, judged, present).item() == pytest.approx(expected)
    # Without strokes nothing is known against the networks.
    nothing = torch.zeros(K, K, dtype=torch.int64)
    assert estimated_overlap(pair, nothing, nothing, present).item() == pytest.approx((0.8 + 100 / 120 + 1.0) / 3)
    # Strokes that agree better than the networks do with each other are no bonus.
    worse = torch.tensor([[5, 5, 0], [0, 10, 0], [0, 0, 10]])
    right = torch.diag(torch.tensor([20, 20, 20]))
    assert estimated_overlap(pair, worse, right, present).item() == pytest.approx((0.8 + 100 / 120 + 1.0) / 3)


def test_to_agree_on_one_class_everywhere_is_worth_little() -> None:
    same = torch.zeros(1, 4, 4, dtype=torch.uint8)
    counts = pair_counts(same, same, torch.ones(1, 4, 4, dtype=torch.bool), K)
    strokes = torch.tensor([[2, 0, 0], [2, 0, 0], [2, 0, 0]])
    on_strokes = torch.diag(torch.tensor([3, 0, 0]))
    assert estimated_overlap(counts, on_strokes, strokes, torch.tensor([True] * 3)).item() == pytest.approx(1 / 9)
    assert estimated_overlap(counts, on_strokes, strokes, torch.zeros(K, dtype=torch.bool)).item() == 0.0


def test_elites_by_hand() -> None:
    samples = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    returns = torch.tensor([0.1, 0.5, 0.5, 0.2], dtype=torch.float64)
    mean, std = follow_elites(samples, returns, torch.zeros(2), torch.ones(2), elites=2, rate=0.5, smallest=0.6)
    assert mean.tolist() == [1.0, 1.0]
    # Spread of the elites: 1 and 0; half of the way from 1, and no less than the smallest.
    assert std.tolist() == [1.0, 0.6]


def test_the_search_finds_a_maximum() -> None:
    generator = torch.Generator().manual_seed(0)
    goal = torch.tensor([1.5, -0.5])
    mean, std = torch.zeros(2), torch.full((2,), 1.5)
    for _ in range(12):
        samples = mean + std * torch.randn(16, 2, generator=generator)
        returns = -(samples - goal).square().sum(1)
        mean, std = follow_elites(samples, returns, mean, std, elites=5, rate=0.7, smallest=0.05)
    assert (mean - goal).abs().max() < 0.15


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="expected"):
        image_traits(torch.zeros(2, 3, 3), torch.zeros(2, 3, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="expected"):
        policy_thresholds(torch.zeros(5), torch.zeros(1, 2), 2)
    with pytest.raises(InputError, match="expected 3 or more"):
        follow_elites(
            torch.zeros(2, 1), torch.zeros(2), torch.zeros(1), torch.ones(1), elites=3, rate=1.0, smallest=0.0
        )
