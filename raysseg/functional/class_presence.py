"""Which classes an image is known to have, and predictions that name no others."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError

ABSENT = -1e4
"""The logit of a class that is ruled out: finite, so that interpolation between two such logits stays finite."""


def present_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Finds the classes that each label map names, without waiting for the device.

    Args:
        labels: uint8 [B, H, W]; 254 padding, 255 unlabelled.
        num_classes: K.
    Returns:
        bool [B, K]; all True for a map without a label, of which nothing is known.
    Raises:
        InputError: where `labels` is not [B, H, W].
    Source: EIL, Eq. 2 with the whole image as window (reconstruction).
    """
    if labels.ndim != 3:
        raise InputError(f"labels is {list(labels.shape)}, expected [B, H, W]")
    found = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    found.scatter_(1, labels.flatten(1).long(), True)
    found = found[:, :num_classes]
    return found | ~found.any(1, keepdim=True)


def only_classes(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Rules out classes, so that the softmax spreads over the others alone.

    Args:
        logits: float [B, K, h, w].
        classes: bool [B, K], those that stay; None: all.
    Returns:
        float [B, K, h, w].
    Raises:
        InputError: where the shapes differ.
    Source: reconstruction.
    """
    if classes is None:
        return logits
    if classes.shape != logits.shape[:2]:
        raise InputError(f"classes is {list(classes.shape)}, expected {list(logits.shape[:2])} as logits")
    return logits.masked_fill(~classes[:, :, None, None], ABSENT)
