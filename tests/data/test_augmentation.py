"""Augmentation: a function of size and seed alone, exact where it only flips and crops, images and labels aligned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysseg.configuration import load_settings
from raysseg.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentationSettings,
    Geometry,
    crop_and_flip,
    draw_geometry,
    draw_labelled_pixels,
    normalise,
    warp_images,
    warp_labels,
)
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED

FLIP_AND_CROP = AugmentationSettings(scale=(1, 1), rotation=0, crop=(4, 3))
STILL = AugmentationSettings(scale=(1, 1), rotation=0, flip=0, crop=None)
SEEDS = st.integers(-(2**63), 2**63 - 1)
SIDES = st.integers(1, 24)


def batch(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random images uint8 [B, 3, H, W], labels uint8 [B, H, W] and their full sizes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 21, (count, height, width), dtype=torch.uint8, generator=generator)
    return images, labels, torch.tensor([[height, width]] * count)


def seeds_from(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int64)


def slow_warp(
    image: np.ndarray, label: np.ndarray, matrix: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """The obvious version: one output pixel after the other, image [3, H, W] and label [H, W]."""
    height, width = label.shape
    out = np.empty((3, *size))
    out_label = np.empty(size, np.uint8)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = matrix.astype(np.float64) @ (column, row, 1.0)
            if not (-0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5):
                out[:, row, column] = 255 * np.array(IMAGENET_MEAN)
                out_label[row, column] = PADDING
                continue
            out_label[row, column] = label[math.floor(y + 0.5), math.floor(x + 0.5)]
            x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
            left, top = math.floor(x), math.floor(y)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            u, v = x - left, y - top
            upper = image[:, top, left] * (1 - u) + image[:, top, right] * u
            lower = image[:, bottom, left] * (1 - u) + image[:, bottom, right] * u
            out[:, row, column] = upper * (1 - v) + lower * v
    return out, out_label


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(0, 6), st.integers(0, 6))
def test_warps_agree_with_the_obvious_version(
    seed: int, size: tuple[int, int], crop: tuple[int, int], below: int, beside: int
) -> None:
    images, labels, _ = batch(1, size[0] + below, size[1] + beside)
    sizes = torch.tensor([size])
    geometry = draw_geometry(sizes, torch.tensor([seed]), AugmentationSettings(rotation=40, crop=crop))
    expected, expected_label = slow_warp(
        images[0, :, : size[0], : size[1]].double().numpy(),
        labels[0, : size[0], : size[1]].numpy(),
        geometry.matrix[0].numpy(),
        crop,
    )
    assert np.allclose(warp_images(images, sizes, geometry)[0].numpy(), expected, atol=1e-4)
    assert np.array_equal(warp_labels(labels, sizes, geometry)[0].numpy(), expected_label)


@settings(deadline=None)
@given(SEEDS)
def test_flip_and_crop_alone_give_the_very_pixels(seed: int) -> None:
    images, labels, sizes = batch(1, 7, 9)
    geometry = draw_geometry(sizes, torch.tensor([seed]), FLIP_AND_CROP)
    warped = warp_images(images, sizes, geometry)[0]
    warped_label = warp_labels(labels, sizes, geometry)[0]
    windows = [
        (flipped, top, left)
        for flipped in (False, True)
        for top in range(7 - 4 + 1)
        for left in range(9 - 3 + 1)
        if torch.equal(cut(images[0], flipped, top, left).float(), warped)
    ]
    assert len(windows) == 1
    assert torch.equal(cut(labels[0], *windows[0]), warped_label)


@pytest.mark.parametrize("size", [(20, 24), (48, 40)])
def test_flip_and_crop_without_sampling_gives_what_sampling_gives(size: tuple[int, int]) -> None:
    images, labels, sizes = batch(6, 32, 28)
    rigid = AugmentationSettings(scale=(1.0, 1.0), rotation=0.0, flip=0.5, crop=size)
    geometry = draw_geometry(sizes, seeds_from(3, 6), rigid, output_size=size)
    pixels, (looked_up, again) = crop_and_flip(images, [labels, labels.flip(0)], sizes, geometry)
    assert torch.equal(looked_up, warp_labels(labels, sizes, geometry))
    assert torch.equal(again, warp_labels(labels.flip(0), sizes, geometry))
    torch.testing.assert_close(pixels, normalise(warp_images(images, sizes, geometry)), atol=1e-5, rtol=0)


def cut(plane: Tensor, flipped: bool, top: int, left: int) -> Tensor:
    return (plane.flip(-1) if flipped else plane)[..., top : top + 4, left : left + 3]


def test_every_window_is_drawn_about_equally_often() -> None:
    count = 6000
    sizes = torch.tensor([[7, 9]] * count)
    matrix = draw_geometry(sizes, seeds_from(0, count), FLIP_AND_CROP).matrix
    flipped = matrix[:, 0, 0] < 0
    left = torch.where(flipped, 8 - matrix[:, 0, 2], matrix[:, 0, 2]).long()
    window = (flipped * 28 + matrix[:, 1, 2].long() * 7 + left).tolist()
    counts = np.bincount(window, minlength=56)
    assert len(counts) == 56
    expected = count / 56
    # Chi-squared with 55 degrees of freedom: 93.2 is its 99.9 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 93.2


def test_every_labelled_pixel_is_drawn_about_equally_often() -> None:
    labels = torch.full((1, 6, 8), UNLABELLED, dtype=torch.uint8)
    labels[0, 2, 3:6], labels[0, 5, 7], labels[0, 0, 0] = 4, 0, PADDING
    drawn = draw_labelled_pixels(labels.expand(4000, 6, 8), seeds_from(0, 4000))
    places, counts = drawn.unique(dim=0, return_counts=True)
    assert places.tolist() == [[2, 3], [2, 4], [2, 5], [5, 7]]
    # Chi-squared with 3 degrees of freedom: 16.3 is its 99.9 % point.
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3
    nothing = draw_labelled_pixels(torch.full((500, 6, 8), UNLABELLED, dtype=torch.uint8), seeds_from(0, 500))
    assert nothing.amin(0).tolist() == [0, 0]
    assert nothing.amax(0).tolist() == [5, 7]


@pytest.mark.parametrize(
    ("scale", "rotation"), [((1.0, 1.0), 0.0), ((0.7, 1.6), 0.0), ((1.0, 1.0), 20.0), ((0.8, 1.5), 20.0)]
)
def test_a_window_holds_the_pixel_that_it_must_show(scale: tuple[float, float], rotation: float) -> None:
    count, ranges = 400, AugmentationSettings(scale=scale, rotation=rotation, flip=0.5, crop=(9, 11))
    sizes = torch.tensor([[40, 48], [33, 60]]).repeat(count // 2, 1)
    marks = torch.zeros(count, 40, 60, dtype=torch.uint8)
    # Far enough from the border for no rotation to turn it out of reach.
    shown = torch.stack([torch.randint(10, 23, (count,)), torch.randint(10, 38, (count,))], 1)
    marks[torch.arange(count), shown[:, 0], shown[:, 1]] = 1
    geometry = draw_geometry(sizes, seeds_from(0, count), ranges, shown=shown)
    # A scaled image may leave its pixel out between two samples, so its neighbours count as well.
    marks = torch.nn.functional.max_pool2d(marks.float(), 3, 1, 1).to(torch.uint8)
    assert (warp_labels(marks, sizes, geometry) == 1).flatten(1).any(1).all()


def test_windows_around_a_pixel_are_drawn_evenly_and_stay_within_the_image() -> None:
    count, still = 3000, AugmentationSettings(scale=(1, 1), rotation=0, flip=0, crop=(4, 3))
    sizes = torch.tensor([[7, 9]] * count)
    corner = draw_geometry(sizes, seeds_from(0, count), still, shown=torch.tensor([[1, 8]] * count)).matrix[:, :, 2]
    assert corner[:, 0].unique().tolist() == [6.0], "the only window that holds the last column"
    assert corner[:, 1].unique().tolist() == [0.0, 1.0]
    inner = draw_geometry(sizes, seeds_from(0, count), still, shown=torch.tensor([[3, 4]] * count)).matrix[:, :, 2]
    places, counts = inner.unique(dim=0, return_counts=True)
    assert places.tolist() == [[x, y] for x in (2.0, 3.0, 4.0) for y in (0.0, 1.0, 2.0, 3.0)]
    # Chi-squared with 11 degrees of freedom: 31.3 is its 99.9 % point.
    assert ((counts - 250) ** 2 / 250).sum() < 31.3


@settings(deadline=None)
@given(SEEDS, st.tuples(SIDES, SIDES))
def test_a_window_larger_than_the_image_holds_all_of_it(seed: int, size: tuple[int, int]) -> None:
    images, labels, sizes = batch(1, *size)
    crop = (27, 25)
    augmentation = AugmentationSettings(scale=(1, 1), rotation=0, crop=crop)
    geometry = draw_geometry(sizes, torch.tensor([seed]), augmentation)
    warped, warped_label = warp_images(images, sizes, geometry)[0], warp_labels(labels, sizes, geometry)[0]
    inside = warped_label != PADDING
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    assert inside.sum() == size[0] * size[1] == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    part = warped[:, inside].view(3, *size)
    assert torch.equal(part, images[0].float()) or torch.equal(part, images[0].flip(-1).float())
    mean = torch.tensor(IMAGENET_MEAN) * 255
    assert torch.equal(warped[:, ~inside], mean[:, None].expand(3, int((~inside).sum())))


def test_without_a_crop_images_of_mixed_sizes_stay_at_the_top_left() -> None:
    images, labels, _ = batch(3, 8, 11)
    sizes = torch.tensor([[8, 11], [5, 9], [7, 2]])
    geometry = draw_geometry(sizes, seeds_from(0, 3), STILL)
    assert geometry.output_size == (8, 11)
    warped, warped_labels = warp_images(images, sizes, geometry), warp_labels(labels, sizes, geometry)
    for index, (height, width) in enumerate(sizes.tolist()):
        assert torch.equal(warped[index, :, :height, :width], images[index, :, :height, :width].float())
        assert torch.equal(warped_labels[index, :height, :width], labels[index, :height, :width])
        beside = torch.ones(8, 11, dtype=torch.bool)
        beside[:height, :width] = False
        assert (warped_labels[index][beside] == PADDING).all()
        assert normalise(warped)[index][:, beside].abs().max() < 1e-5 if beside.any() else True
    wider = draw_geometry(sizes, seeds_from(0, 3), STILL, output_size=(9, 12))
    assert torch.equal(wider.matrix, geometry.matrix)


def test_a_flip_without_a_crop_stays_within_its_own_size() -> None:
    images, labels, _ = batch(2, 8, 11)
    sizes = torch.tensor([[8, 11], [5, 4]])
    geometry = draw_geometry(sizes, seeds_from(0, 2), AugmentationSettings(scale=(1, 1), rotation=0, flip=1, crop=None))
    warped = warp_images(images, sizes, geometry)
    assert torch.equal(warped[1, :, :5, :4], images[1, :, :5, :4].flip(-1).float())
    assert torch.equal(warp_labels(labels, sizes, geometry)[1, :5, :4], labels[1, :5, :4].flip(-1))


@settings(deadline=None)
@given(st.lists(st.tuples(SIDES, SIDES, SEEDS), min_size=2, max_size=6))
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(samples: list[tuple[int, int, int]]) -> None:
    sizes = torch.tensor([sample[:2] for sample in samples])
    seeds = torch.tensor([sample[2] for sample in samples])
    augmentation = AugmentationSettings(crop=(6, 5))
    height, width = sizes.amax(0).tolist()
    images, labels, _ = batch(len(samples), height, width)
    geometry = draw_geometry(sizes, seeds, augmentation)
    together = warp_images(images, sizes, geometry), warp_labels(labels, sizes, geometry)
    for index, (height, width, seed) in enumerate(samples):
        size = torch.tensor([[height, width]])
        alone = draw_geometry(size, torch.tensor([seed]), augmentation)
        assert torch.equal(alone.matrix[0], geometry.matrix[index])
        image = warp_images(images[index : index + 1, :, :height, :width], size, alone)
        assert torch.equal(image[0], together[0][index])
        label = warp_labels(labels[index : index + 1, :height, :width], size, alone)
        assert torch.equal(label[0], together[1][index])


def test_nothing_is_read_from_beyond_an_images_own_size() -> None:
    images, labels, _ = batch(16, 20, 30)
    sizes = torch.tensor([[20 - index, 14 + index] for index in range(16)])
    geometry = draw_geometry(sizes, seeds_from(0, 16), AugmentationSettings(crop=(24, 24)))
    results = []
    for filling in (0, 255):
        for index, (height, width) in enumerate(sizes.tolist()):
            for plane in (images[index], labels[index]):
                plane[..., height:, :] = filling
                plane[..., :, width:] = filling
        results.append((warp_images(images, sizes, geometry), warp_labels(labels, sizes, geometry)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_images_and_labels_stay_aligned_under_rotation_and_scale() -> None:
    """An image whose values are its own coordinates says where each output pixel was sampled."""
    height, width = 90, 120
    column, row = torch.arange(width).expand(height, width), torch.arange(height)[:, None].expand(height, width)
    images = torch.stack((column, row, column + row)).to(torch.uint8).repeat(12, 1, 1, 1)
    sizes = torch.tensor([[height, width]] * 12)
    geometry = draw_geometry(sizes, seeds_from(3, 12), AugmentationSettings(crop=(64, 80)))
    warped = warp_images(images, sizes, geometry)
    across, down = (warp_labels(images[:, channel], sizes, geometry) for channel in (0, 1))
    inside = across != PADDING
    assert 0.5 < inside.float().mean() < 1
    for label, channel in ((across, 0), (down, 1)):
        distance = (label.float() - warped[:, channel]).abs()[inside]
        assert distance.max() <= 0.5 + 1e-3
        assert distance.mean() > 0.1
    assert torch.allclose((warped[:, 0] + warped[:, 1])[inside], warped[:, 2][inside], atol=1e-3)
    assert torch.equal(down == PADDING, ~inside)


def parts_of(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale factor, rotation in degrees and flip of each matrix."""
    linear = matrix[:, :, :2].double()
    determinant = torch.linalg.det(linear)
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 1, 1]))
    return determinant.abs() ** -0.5, angle, determinant < 0


