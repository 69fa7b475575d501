"""Variation of colours and visibility as a pure function of (image, seed); geometry stays, so labels stay valid.

    images, seed ──► brightness ──► contrast ──► saturation ──► blur ──► cutout ──► images

Batched, on the device; a factor that is 0 in the settings costs nothing.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from raysseg.configuration import Settings
from raysseg.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, normalise
from raysseg.errors import InputError
from raysseg.functional.random import uniform

# Streams of the random numbers of one seed, apart from those that others draw from it.
_BRIGHTNESS, _CONTRAST, _SATURATION, _BLUR, _CUTOUT = range(0x70686F, 0x70686F + 5)

_LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of R, G and B in a grey value (ITU-R BT.601)."""


class PhotometricSettings(Settings):
    """How colours and visibility of training images are varied; 0 leaves each as it is."""

    brightness: float = Field(0.0, ge=0, le=1, description="[R] largest relative change, drawn uniformly in ±")
    contrast: float = Field(
        0.0, ge=0, le=1, description="[R] largest relative change of the distance from the crop's mean grey"
    )
    saturation: float = Field(
        0.0, ge=0, le=1, description="[R] largest relative change of the distance from grey; grey images stay"
    )
    blur: float = Field(0.0, ge=0, description="[R] largest sigma of a Gaussian in pixels, drawn uniformly from 0 on")
    blur_share: float = Field(0.5, ge=0, le=1, description="[R] probability that an image is blurred")
    cutout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="[R] largest share of the crop's area under one rectangle of the mean colour, drawn uniformly from 0 on",
    )
    cutout_share: float = Field(0.5, ge=0, le=1, description="[R] probability that an image has that rectangle")

    @model_validator(mode="after")
    def _shares_have_effect(self) -> PhotometricSettings:
        for name in ("blur", "cutout"):
            largest, share = getattr(self, name), getattr(self, f"{name}_share")
            if largest == 0 and share != type(self).model_fields[f"{name}_share"].default:
                raise ValueError(f"{name}_share is {share:g} but {name} is 0, where it has no effect")
            if largest > 0 and share == 0:
                raise ValueError(f"{name} is {largest:g} but {name}_share is 0, so that it has no effect")
        return self


def vary_colours(images: Tensor, seeds: Tensor, settings: PhotometricSettings) -> Tensor:
    """Varies brightness, contrast and saturation, blurs, and covers a rectangle; no pixel moves.

    An image depends on its own pixels and seed only, never on the rest of the batch. What lies beside an image (0 in all
    channels) is varied with it and belongs to the mean grey of the contrast.

    Args:
        images: float32 [B, 3, h, w], ImageNet-normalised, colours in [0, 1] before that.
        seeds: int64 [B], any values; moved to the device of `images`.
        settings: the ranges.
    Returns:
        float32 [B, 3, h, w], ImageNet-normalised, colours in [0, 1] before that; the very input where the settings change
        nothing.
    Raises:
        InputError: where the shapes or dtypes do not fit.
    Source: reconstruction (the usual strong view of self-training; no paper of the five names one).
    """
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images is {images.dtype} {list(images.shape)}, expected float32 [B, 3, h, w]")
    if seeds.dtype != torch.int64 or seeds.shape != (len(images),):
        raise InputError(f"seeds is {seeds.dtype} {list(seeds.shape)}, expected int64 [{len(images)}]")
    seeds = seeds.to(images.device)
    if settings.brightness or settings.contrast or settings.saturation:
        images = _change_colours(images, seeds, settings)
    if settings.blur:
        images = _blur(images, seeds, settings)
    if settings.cutout:
        images = _cut_out(images, seeds, settings)
    return images


def _change_colours(images: Tensor, seeds: Tensor, settings: PhotometricSettings) -> Tensor:
    """Brightness p·f, contrast m + (p − m)·f about the mean grey m, saturation g + (p − g)·f about the grey value g."""

    def factor(change: float, stream: int) -> Tensor:
        return (1 + change * (2 * uniform(seeds, 1, stream=stream) - 1))[:, :, None, None]

    mean, std = (torch.tensor(one, device=images.device).view(1, 3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
    colours = images * std + mean
    if settings.brightness:
        colours = colours * factor(settings.brightness, _BRIGHTNESS)
    if settings.contrast:
        # Summed in float64: how a sum is split over threads depends on the batch, which float32 would show.
        centre = _grey(colours).double().mean((2, 3), keepdim=True).float()
        colours = centre + (colours - centre) * factor(settings.contrast, _CONTRAST)
    if settings.saturation:
        grey = _grey(colours)
        colours = grey + (colours - grey) * factor(settings.saturation, _SATURATION)
    return normalise(colours.clamp(0, 1) * 255)


def _grey(colours: Tensor) -> Tensor:
    """Returns grey values [B, 1, h, w] of colours [B, 3, h, w]."""
    red, green, blue = (colours[:, channel : channel + 1] * weight for channel, weight in enumerate(_LUMINANCE))
    return red + green + blue


def _blur(images: Tensor, seeds: Tensor, settings: PhotometricSettings) -> Tensor:
    """Convolves each image with a Gaussian of its own, cut at three times the largest sigma; borders are continued."""
    drawn, size = uniform(seeds, 2, stream=_BLUR).double().unbind(1)
    sigma = torch.where(drawn < settings.blur_share, size * settings.blur, 0.0)
    radius = math.ceil(3 * settings.blur)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device=images.device)
    # Far below a pixel all the weight lies on the centre: that image comes out as it was, bit by bit.
    weights = torch.exp(-0.5 * (offsets / sigma[:, None].clamp(min=1e-3)).square())
    weights = (weights / weights.sum(1, keepdim=True)).float()
    for dimension, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        length, padded = images.shape[dimension], F.pad(images, padding, mode="replicate")
        images = torch.zeros_like(images)
        # A convolution may round otherwise for another batch; a sum of shifted images does not.
        for tap in range(2 * radius + 1):
            images = images + padded.narrow(dimension, tap, length) * weights[:, tap, None, None, None]
    return images


def _cut_out(images: Tensor, seeds: Tensor, settings: PhotometricSettings) -> Tensor:
    """Covers a rectangle of whole pixels, between half and twice as high as the crop's shape says, inside the crop."""
    height, width = images.shape[-2:]
    drawn, area, shape, from_top, from_left = uniform(seeds, 5, stream=_CUTOUT).double().unbind(1)
    area = torch.where(drawn < settings.cutout_share, area * settings.cutout, 0.0)
    ratio = torch.exp2(2 * shape - 1)
    rows = ((area * ratio).sqrt().clamp(max=1) * height).floor()
    columns = ((area / ratio).sqrt().clamp(max=1) * width).floor()
    top, left = (from_top * (height - rows + 1)).floor(), (from_left * (width - columns + 1)).floor()
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    covered_rows = (y >= top[:, None]) & (y < (top + rows)[:, None])
    covered_columns = (x >= left[:, None]) & (x < (left + columns)[:, None])
    return images.masked_fill((covered_rows[:, :, None] & covered_columns[:, None, :])[:, None], 0.0)
