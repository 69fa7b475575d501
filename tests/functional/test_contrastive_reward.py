"""The contrastive reward against loops over pixels, numbers worked out by hand, and what it must reward."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import (
    PADDING,
    UNLABELLED,
    cell_counts,
    cell_index,
    class_centres,
    class_reliability,
    contrastive_reward,
    distance,
    pixel_reliability,
    reliability,
    summed_reward,
)

KINDS: tuple[Any, ...] = ("cosine", "l1", "l2", "inner")


def slow_distance(f: np.ndarray, g: np.ndarray, kind: str) -> float:
    if kind == "cosine":
        return float(1 - f @ g / (np.linalg.norm(f) * np.linalg.norm(g)))
    if kind == "inner":
        return float(-(f @ g))
    return float(np.abs(f - g).sum()) if kind == "l1" else float(np.sqrt(((f - g) ** 2).sum()))


def slow_value(
    features: np.ndarray, labels: np.ndarray, num_classes: int, delta: float, kind: str
) -> tuple[float, int]:
    """Eq. 8 to 11 of one image, pixel by pixel, on F sampled at every label pixel."""
    _, h, w = features.shape
    height, width = labels.shape
    pixels: dict[int, list[np.ndarray]] = {k: [] for k in range(num_classes)}
    for y, x in np.ndindex(height, width):
        if labels[y, x] < num_classes:
            cell = features[:, math.floor((y + 0.5) * h / height), math.floor((x + 0.5) * w / width)]
            pixels[int(labels[y, x])].append(cell)
    centres = {k: np.mean(members, axis=0) for k, members in pixels.items() if members}
    values = []
    for k in centres:
        each = []
        for f in pixels[k]:
            weights = {c: math.exp(-delta * slow_distance(f, centre, kind)) for c, centre in centres.items()}
            each.append(weights[k] / sum(weights.values()))
        values.append(np.mean(each))
    return (float(np.mean(values)), len(values)) if values else (0.0, 0)


def random_labels(generator: np.random.Generator, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    labels = generator.integers(0, num_classes, shape)
    labels = np.where(generator.random(shape) < 0.3, UNLABELLED, labels)
    return np.where(generator.random(shape) < 0.1, PADDING, labels).astype(np.uint8)


@pytest.mark.parametrize(("pixels", "cells"), [(8, 4), (9, 4), (512, 128), (321, 81), (7, 7), (100, 1)])
def test_a_pixel_belongs_to_the_cell_that_its_centre_falls_in(pixels: int, cells: int) -> None:
    expected = [math.floor((y + 0.5) * cells / pixels) for y in range(pixels)]
    assert cell_index(pixels, cells, torch.device("cpu")).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(4, 13),
    width=st.integers(3, 13),
    num_classes=st.sampled_from([1, 3, 21, 254]),
)
def test_counts_equal_the_loop_over_pixels(seed: int, height: int, width: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    labels = random_labels(generator, (2, height, width), num_classes)
    h, w = int(generator.integers(1, height + 1)), int(generator.integers(1, width + 1))
    expected: np.ndarray = np.zeros((2, num_classes, h, w), dtype=np.float32)
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] < PADDING:
            expected[b, labels[b, y, x], math.floor((y + 0.5) * h / height), math.floor((x + 0.5) * w / width)] += 1
    counts = cell_counts(torch.from_numpy(labels), num_classes, (h, w))
    assert counts.dtype == torch.float32
    assert np.array_equal(counts.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 12), (9, 11)])
def test_reliability_equals_the_loop_over_pixels(kind: Any, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(7)
    features = generator.normal(size=(3, 5, 4, 6))
    labels = random_labels(generator, (3, *size), 4)
    labels[1][labels[1] == 2] = UNLABELLED
    labels[2][labels[2] < PADDING] = 3
    delta = 10.0 if kind == "cosine" else 0.5
    counts = cell_counts(torch.from_numpy(labels), 4, (4, 6))
    value, number = reliability(torch.from_numpy(features), counts, delta=delta, distance=kind)
    expected = [slow_value(f, m, 4, delta, kind) for f, m in zip(features, labels, strict=True)]
    assert number.tolist() == [n for _, n in expected] == [4, 3, 1]
    np.testing.assert_allclose(value.numpy(), [v for v, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_equals_the_loop_over_pairs(kind: Any) -> None:
    generator = np.random.default_rng(1)
    features, centres = generator.normal(size=(2, 6, 30)), generator.normal(size=(2, 28, 6))
    expected = [
        [[slow_distance(f[:, n], m, kind) for n in range(30)] for m in c]
        for f, c in zip(features, centres, strict=True)
    ]
    result = distance(torch.from_numpy(features), torch.from_numpy(centres), kind)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_zero_vectors_are_at_cosine_distance_one() -> None:
    features = torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])
    assert distance(features, torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist() == [[[1.0, 0.0], [1.0, 1.0]]]


@pytest.mark.parametrize(("gap", "expected"), [(0.0, 0.5), (0.1, 0.73), (0.2, 0.88), (0.3, 0.95)])
def test_two_classes_by_the_gap_of_their_cosine_distances(gap: float, expected: float) -> None:
    # Worked out by hand: v = 1 / (1 + exp(−10 · gap)).
    own, other = 0.2, 0.2 + gap
    feature = torch.tensor([1.0, 0.0])
    centres = torch.tensor([[1 - own, math.sqrt(1 - (1 - own) ** 2)], [1 - other, math.sqrt(1 - (1 - other) ** 2)]])
    values = pixel_reliability(feature.view(1, 2, 1, 1), centres[None], torch.ones(1, 2, dtype=torch.bool))
    assert values[0, 0, 0, 0].item() == pytest.approx(expected, abs=0.005)
    assert values[0, :, 0, 0].sum().item() == pytest.approx(1.0)


def test_extremes_of_the_pixel_reliability() -> None:
    # Five classes with δ = 10: own centre opposite and all others equal, exp(−20) / 4; the reverse, 1; a tie, 1/5.
    centres = torch.tensor([[-1.0, 0.0]] + [[1.0, 0.0]] * 4)[None]
    present = torch.ones(1, 5, dtype=torch.bool)
    facing = pixel_reliability(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), centres, present)
    away = pixel_reliability(torch.tensor([-1.0, 0.0]).view(1, 2, 1, 1), centres, present)
    across = pixel_reliability(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), centres, present)
    assert facing[0, 0].item() == pytest.approx(math.exp(-20) / 4, rel=1e-4)
    assert away[0, 0].item() == pytest.approx(1.0, abs=1e-7)
    assert across.flatten().tolist() == pytest.approx([0.2] * 5)


def test_absent_classes_take_no_part() -> None:
    features = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    centres = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    two = pixel_reliability(features, centres[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool))
    three = pixel_reliability(features, centres, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(three[:, [0, 2]], two)
    assert three[:, 1].abs().max() == 0


def test_centres_and_class_means_of_a_map_worked_out_by_hand() -> None:
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])
    counts = torch.tensor([[[[3.0, 1.0]], [[0.0, 2.0]], [[0.0, 0.0]]]])
    assert class_centres(features, counts).tolist() == [[[1.5, 1.0], [3.0, 4.0], [0.0, 0.0]]]
    values = torch.tensor([[[[0.4, 0.8]], [[0.1, 0.6]], [[0.9, 0.9]]]])
    assert class_reliability(values, counts)[0].tolist() == pytest.approx([0.5, 0.6, 0.0])


def make_maps(seed: int, corruption: float = 0.0, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian features around a direction per class, and label maps of which a share is wrong."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (batch, 16, 16), generator=generator)
    directions = torch.randn(4, 8, generator=generator)
    features = directions[truth].permute(0, 3, 1, 2) + 0.5 * torch.randn(batch, 8, 16, 16, generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < corruption
    labels = torch.where(wrong, torch.randint(0, 4, truth.shape, generator=generator), truth)
    return features, cell_counts(labels.to(torch.uint8), 4, (16, 16))


def test_the_reward_falls_as_more_labels_are_wrong() -> None:
    means = []
    for corruption in (0.0, 0.1, 0.3, 0.6, 1.0):
        rewards = []
        for seed in range(5):
            features, counts = make_maps(seed)
            _, corrupted = make_maps(seed, corruption)
            rewards.append(contrastive_reward(features, counts, features, corrupted).reward)
        means.append(torch.cat(rewards).mean().item())
    assert means[0] == 0.0
    assert all(after < before - 0.01 for before, after in itertools.pairwise(means))
    assert means[-1] < -0.3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_done_is_worth_exactly_nothing(kind: Any) -> None:
    features, counts = make_maps(0)
    result = contrastive_reward(features, counts, features.clone(), counts.clone(), distance=kind)
    for part in (result.reward, result.relabelling, result.features):
        assert part.tolist() == [0.0] * 4


def test_one_class_alone_is_worth_exactly_nothing_whatever_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 8, 4, 4, generator=generator)
    labels = torch.full((2, 9, 9), UNLABELLED, dtype=torch.uint8)
    labels[:, 2:5] = 1
    more = labels.clone()
    more[:, 5:8, 3:] = 1
    result = contrastive_reward(before, cell_counts(labels, 3, (4, 4)), after, cell_counts(more, 3, (4, 4)))
    assert result.value.tolist() == [1.0, 1.0]
    assert result.reward.tolist() == result.relabelling.tolist() == result.features.tolist() == [0.0, 0.0]


def test_a_map_without_labels_has_value_zero() -> None:
    counts = cell_counts(torch.full((1, 4, 4), UNLABELLED, dtype=torch.uint8), 3, (2, 2))
    value, number = reliability(torch.randn(1, 5, 2, 2), counts)
    assert value.tolist() == [0.0]
    assert number.tolist() == [0]


def test_the_parts_of_the_reward_are_the_values_of_the_four_pairs() -> None:
    features, counts = make_maps(0)
    next_features, next_counts = make_maps(1, 0.2)
    result = contrastive_reward(features, counts, next_features, next_counts, delta=5.0)
    value, between, after = (
        reliability(f, m, delta=5.0)[0]
        for f, m in ((features, counts), (features, next_counts), (next_features, next_counts))
    )
    assert torch.equal(result.value, value)
    assert torch.equal(result.next_value, after)
    assert torch.equal(result.reward, after - value)
    torch.testing.assert_close(result.relabelling, between - value)
    torch.testing.assert_close(result.features, after - between)
    torch.testing.assert_close(result.relabelling + result.features, result.reward)


def test_the_summed_reward_counts_every_label_for_itself() -> None:
    generator = torch.Generator().manual_seed(4)
    features, next_features = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
    labels = torch.randint(0, 3, (2, 6, 8), generator=generator).to(torch.uint8)
    less = torch.where(torch.rand(2, 6, 8, generator=generator) < 0.5, UNLABELLED, labels)
    counts, next_counts = (cell_counts(one, 3, (3, 4)) for one in (less, labels))
    pixels = torch.tensor([48, 48])
    result = summed_reward(features, counts, next_features, next_counts, pixels=pixels, delta=3.0)
    expected = {}
    for name, f, n in (
        ("value", features, counts),
        ("between", features, next_counts),
        ("next", next_features, next_counts),
    ):
        scores = pixel_reliability(f, class_centres(f, n), n.flatten(2).sum(2) > 0, delta=3.0)
        totals = []
        for image in range(2):
            total = 0.0
            for k, y, x in itertools.product(range(3), range(3), range(4)):
                total += float(n[image, k, y, x]) * (2 * float(scores[image, k, y, x]) - 1)
            totals.append(total / 48)
        expected[name] = torch.tensor(totals)
    torch.testing.assert_close(result.value, expected["value"])
    torch.testing.assert_close(result.next_value, expected["next"])
    torch.testing.assert_close(result.relabelling, expected["between"] - expected["value"])
    torch.testing.assert_close(result.features, expected["next"] - expected["between"])
    torch.testing.assert_close(result.reward, result.relabelling + result.features)


def test_half_precision_features_are_scored_in_float32() -> None:
    features, counts = make_maps(0)
    half = features.half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = reliability(half, counts)
    assert value.dtype == torch.float32
    assert torch.equal(value, reliability(half.float(), counts)[0])


def test_what_is_wrong_is_named() -> None:
    features, counts = make_maps(0)
    with pytest.raises(InputError, match="distance is 'cos'"):
        reliability(features, counts, distance="cos")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="counts"):
        reliability(features, counts[:, :, :8])
    with pytest.raises(InputError, match="feature cells"):
        cell_counts(torch.zeros(1, 4, 4, dtype=torch.uint8), 2, (5, 2))
    with pytest.raises(InputError, match=r"labels is torch\.int64"):
        cell_counts(torch.zeros(1, 4, 4, dtype=torch.int64), 2, (2, 2))