def test_the_ranges_are_kept_and_filled_evenly() -> None:
    count = 8000
    sizes = torch.tensor([[400, 600]] * count)
    matrix = draw_geometry(sizes, seeds_from(0, count), AugmentationSettings()).matrix
    scale, angle, flipped = parts_of(matrix)
    # A side is rounded to whole pixels: half a pixel of 200 is 0.0025 of its scale.
    assert 0.4975 < scale.min() < 0.51
    assert 1.99 < scale.max() < 2.0025
    assert -10 <= angle.min() < -9.9
    assert 9.9 < angle.max() <= 10
    # Five standard errors of a uniform draw, of a share.
    assert abs(float(scale.mean()) - 1.25) < 5 * 1.5 / math.sqrt(12 * count)
    assert abs(float(angle.mean())) < 5 * 20 / math.sqrt(12 * count)
    assert abs(float(flipped.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(count)
    table = torch.stack((scale, angle, flipped.double()))
    correlation = torch.corrcoef(table) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (0.2, 0.2), (1.0, 1.0)])
def test_the_share_of_flips_is_the_probability(flip: float, share: float) -> None:
    sizes = torch.tensor([[40, 60]] * 4000)
    matrix = draw_geometry(sizes, seeds_from(9, 4000), AugmentationSettings(flip=flip)).matrix
    assert float(parts_of(matrix)[2].float().mean()) == pytest.approx(
        share, abs=5 * math.sqrt(0.16 / 4000) * (0 < flip < 1)
    )


