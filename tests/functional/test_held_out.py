"""Held-out strokes and what label maps gain, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional import balanced_log_likelihood, hide_strokes, label_gain

K = 4


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor]:
    """Scribbles, a map and a truth, uint8 [3, 9, 11], with padding, unlabelled pixels and one empty image."""
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([0, 1, 2, 3, 255, 255, 254], dtype=torch.uint8)
    scribbles, labels, truth = (values[torch.randint(0, 7, (3, 9, 11), generator=generator)] for _ in range(3))
    scribbles[2] = 255
    truth[1][truth[1] == 2] = 0
    return scribbles, labels, truth


def test_of_every_class_one_side_is_kept_back(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    scribbles, _, _ = maps
    hidden = hide_strokes(scribbles, torch.tensor([1, 2, 3]), K)
    assert not (hidden & (scribbles >= K)).any()
    assert not hidden[2].any()
    for image in range(2):
        for k in range(K):
            of_class = scribbles[image] == k
            kept = of_class & ~hidden[image]
            assert hidden[image][of_class].any()
            assert kept.any()
            # One line parts them: the kept ones' convex combination is never beyond a hidden one in the line's direction.
            a, b = torch.nonzero(hidden[image] & of_class).double(), torch.nonzero(kept).double()
            angles = torch.linspace(0, 2 * np.pi, 3601, dtype=torch.float64)
            directions = torch.stack((angles.sin(), angles.cos()))
            assert ((a @ directions).amin(0) > (b @ directions).amax(0) - 1e-2).any()


def test_the_direction_follows_the_seed(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    scribbles = maps[0][:1].expand(2, -1, -1)
    same, other = hide_strokes(scribbles, torch.tensor([5, 5]), K), hide_strokes(scribbles, torch.tensor([5, 6]), K)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], other[0])
    assert not torch.equal(other[0], other[1])


def test_a_stroke_of_one_pixel_stays(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    scribbles = torch.full((1, 5, 5), 255, dtype=torch.uint8)
    scribbles[0, 2, 2] = 1
    assert not hide_strokes(scribbles, torch.tensor([0]), K).any()


def test_the_likelihood_is_a_mean_over_classes_of_means(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    scribbles, _, _ = maps
    logits = torch.randn(3, K, 9, 11, generator=torch.Generator().manual_seed(0))
    counted = (scribbles < K) & (torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(1)) < 0.5)
    found = balanced_log_likelihood(logits, scribbles, counted)
    for image in range(3):
        by_class: dict[int, list[float]] = {}
        for y, x in torch.nonzero(counted[image]).tolist():
            k = int(scribbles[image, y, x])
            likelihood = logits[image, :, y, x].log_softmax(0)[k].item()
            by_class.setdefault(k, []).append(likelihood)
        expected = np.mean([np.mean(values) for values in by_class.values()]) if by_class else 0.0
        assert found[image].item() == pytest.approx(expected, abs=1e-5)


def test_the_gain_counts_right_minus_wrong(maps: tuple[Tensor, Tensor, Tensor]) -> None:
    before, after, truth = maps
    gain, balanced = label_gain(before, after, truth, K)
    for image in range(3):
        by_class: dict[int, list[float]] = {}
        for y in range(9):
            for x in range(11):
                true = int(truth[image, y, x])
                if true < K:
                    pair = [int(one[image, y, x]) for one in (before, after)]
                    worth = [0.0 if one >= 254 else 1.0 if one == true else -1.0 for one in pair]
                    by_class.setdefault(true, []).append(worth[1] - worth[0])
        everything = [value for values in by_class.values() for value in values]
        assert gain[image].item() == pytest.approx(np.mean(everything), abs=1e-6)
        assert balanced[image].item() == pytest.approx(np.mean([np.mean(v) for v in by_class.values()]), abs=1e-6)


def test_the_truth_itself_gains_most_and_nothing_gains_nothing() -> None:
    truth = torch.randint(0, K, (2, 6, 7), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    nothing = torch.full_like(truth, 255)
    assert [value.tolist() for value in label_gain(nothing, truth, truth, K)] == [[1.0, 1.0], [1.0, 1.0]]
    assert [value.tolist() for value in label_gain(nothing, nothing, truth, K)] == [[0.0, 0.0], [0.0, 0.0]]


def test_shapes_that_differ_are_refused() -> None:
    one = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="expected"):
        hide_strokes(one, torch.tensor([1]), K)
    with pytest.raises(InputError, match="expected"):
        balanced_log_likelihood(torch.zeros(2, K, 4, 5), one, one < K)
    with pytest.raises(InputError, match="expected"):
        label_gain(one, one[:1], one, K)
