"""Inference at one or several scales, with or without the mirrored image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

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

    def forward(shown: Tensor, labels: Tensor | None) -> list[Tensor]:
        return [segmenter(shown).logits]

    with evaluation_mode(segmenter):
        return _mean_over_views(
            forward, 1, segmenter.num_classes, images, sizes, None, scales, flip, autocast_dtype=autocast_dtype
        )[0]


class StepSegmenter(Protocol):
    """A network whose prediction goes through several steps."""

    num_classes: int

    def step_logits(self, images: Tensor, steps: Sequence[int], labels: Tensor | None) -> list[Tensor]:
        """Returns logits float `[B, K, h, w]` at every step, of normalised images float `[B, 3, H, W]`."""


@torch.inference_mode()
def predict_steps(
    network: StepSegmenter,
    images: Tensor,
    sizes: Tensor | None = None,
    *,
    steps: Sequence[int],
    labels: Tensor | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the class probabilities of whole images at several steps of a network that refines its prediction.

    Args:
        network: a module in the mode that it is to be used in, on the images' device.
        images, sizes, scales, flip, autocast_dtype: as for `predict_probabilities`.
        steps: rising.
        labels: uint8 [B, H, W] for networks that look at them; resized to the nearest pixel and mirrored with the images.

    Returns:
        float32 [S, B, K, H, W].

    Raises:
        InputError: for no scale, or one that is not positive.

    Source: reconstruction.
    """

    def forward(shown: Tensor, truth: Tensor | None) -> list[Tensor]:
        return network.step_logits(shown, steps, truth)

    return _mean_over_views(
        forward, len(steps), network.num_classes, images, sizes, labels, scales, flip, autocast_dtype=autocast_dtype
    )


def _mean_over_views(
    forward: Callable[[Tensor, Tensor | None], list[Tensor]],
    count: int,
    num_classes: int,
    images: Tensor,
    sizes: Tensor | None,
    labels: Tensor | None,
    scales: Sequence[float],
    flip: bool,
    *,
    autocast_dtype: torch.dtype | None,
) -> Tensor:
    """Passes images of one size as one batch; returns float32 [count, B, K, H, W]."""
    if not scales or min(scales) <= 0:
        raise InputError(f"The inference scales are {list(scales)}, expected one or more positive numbers.")
    batch, _, height, width = images.shape
    rows_of_size: dict[tuple[int, int], list[int]] = {}
    for row, (rows, columns) in enumerate(sizes.tolist() if sizes is not None else [[height, width]] * batch):
        rows_of_size.setdefault((rows, columns), []).append(row)

    def means_of(members: list[int], size: tuple[int, int]) -> Tensor:
        own = normalise(images[members, :, : size[0], : size[1]])
        truth = None if labels is None else labels[members, : size[0], : size[1]]
        return _mean_softmax(forward, count, num_classes, own, truth, size, scales, flip)

    with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        if list(rows_of_size) == [(height, width)]:
            return means_of(list(range(batch)), (height, width))
        probabilities = torch.zeros(count, batch, num_classes, height, width, device=images.device)
        for size, members in rows_of_size.items():
            probabilities[:, members, :, : size[0], : size[1]] = means_of(members, size)
    return probabilities


def _mean_softmax(
    forward: Callable[[Tensor, Tensor | None], list[Tensor]],
    count: int,
    num_classes: int,
    images: Tensor,
    labels: Tensor | None,
    size: tuple[int, int],
    scales: Sequence[float],
    flip: bool,
) -> Tensor:
    """Images float [B, 3, H, W], normalised, all of `size` → float32 [count, B, K, H, W]."""
    total = torch.zeros(count, len(images), num_classes, *size, device=images.device)
    for scale in scales:
        scaled, truth = images, labels
        if scale != 1.0:
            target = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, size=target, mode="bilinear", align_corners=False)
            if labels is not None:
                truth = F.interpolate(labels[:, None], size=target, mode="nearest")[:, 0]
        for mirrored in (False, True) if flip else (False,):
            shown = scaled.flip(-1) if mirrored else scaled
            own_truth = truth.flip(-1) if mirrored and truth is not None else truth
            for place, one in enumerate(forward(shown, own_truth)):
                logits = upsample_logits(one, (shown.shape[-2], shown.shape[-1]))
                if mirrored:
                    logits = logits.flip(-1)
                if logits.shape[-2:] != size:
                    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                total[place] += torch.softmax(logits.float(), dim=1)
    return total.div_(len(scales) * (2 if flip else 1))