def test_scaling_keeps_the_edges_of_the_image_at_the_edges_of_the_window() -> None:
    """An image twice as large, in a window of its size: the first output pixel is centred a quarter pixel inside."""
    sizes = torch.tensor([[10, 20]])
    still = {"rotation": 0, "flip": 0}
    matrix = draw_geometry(sizes, seeds_from(0, 1), AugmentationSettings(scale=(2, 2), crop=(20, 40), **still)).matrix
    assert torch.equal(matrix[0], torch.tensor([[0.5, 0, -0.25], [0, 0.5, -0.25]]))
    matrix = draw_geometry(
        sizes, seeds_from(0, 1), AugmentationSettings(scale=(0.5, 0.5), crop=(5, 10), **still)
    ).matrix
    assert torch.equal(matrix[0], torch.tensor([[2, 0, 0.5], [0, 2, 0.5]]))


def test_rotation_turns_about_the_centre() -> None:
    sizes = torch.tensor([[31, 51]] * 50)
    augmentation = AugmentationSettings(scale=(1, 1), flip=0.5, rotation=90, crop=(31, 51))
    matrix = draw_geometry(sizes, seeds_from(0, 50), augmentation).matrix
    centre = matrix @ torch.tensor([25.0, 15.0, 1.0])
    assert torch.allclose(centre, torch.tensor([25.0, 15.0]).expand(50, 2), atol=1e-4)


