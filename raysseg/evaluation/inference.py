"""Inference at one or several scales, with or without the mirrored image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raysseg.data.augmentation import normalise
from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, evaluation_mode, upsample_logits

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of the multi-scale test, together with the mirrored image. The paper does not give them. [R]"""


@torch.inference_mode()
def predict_probabilities(
    segmenter: Segmenter,
    images: Tensor,
    sizes: Tensor | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the class probabilities of whole images: the mean of the softmax over scales and mirrored images.

    Images of one size run as one batch, cut out of their canvas first: what the padding holds, and what else is in the
    batch, has no influence on an image's result. Batch normalisation uses its running statistics, whatever the
    segmenter's mode, which is left as it was.

    Args:
        segmenter: Φ, on the images' device.
        images: uint8 or float [B, 3, H, W] in [0, 255], each at the top-left of the canvas.
        sizes: int64 [B, 2], (H, W) of each image in pixels; None: all fill the canvas.
        scales: factors on the side of the images, each > 0. (1,) is one pass; `PAPER_SCALES` for the paper's test.
        flip: also run the images mirrored left to right.
        autocast_dtype: bfloat16 or float16 for mixed precision; None runs in the weights' own type.

    Returns:
        float32 [B, K, H, W]: sums to 1 over K at every pixel of an image, and is 0 in the padding.

    Raises:
        InputError: for no scale, or one that is not positive.

    Source: multi-scale and flip are the paper's test protocol; the rest is a reconstruction.
    """
    if not scales or min(scales) <= 0:
        raise InputError(f"The inference scales are {list(scales)}, expected one or more positive numbers.")
    batch, _, height, width = images.shape
    probabilities = torch.zeros(batch, segmenter.num_classes, height, width, device=images.device)
    rows_of_size: dict[tuple[int, int], list[int]] = {}
    for row, (rows, columns) in enumerate(sizes.tolist() if sizes is not None else [[height, width]] * batch):
        rows_of_size.setdefault((rows, columns), []).append(row)
    with (
        evaluation_mode(segmenter),
        torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        for size, members in rows_of_size.items():
            own = normalise(images[members, :, : size[0], : size[1]])
            probabilities[members, :, : size[0], : size[1]] = _mean_softmax(segmenter, own, size, scales, flip)
    return probabilities


def _mean_softmax(
    segmenter: Segmenter, images: Tensor, size: tuple[int, int], scales: Sequence[float], flip: bool
) -> Tensor:
    """Images float [B, 3, H, W], normalised, all of `size` → float32 [B, K, H, W]."""
    total = torch.zeros(len(images), segmenter.num_classes, *size, device=images.device)
    for scale in scales:
        scaled = images
        if scale != 1.0:
            target = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, size=target, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            shown = scaled.flip(-1) if mirrored else scaled
            logits = upsample_logits(segmenter(shown).logits, (shown.shape[-2], shown.shape[-1]))
            if mirrored:
                logits = logits.flip(-1)
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            total += torch.softmax(logits.float(), dim=1)
    return total / (len(scales) * (2 if flip else 1))
