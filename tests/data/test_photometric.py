"""Colours vary as a function of image and seed alone, each factor as its slow version says, and no label moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raysseg.configuration import load_settings
from raysseg.data import photometric
from raysseg.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, normalise
from raysseg.data.photometric import PhotometricSettings, vary_colours
from raysseg.errors import InputError
from raysseg.functional.random import uniform

EVERYTHING = PhotometricSettings(
    brightness=0.4, contrast=0.4, saturation=0.4, blur=1.5, blur_share=0.7, cutout=0.3, cutout_share=0.7
)
MEAN, STD = (np.array(one)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_STD))


def pictures(count: int = 6, height: int = 13, width: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return normalise(torch.randint(0, 256, (count, 3, height, width), generator=generator))


def seeds_of(count: int = 6) -> Tensor:
    return torch.arange(count) * 7919 - 3


def draws(seed: int, count: int, stream: int) -> list[float]:
    return uniform(torch.tensor([seed]), count, stream=stream)[0].double().tolist()


def slow_grey(pixel: np.ndarray) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def slow_colours(image: np.ndarray, seed: int, settings: PhotometricSettings) -> np.ndarray:
    """The obvious version: one pixel after the other, image [3, h, w]."""

    def factor(change: float, stream: int) -> float:
        return 1 + change * (2 * draws(seed, 1, stream)[0] - 1)

    pixels = (image * STD + MEAN) * factor(settings.brightness, photometric._BRIGHTNESS)
    places = list(np.ndindex(pixels.shape[1:]))
    centre = sum(slow_grey(pixels[:, y, x]) for y, x in places) / len(places)
    contrast = factor(settings.contrast, photometric._CONTRAST)
    saturation = factor(settings.saturation, photometric._SATURATION)
    for y, x in places:
        pixel = centre + (pixels[:, y, x] - centre) * contrast
        grey = slow_grey(pixel)
        pixels[:, y, x] = [min(max(grey + (value - grey) * saturation, 0.0), 1.0) for value in pixel]
    return (pixels - MEAN) / STD


def slow_blur(image: np.ndarray, seed: int, settings: PhotometricSettings) -> np.ndarray:
    """The obvious version: both sums at once, of every pixel."""
    drawn, size = draws(seed, 2, photometric._BLUR)
    if drawn >= settings.blur_share:
        return image
    sigma, radius = size * settings.blur, math.ceil(3 * settings.blur)
    height, width = image.shape[1:]
    result = np.zeros_like(image)
    for row, column in np.ndindex(height, width):
        mass = 0.0
        for down in range(-radius, radius + 1):
            for right in range(-radius, radius + 1):
                weight = math.exp(-(down**2 + right**2) / (2 * sigma**2))
                y, x = min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)
                result[:, row, column] += weight * image[:, y, x]
                mass += weight
        result[:, row, column] /= mass
    return result


def test_the_settings_that_change_nothing_return_the_very_input() -> None:
    images = pictures()
    assert vary_colours(images, seeds_of(), PhotometricSettings()) is images


def test_the_same_seeds_give_the_same_images_and_the_input_stays() -> None:
    images = pictures()
    before = images.clone()
    first, second = (vary_colours(images, seeds_of(), EVERYTHING) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(images, before)
    other = vary_colours(images, seeds_of() + 1, EVERYTHING)
    assert all(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("height", [1, 13, 64])
def test_an_image_alone_gives_the_values_that_it_has_in_a_batch(height: int) -> None:
    images, seeds = pictures(height=height, width=61), seeds_of()
    together = vary_colours(images, seeds, EVERYTHING)
    for index in range(len(images)):
        alone = vary_colours(images[index : index + 1], seeds[index : index + 1], EVERYTHING)
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize(
    "settings",
    [{"brightness": 0.8}, {"contrast": 0.8}, {"saturation": 1.0}, {"brightness": 0.5, "contrast": 1, "saturation": 1}],
)
def test_colours_agree_with_the_obvious_version(settings: dict[str, Any]) -> None:
    images, seeds, options = pictures(), seeds_of(), PhotometricSettings(**settings)
    found = vary_colours(images, seeds, options)
    for image, seed, one in zip(images, seeds.tolist(), found, strict=True):
        np.testing.assert_allclose(one.numpy(), slow_colours(image.double().numpy(), seed, options), atol=2e-5)
    assert (found - images).abs().amax((1, 2, 3)).min() > 0.01, "every image changes"


def test_a_blur_agrees_with_the_obvious_version_and_spares_the_others() -> None:
    images, seeds = pictures(12, 5, 7), seeds_of(12)
    options = PhotometricSettings(blur=1.2, blur_share=0.5)
    found, spared = vary_colours(images, seeds, options), 0
    for image, seed, one in zip(images, seeds.tolist(), found, strict=True):
        expected = slow_blur(image.double().numpy(), seed, options)
        np.testing.assert_allclose(one.numpy(), expected, atol=2e-5)
        if draws(seed, 1, photometric._BLUR)[0] >= 0.5:
            assert torch.equal(one, image)
            spared += 1
    assert 2 <= spared <= 10


def test_a_cutout_is_one_rectangle_of_the_mean_colour_and_no_larger_than_allowed() -> None:
    count, height, width = 400, 24, 40
    images, seeds = pictures(1, height, width).expand(count, -1, -1, -1), seeds_of(count)
    found = vary_colours(images, seeds, PhotometricSettings(cutout=0.25, cutout_share=0.5))
    covered = (found != images).any(1)
    assert (found.masked_select(covered[:, None]) == 0).all()
    assert torch.equal(found.masked_select(~covered[:, None]), images.masked_select(~covered[:, None]))
    sides = []
    for one in covered[covered.flatten(1).any(1)]:
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        high, wide = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert int(one.sum()) == high * wide, "a rectangle"
        sides.append((high / height, wide / width, rows[0] / max(1, height - high), columns[0] / max(1, width - wide)))
    values = np.array(sides)
    share, ratio = values[:, 0] * values[:, 1], values[:, 0] / values[:, 1]
    assert 0.2 < share.max() <= 0.25
    assert 160 < len(sides) < 230, "half of the images, but for rectangles of less than a pixel"
    large = share > 0.05
    assert ratio[large].min() < 0.7
    assert ratio[large].max() > 1.4
    for place in (values[:, 2], values[:, 3]):
        assert place.min() < 0.05
        assert place.max() > 0.95
        assert 0.4 < place.mean() < 0.6


def test_a_cutout_may_be_the_whole_crop_and_not_more() -> None:
    images = pictures(200, 6, 6)
    covered = (vary_colours(images, seeds_of(200), PhotometricSettings(cutout=1.0, cutout_share=1.0)) == 0).all(1)
    assert covered.float().mean() == pytest.approx(0.4, abs=0.1)


def test_the_largest_changes_stay_among_colours() -> None:
    options = PhotometricSettings(brightness=1, contrast=1, saturation=1, blur=3, cutout=1)
    images = pictures(40)
    colours = vary_colours(images, seeds_of(40), options).double().numpy() * STD + MEAN
    assert np.isfinite(colours).all()
    assert colours.min() > -1e-6
    assert colours.max() < 1 + 1e-6


def test_grey_images_stay_grey_and_have_no_saturation_to_change() -> None:
    grey = normalise(
        torch.randint(0, 256, (6, 1, 9, 9), generator=torch.Generator().manual_seed(1)).expand(-1, 3, -1, -1)
    )
    saturated = vary_colours(grey, seeds_of(), PhotometricSettings(saturation=1.0))
    torch.testing.assert_close(saturated, grey, rtol=0, atol=2e-5)
    colours = (
        vary_colours(grey, seeds_of(), PhotometricSettings(brightness=0.4, contrast=0.4)).double().numpy() * STD + MEAN
    )
    assert np.ptp(colours, axis=1).max() < 1e-5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"brightness": -0.1}, "brightness"),
        ({"cutout": 1.5}, "cutout"),
        ({"hue": 0.1}, "Unknown key 'hue'"),
        ({"blur_share": 0.2}, "blur_share is 0.2 but blur is 0, where it has no effect"),
        ({"cutout": 0.5, "cutout_share": 0.0}, "cutout is 0.5 but cutout_share is 0, so that it has no effect"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_settings(PhotometricSettings, values)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"images is torch\.uint8 .*expected float32 \[B, 3, h, w\]"):
        vary_colours(pictures().to(torch.uint8), seeds_of(), EVERYTHING)
    with pytest.raises(InputError, match=r"seeds is torch\.int64 \[5\], expected int64 \[6\]"):
        vary_colours(pictures(), seeds_of(5), EVERYTHING)