def test_normalise_gives_imagenets_statistics() -> None:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = torch.stack((255 * mean, 255 * (mean + std), 255 * (mean - 2 * std)), dim=1).view(1, 3, 1, 3)
    expected = torch.tensor([0.0, 1.0, -2.0]).expand(1, 3, 1, 3)
    assert torch.allclose(normalise(images), expected, atol=1e-5)
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert normalise(bytes_)[0, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, 0.515 / 0.229], abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_and_samples_the_same() -> None:
    images, labels, sizes = batch(8, 160, 200)
    sizes = sizes - torch.arange(16).view(8, 2)
    seeds = seeds_from(0, 8)
    augmentation = AugmentationSettings(crop=(128, 128))
    here = draw_geometry(sizes, seeds, augmentation)
    there = draw_geometry(sizes.cuda(), seeds, augmentation)
    assert torch.allclose(there.matrix.cpu(), here.matrix, rtol=1e-6, atol=1e-5)
    same = Geometry(matrix=here.matrix.cuda(), output_size=here.output_size)
    assert torch.equal(warp_labels(labels.cuda(), sizes.cuda(), same).cpu(), warp_labels(labels, sizes, here))
    difference = warp_images(images.cuda(), sizes.cuda(), same).cpu() - warp_images(images, sizes, here)
    assert difference.abs().max() <= 2**-16
    exact = AugmentationSettings(scale=(1, 1), rotation=0, crop=(128, 128))
    here, there = draw_geometry(sizes, seeds, exact), draw_geometry(sizes.cuda(), seeds.cuda(), exact)
    assert torch.equal(there.matrix.cpu(), here.matrix)
    assert torch.equal(warp_images(images.cuda(), sizes.cuda(), there).cpu(), warp_images(images, sizes, here))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"scale": [2.0, 0.5]}, "scale"),
        ({"scale": [0, 1]}, "scale.0"),
        ({"flip": 1.5}, "flip"),
        ({"rotation": -1}, "rotation"),
        ({"crop": [0, 4]}, "crop.0"),
        ({"rotate": 10}, "did you mean 'rotation'"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(InputError, match=key):
        load_settings(AugmentationSettings, values)


def test_wrong_tensors_are_named() -> None:
    images, labels, sizes = batch(2, 6, 7)
    seeds = seeds_from(0, 2)
    geometry = draw_geometry(sizes, seeds, FLIP_AND_CROP)
    with pytest.raises(InputError, match=r"sizes is torch\.int32"):
        draw_geometry(sizes.int(), seeds, FLIP_AND_CROP)
    with pytest.raises(InputError, match=r"seeds is torch\.float32"):
        draw_geometry(sizes, seeds.float(), FLIP_AND_CROP)
    with pytest.raises(InputError, match=r"\(9, 9\) differs from the crop \(4, 3\)"):
        draw_geometry(sizes, seeds, FLIP_AND_CROP, output_size=(9, 9))
    with pytest.raises(InputError, match=r"images is torch\.float32"):
        warp_images(images.float(), sizes, geometry)
    with pytest.raises(InputError, match=r"labels is torch\.int64"):
        warp_labels(labels.long(), sizes, geometry)
    with pytest.raises(InputError, match="1 images come with sizes"):
        warp_labels(labels[:1], sizes, geometry)
