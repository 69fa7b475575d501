"""The crops that are trained on: images and label maps of a split under one geometry per sample."""

from __future__ import annotations

from torch import Tensor

from raysseg.core.settings import TrainingSettings
from raysseg.data.augmentation import draw_geometry, draw_labelled_pixels, normalise, warp_images, warp_labels
from raysseg.data.batches import DeviceDataset


def read_crops(
    data: DeviceDataset, rows: Tensor, seeds: Tensor, training: TrainingSettings, *maps: Tensor
) -> tuple[Tensor, ...]:
    """Reads and augments samples; a crop is a function of its sample and seed alone.

    Args:
        data: the split.
        rows: int64 `[B]`.
        seeds: int64 `[B]`, of the augmentation.
        training: augmentation, and where crops lie.
        maps: label maps of the same rows, uint8 `[B, H, W]`; crops that lie around a labelled pixel look at the first.

    Returns:
        images float32 `[B, 3, h, w]`, ImageNet-normalised, and each map's crops uint8 `[B, h, w]`, 255 unlabelled and 254
        beside an image, all on the split's device.

    Raises:
        InputError: an unknown row.

    Source: EIL, implementation details (the ranges); reconstruction.
    """
    images, sizes = data.images(rows)
    shown = draw_labelled_pixels(maps[0], seeds) if training.crop_place == "labelled" else None
    augmentation = training.augmentation
    geometry = draw_geometry(sizes, seeds, augmentation, output_size=augmentation.crop or data.canvas, shown=shown)
    return normalise(warp_images(images, sizes, geometry)), *(warp_labels(one, sizes, geometry) for one in maps)
