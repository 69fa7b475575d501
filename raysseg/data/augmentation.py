"""Augmentation as a pure function of (size, seed): whoever has the seed rebuilds exactly the crop that an actor saw.

    seed, (H, W) ──draw_geometry──► affine matrix ──warp_images──► image [3, h, w]
                                                  └─warp_labels──► labels [h, w], 254 outside of the image

All of it runs batched on the device. Scale, rotation, flip and crop are one matrix, so that each pixel is sampled once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from raysseg.configuration import Settings
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING
from raysseg.functional.random import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's R, G and B in [0, 1]: what pretrained encoders were normalised with."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's R, G and B in [0, 1]."""

# Streams of the random numbers of one seed, apart from those that others draw from it.
_SCALE, _FLIP, _ROTATION, _CROP, _PIXEL = range(0x617567, 0x617567 + 5)

# Sampled values are multiples of this: as fine as float32 near 255, far coarser than float64's rounding of coordinates.
_VALUE_STEP = 2.0**-16


class AugmentationSettings(Settings):
    """How training images are varied, as in EIL; with `scale` (1, 1) and `rotation` 0 no pixel value is interpolated."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.5, 2.0), description="Smallest and largest factor of the image's sides, drawn uniformly. [P]"
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip. [P]")
    rotation: float = Field(10.0, ge=0, le=180, description="Largest angle in degrees, drawn uniformly in ±. [P]")
    crop: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = Field(
        (512, 512), description="(H, W) of the crop in pixels, at a random place; null keeps each image's own size. [P]"
    )

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("the smallest factor comes first")
        return scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Geometry:
    """Where every output pixel is sampled.

    `matrix` float32 [B, 2, 3] takes an output pixel (x, y, 1) to an input pixel (x, y); centres of pixels have integer
    coordinates. `output_size` is (h, w) in pixels.
    """

    matrix: Tensor
    output_size: tuple[int, int]


def draw_geometry(
    sizes: Tensor,
    seeds: Tensor,
    settings: AugmentationSettings,
    *,
    output_size: tuple[int, int] | None = None,
    shown: Tensor | None = None,
) -> Geometry:
    """Draws scale, flip, rotation and crop of each image.

    The image is scaled to whole pixels, flipped, rotated about its centre, and a window at a whole pixel is cut out.
    Where the window is larger than the scaled image, it is laid so that it holds all of it. A matrix depends on its own
    size and seed only, never on the rest of the batch.

    Args:
        sizes: int64 [B, 2], (H, W) of each image.
        seeds: int64 [B], any values; moved to the device of `sizes`.
        settings: the ranges.
        output_size: (h, w) of the outputs where `settings.crop` is None, at least the largest image; where left out it
            is read from `sizes` (which waits for the device). Each image then lies at the top left, in a window of
            its own size.
        shown: int64 [B, 2], (y, x) of a pixel of each image that its window holds; where left out, windows lie anywhere. A
            rotation may turn a pixel near the border out of reach: then the window comes as near as it can.
    Returns:
        Geometry on the device of `sizes`.
    Raises:
        InputError: where `sizes` or `seeds` have another shape or dtype, or `output_size` contradicts `settings.crop`.
    Source: EIL, implementation details (ranges); reconstruction (order of the steps, uniform draw of the scale).
    """
    if sizes.dtype != torch.int64 or sizes.ndim != 2 or sizes.shape[1] != 2:
        raise InputError(f"sizes is {sizes.dtype} {list(sizes.shape)}, expected int64 [B, 2]")
    if seeds.dtype != torch.int64 or seeds.shape != sizes.shape[:1]:
        raise InputError(f"seeds is {seeds.dtype} {list(seeds.shape)}, expected int64 [{len(sizes)}]")
    if settings.crop is not None:
        if output_size is not None and tuple(output_size) != settings.crop:
            raise InputError(
                f"The output size {tuple(output_size)} differs from the crop {settings.crop} of the settings."
            )
        output_size = settings.crop
        window = torch.tensor(settings.crop, dtype=torch.float64, device=sizes.device).expand(len(sizes), 2)
    else:
        if output_size is None:
            height, width = sizes.amax(dim=0).tolist()
            output_size = (height, width)
        window = sizes.double()
    seeds = seeds.to(sizes.device)

    def draw(stream: int, count: int = 1) -> Tensor:
        return uniform(seeds, count, stream=stream).double()

    # All of it in float64, where whole pixels, quarter turns' halves and their sums are exact.
    smallest, largest = settings.scale
    scaled = ((smallest + (largest - smallest) * draw(_SCALE)) * sizes).round().clamp(min=1)
    ratio_y, ratio_x = (sizes / scaled).unbind(1)
    slack = scaled - window
    angle = torch.deg2rad(settings.rotation * (2 * draw(_ROTATION)[:, 0] - 1))
    cos, sin = angle.cos(), angle.sin()
    flipped = draw(_FLIP)[:, 0] < settings.flip
    sign = torch.where(flipped, -1.0, 1.0).to(torch.float64)

    centre_y, centre_x = ((scaled - 1) / 2).unbind(1)
    lowest, highest = torch.zeros_like(slack), slack.clamp(min=0)
    if shown is not None:
        from_y, from_x = ((shown + 0.5) * scaled / sizes - 0.5 - (scaled - 1) / 2).unbind(1)
        from_x = sign * from_x
        place = torch.stack((centre_y + cos * from_y - sin * from_x, centre_x + cos * from_x + sin * from_y), 1).round()
        lowest = torch.minimum((place - window + 1).clamp(min=0), highest)
        highest = torch.minimum(place.clamp(min=0), highest)
    moves = draw(_CROP, 2)
    steps = lowest + (moves * (highest - lowest + 1)).floor()
    offset_y, offset_x = torch.where(slack >= 0, steps, -(moves * (slack.abs() + 1)).floor()).unbind(1)
    start_x = centre_x + cos * (offset_x - centre_x) - sin * (offset_y - centre_y)
    start_y = centre_y + sin * (offset_x - centre_x) + cos * (offset_y - centre_y)
    start_x = torch.where(flipped, scaled[:, 1] - 1 - start_x, start_x)
    row_x = torch.stack((sign * cos * ratio_x, -sign * sin * ratio_x, start_x * ratio_x + (ratio_x - 1) / 2), dim=1)
    row_y = torch.stack((sin * ratio_y, cos * ratio_y, start_y * ratio_y + (ratio_y - 1) / 2), dim=1)
    return Geometry(matrix=torch.stack((row_x, row_y), dim=1).float(), output_size=output_size)


def draw_labelled_pixels(labels: Tensor, seeds: Tensor) -> Tensor:
    """Draws one labelled pixel of each map, uniformly; of a map without any, some pixel of the canvas.

    Args:
        labels: uint8 [B, H, W]; 254 and 255 are not labelled.
        seeds: int64 [B], of the images' augmentation.
    Returns:
        int64 [B, 2], (y, x) on the device of `labels`.
    Source: reconstruction.
    """
    counts = (labels < PADDING).flatten(1).cumsum(1)
    total, drawn = counts[:, -1:], uniform(seeds.to(labels.device), 1, stream=_PIXEL).double()
    wanted = (drawn * total).floor().long() + 1
    anywhere = (drawn * counts.shape[1]).floor().long()
    index = torch.where(total > 0, torch.searchsorted(counts, wanted), anywhere)
    return torch.cat((index // labels.shape[-1], index % labels.shape[-1]), 1)


def warp_images(images: Tensor, sizes: Tensor, geometry: Geometry) -> Tensor:
    """Samples images bilinearly; outside of an image stands ImageNet's mean, which `normalise` turns into 0.

    Between the centres of its border pixels and their outer edges an image is continued; nothing beyond it is read.
    A matrix of whole pixels (flip and crop alone) gives the very values of the input.

    Args:
        images: uint8 [B, 3, H, W], a canvas of which `sizes` is used.
        sizes: int64 [B, 2], (H, W) of each image.
        geometry: from `draw_geometry`.
    Returns:
        float32 [B, 3, h, w] in [0, 255], multiples of 2^-16.
    Raises:
        InputError: where the shapes or dtypes do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images is {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]")
    _check_batch(images, sizes, geometry)
    canvas_height, canvas_width = images.shape[-2:]
    x, y, inside = _sampling_points(sizes, geometry)
    last_y, last_x = (sizes - 1)[:, :, None, None].unbind(1)
    x = torch.minimum(x.clamp(min=0), last_x)
    y = torch.minimum(y.clamp(min=0), last_y)
    # grid_sample counts a canvas from -1 to 1, from edge to edge.
    grid = torch.stack(((2 * x + 1) / canvas_width - 1, (2 * y + 1) / canvas_height - 1), dim=-1)
    sampled = F.grid_sample(images.double(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Not rounded at the half: values are sums of powers of two, so that many would lie just there, and which way they go
    # would depend on the size of the canvas.
    sampled = sampled.div_(_VALUE_STEP).add_(0.3).floor_().mul_(_VALUE_STEP).float()
    mean = _channels(IMAGENET_MEAN, images) * 255
    return torch.where(inside[:, None], sampled, mean)


def warp_labels(labels: Tensor, sizes: Tensor, geometry: Geometry) -> Tensor:
    """Samples label maps at the nearest pixel; outside of an image stands 254 (padding).

    Args:
        labels: uint8 [B, H, W], a canvas of which `sizes` is used.
        sizes: int64 [B, 2], (H, W) of each map.
        geometry: from `draw_geometry`.
    Returns:
        uint8 [B, h, w], the same on every device for the same matrix.
    Raises:
        InputError: where the shapes or dtypes do not fit.
    """
    if labels.dtype != torch.uint8 or labels.ndim != 3:
        raise InputError(f"labels is {labels.dtype} {list(labels.shape)}, expected uint8 [B, H, W]")
    _check_batch(labels, sizes, geometry)
    x, y, inside = _sampling_points(sizes, geometry)
    column, row = (x + 0.5).floor().long(), (y + 0.5).floor().long()
    index = torch.where(inside, row * labels.shape[-1] + column, 0)
    sampled = labels.flatten(1).gather(1, index.flatten(1)).view_as(index)
    return sampled.masked_fill(~inside, PADDING)


def normalise(images: Tensor) -> Tensor:
    """Normalises images as ImageNet's encoders expect them: (x / 255 - mean) / std.

    Args:
        images: [B, 3, H, W] in [0, 255], uint8 or float.
    Returns:
        float32 [B, 3, H, W], about -2.1 to 2.6.
    """
    mean, std = _channels(IMAGENET_MEAN, images), _channels(IMAGENET_STD, images)
    return (images.float() - 255 * mean) / (255 * std)


def crop_and_flip(images: Tensor, maps: list[Tensor], sizes: Tensor, geometry: Geometry) -> tuple[Tensor, list[Tensor]]:
    """Applies a geometry that only flips and crops by whole pixels, without interpolating anything.

    The same values as `warp_images` and `warp_labels` in a fraction of the time; scaling and rotation are not looked at.

    Args:
        images: uint8 [B, 3, H, W].
        maps: label maps, uint8 [B, H, W] each.
        sizes: int64 [B, 2], height and width of every image.
        geometry: drawn without scaling and rotation.
    Returns:
        The images, ImageNet-normalised float32 [B, 3, h, w] (0 beside an image), and the maps uint8 [B, h, w] (254 there).
    Source: reconstruction (exploration keeps the window in the image's own pixels).
    """
    height, width = geometry.output_size
    matrix = geometry.matrix.double()
    column = matrix[:, 0, :1] * torch.arange(width, device=matrix.device) + matrix[:, 0, 2:]
    row = matrix[:, 1, 1:2] * torch.arange(height, device=matrix.device) + matrix[:, 1, 2:]
    x, y = column.round().long()[:, None, :], row.round().long()[:, :, None]
    inside = (y >= 0) & (y < sizes[:, :1, None]) & (x >= 0) & (x < sizes[:, 1:, None])
    index = torch.where(inside, y * images.shape[-1] + x, 0).flatten(1)
    planes = torch.cat([images, torch.stack(maps, 1)], 1).flatten(2)
    cut = planes.gather(2, index[:, None].expand(-1, planes.shape[1], -1)).unflatten(2, (height, width))
    outside = ~inside[:, None]
    labels = cut[:, 3:].masked_fill(outside, PADDING)
    return normalise(cut[:, :3]).masked_fill_(outside, 0.0), list(labels.unbind(1))


def _sampling_points(sizes: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Input coordinates x and y, float64 [B, h, w], and whether they lie on a pixel of the image, bool [B, h, w].

    float32 entries times whole numbers are exact in float64, so that every device rounds to the same pixel.
    """
    height, width = geometry.output_size
    matrix = geometry.matrix.double()[:, :, :, None, None]
    column = torch.arange(width, dtype=torch.float64, device=matrix.device)
    row = torch.arange(height, dtype=torch.float64, device=matrix.device)[:, None]
    x = matrix[:, 0, 0] * column + (matrix[:, 0, 1] * row + matrix[:, 0, 2])
    y = matrix[:, 1, 0] * column + (matrix[:, 1, 1] * row + matrix[:, 1, 2])
    end_y, end_x = (sizes - 0.5)[:, :, None, None].unbind(1)
    inside = (x >= -0.5) & (x < end_x) & (y >= -0.5) & (y < end_y)
    return x, y, inside


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, 3, 1, 1)


def _check_batch(canvas: Tensor, sizes: Tensor, geometry: Geometry) -> None:
    if sizes.shape != (len(canvas), 2) or geometry.matrix.shape != (len(canvas), 2, 3):
        raise InputError(
            f"{len(canvas)} images come with sizes {list(sizes.shape)} and matrices {list(geometry.matrix.shape)}; "
            f"[{len(canvas)}, 2] and [{len(canvas)}, 2, 3] are expected."
        )
