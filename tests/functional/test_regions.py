"""What is known of regions, against loops over pixels, numbers worked out by hand, and images with nothing to count."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import (
    PADDING,
    UNLABELLED,
    class_shares,
    cut_regions,
    entropy_map,
    entropy_map_of_logits,
    label_shares,
    pooled_entropies,
    region_means,
)
from raysseg.functional import regions as module

SMOOTHING = 1e-7
POOL: dict[str, Callable[[np.ndarray], float]] = {"min": np.min, "mean": np.mean, "max": np.max}


def slow_regions(image: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    h, w = image.shape[0] // rows, image.shape[1] // columns
    return [image[r * h : (r + 1) * h, c * w : (c + 1) * w] for r in range(rows) for c in range(columns)]


def slow_shares(region: np.ndarray, num_classes: int, smoothing: float) -> list[float]:
    counted = [value for value in region.flatten().tolist() if value < num_classes]
    shares = [counted.count(k) / len(counted) if k in counted else smoothing for k in range(num_classes)]
    return [share / sum(shares) for share in shares]


def slow_pool(region: np.ndarray, cells: int, pooling: str) -> list[float]:
    """Cell i holds the pixels from floor(i n / cells) up to ceil((i + 1) n / cells)."""
    h, w = region.shape
    found = []
    for i in range(cells):
        for j in range(cells):
            ys = slice(math.floor(i * h / cells), math.ceil((i + 1) * h / cells))
            xs = slice(math.floor(j * w / cells), math.ceil((j + 1) * w / cells))
            found.append(float(POOL[pooling](region[ys, xs])))
    return found


def random_maps(seed: int, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    maps = generator.integers(0, num_classes, shape)
    maps = np.where(generator.random(shape) < 0.3, UNLABELLED, maps)
    return np.where(generator.random(shape) < 0.1, PADDING, maps).astype(np.uint8)


grids = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(1, 3))
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=30)
@given(grid=grids, between=st.sampled_from([(), (3,), (2, 3)]))
def test_regions_are_cut_row_by_row(grid: tuple[int, int, int, int, int], between: tuple[int, ...]) -> None:
    rows, columns, h, w, batch = grid
    shape = (batch, *between, rows * h, columns * w)
    maps = torch.arange(math.prod(shape)).view(shape)
    cut = cut_regions(maps, rows, columns)
    assert cut.shape == (batch, rows * columns, *between, h, w)
    for number in range(rows * columns):
        top, left = number // columns * h, number % columns * w
        assert torch.equal(cut[:, number], maps[..., top : top + h, left : left + w])


@settings(deadline=None, max_examples=40)
@given(seed=seeds, grid=grids, num_classes=st.sampled_from([1, 2, 11, 254]))
def test_shares_match_a_count_by_hand(seed: int, grid: tuple[int, int, int, int, int], num_classes: int) -> None:
    rows, columns, h, w, batch = grid
    maps = random_maps(seed, (batch, rows * h, columns * w), num_classes)
    found = class_shares(torch.tensor(maps), num_classes, rows, columns, SMOOTHING)
    assert found.shape == (batch, rows * columns, num_classes)
    assert found.dtype == torch.float32
    for image, one in zip(maps, found, strict=True):
        for region, shares in zip(slow_regions(image, rows, columns), one, strict=True):
            expected = slow_shares(region, num_classes, SMOOTHING)
            assert shares.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    cut = cut_regions(torch.tensor(maps), rows, columns).flatten(0, 1)
    assert torch.equal(label_shares(cut, num_classes, SMOOTHING), found.flatten(0, 1))


def test_shares_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 0], [2, PADDING, UNLABELLED]]], dtype=torch.uint8)
    expected = torch.tensor([[0.75, 0.01, 0.25]]) / 1.01
    assert torch.allclose(label_shares(labels, 3, 0.01), expected)


@pytest.mark.parametrize("nothing", [PADDING, UNLABELLED])
def test_a_region_without_labels_is_uniform(nothing: int) -> None:
    labels = torch.full((2, 4, 4), nothing, dtype=torch.uint8)
    labels[1, 0, 0] = 3
    shares = label_shares(labels, 5, SMOOTHING)
    assert shares[0].tolist() == pytest.approx([0.2] * 5)
    assert shares[1].tolist() == pytest.approx([1e-7, 1e-7, 1e-7, 1.0, 1e-7], rel=1e-5)


def test_one_class_alone_has_all() -> None:
    assert label_shares(random_map_of_one(), 1, SMOOTHING).tolist() == [[1.0], [1.0]]


def random_map_of_one() -> torch.Tensor:
    return torch.tensor(random_maps(3, (2, 4, 5), 1))


def test_no_region_has_no_shares() -> None:
    assert label_shares(torch.zeros(0, 4, 4, dtype=torch.uint8), 3, SMOOTHING).shape == (0, 3)


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor(random_maps(5, (7, 6, 5), 4))
    whole = label_shares(labels, 4, SMOOTHING)
    monkeypatch.setattr(module, "_COUNTED_AT_ONCE", 65)
    assert torch.equal(label_shares(labels, 4, SMOOTHING), whole)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, num_classes=st.integers(1, 20), height=st.integers(1, 5), width=st.integers(1, 5))
def test_entropy_is_scipys(seed: int, num_classes: int, height: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 8, (2, num_classes, height, width))
    probabilities = torch.tensor(logits).softmax(1)
    found = entropy_map(probabilities.float())
    expected = scipy.stats.entropy(probabilities.numpy(), axis=1)
    assert found.numpy() == pytest.approx(expected, abs=1e-5)
    assert (found >= 0).all()
    for chunk in (1, 50, 1 << 20):
        same = entropy_map_of_logits(torch.tensor(logits).float(), chunk_elements=chunk)
        assert same.numpy() == pytest.approx(expected, abs=1e-5)
        assert (same >= 0).all()


def test_entropy_of_certainty_and_of_none() -> None:
    certain = torch.zeros(1, 4, 1, 2)
    certain[:, 1, :, 0] = 1
    certain[:, :, :, 1] = 0.25
    assert entropy_map(certain).tolist() == [[[0.0, pytest.approx(math.log(4))]]]
    half = entropy_map(certain.half())
    assert half.dtype == torch.float32
    assert half.tolist() == [[[0.0, pytest.approx(math.log(4))]]]


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    grid=grids,
    cells=st.integers(1, 4),
    poolings=st.permutations(["min", "mean", "max"]),
    count=st.integers(1, 3),
)
def test_pooled_entropies_match_loops(
    seed: int, grid: tuple[int, int, int, int, int], cells: int, poolings: list[str], count: int
) -> None:
    rows, columns, h, w, batch = grid
    entropy = np.random.default_rng(seed).random((batch, rows * h, columns * w))
    found = pooled_entropies(torch.tensor(entropy), rows, columns, cells, poolings[:count])
    assert found.shape == (batch, rows * columns, count * cells**2)
    for image, one in zip(entropy, found, strict=True):
        for region, numbers in zip(slow_regions(image, rows, columns), one, strict=True):
            expected = [value for pooling in poolings[:count] for value in slow_pool(region, cells, pooling)]
            assert numbers.tolist() == pytest.approx(expected, abs=1e-9)


def test_no_pixel_is_dropped_where_cells_do_not_divide() -> None:
    entropy = torch.zeros(1, 90, 80)
    entropy[0, 89, 79] = 2.0
    largest = pooled_entropies(entropy, 1, 1, 8, ["max"])
    assert largest[0, 0].tolist() == [0.0] * 63 + [2.0]


@settings(deadline=None, max_examples=30)
@given(seed=seeds, grid=grids)
def test_means_match_loops(seed: int, grid: tuple[int, int, int, int, int]) -> None:
    rows, columns, h, w, batch = grid
    maps = np.random.default_rng(seed).normal(size=(batch, rows * h, columns * w))
    found = region_means(torch.tensor(maps), rows, columns)
    expected = [[region.mean() for region in slow_regions(image, rows, columns)] for image in maps]
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_bad_input_is_refused() -> None:
    maps = torch.zeros(1, 8, 9)
    labels = maps.to(torch.uint8)
    for call in (
        lambda: cut_regions(maps, 3, 3),
        lambda: class_shares(labels, 2, 4, 4, SMOOTHING),
        lambda: pooled_entropies(maps, 5, 3, 2, ["min"]),
        lambda: region_means(maps, 0, 3),
    ):
        with pytest.raises(InputError, match="does not divide 8 × 9 pixels"):
            call()
    with pytest.raises(InputError, match="expected uint8"):
        class_shares(maps, 2, 4, 3, SMOOTHING)
    with pytest.raises(InputError, match="num_classes is 255"):
        label_shares(labels, 255, SMOOTHING)
    with pytest.raises(InputError, match="smoothing is 0"):
        label_shares(labels, 2, 0.0)
    with pytest.raises(InputError, match=r"poolings is \['median'\], expected one or more of min, mean, max"):
        pooled_entropies(maps, 4, 3, 2, ["median"])
    with pytest.raises(InputError, match="poolings is"):
        pooled_entropies(maps, 4, 3, 2, [])
    with pytest.raises(InputError, match="cells is 0"):
        pooled_entropies(maps, 4, 3, 0, ["min"])
    with pytest.raises(InputError, match=r"expected \[B, H, W\]"):
        pooled_entropies(maps[0], 4, 3, 2, ["min"])
    with pytest.raises(InputError, match=r"expected \[B, H, W\]"):
        region_means(maps[None], 4, 3)
    with pytest.raises(InputError, match=r"expected \[B, C, H, W\]"):
        entropy_map(maps)
    with pytest.raises(InputError, match=r"expected \[B, C, H, W\]"):
        entropy_map_of_logits(maps)
    with pytest.raises(InputError, match=r"maps is \[8, 9\]"):
        cut_regions(maps[0], 2, 3)
