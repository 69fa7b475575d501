"""What label maps are worth: on strokes that were kept back, and against the truth where a study has one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING
from raysseg.functional.counting import count_indices
from raysseg.functional.random import uniform


def _class_index(labels: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Numbers the (image, class) of every counted pixel, B · K for all others: int64 [B · H · W]."""
    batch = labels.shape[0]
    offset = torch.arange(0, batch * num_classes, num_classes, device=labels.device).view(batch, 1, 1)
    return torch.where(counted, labels.long() + offset, batch * num_classes).flatten()


def _class_sums(values: Tensor, index: Tensor, batch: int, num_classes: int) -> Tensor:
    """Sums values [B · H · W] by `_class_index`: float64 [B, K]."""
    sums = torch.zeros(batch * num_classes + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, index, values.double())[:-1].view(batch, num_classes)


def _class_counts(index: Tensor, batch: int, num_classes: int) -> Tensor:
    """Counts pixels by `_class_index`: int64 [B, K]."""
    return count_indices(index, batch * num_classes + 1)[:-1].view(batch, num_classes)


def hide_strokes(scribbles: Tensor, seeds: Tensor, num_classes: int) -> Tensor:
    """Chooses the part of each image's scribbles that is kept back: of every class the pixels on one side of a line.

    The line goes through the mean place of the class's own pixels, in one direction per image, so that of nearly every class
    something is kept back and something stays, and what is kept back is in one piece.

    Args:
        scribbles: uint8 [B, H, W], Y; 0…K−1, 254 padding, 255 unlabelled.
        seeds: int64 [B], which the directions are drawn by.
        num_classes: K.
    Returns:
        bool [B, H, W], true on scribbled pixels that are kept back.
    Raises:
        InputError: where the shapes do not fit.
    Source: reconstruction (held-out utility is not in the paper).
    """
    if scribbles.ndim != 3 or seeds.shape != scribbles.shape[:1]:
        raise InputError(f"scribbles is {list(scribbles.shape)} and seeds {list(seeds.shape)}, expected [B, H, W], [B]")
    batch, height, width = scribbles.shape
    angle = 2 * math.pi * uniform(seeds, 1).double().view(batch, 1, 1)
    rows = torch.arange(height, dtype=torch.float64, device=scribbles.device).view(1, height, 1)
    columns = torch.arange(width, dtype=torch.float64, device=scribbles.device).view(1, 1, width)
    place = rows * angle.sin() + columns * angle.cos()
    scribbled = scribbles < num_classes
    index = _class_index(scribbles, scribbled, num_classes)
    counts = _class_counts(index, batch, num_classes)
    means = _class_sums(place.flatten(), index, batch, num_classes) / counts.clamp_min(1)
    limit = torch.cat((means.flatten(), means.new_zeros(1)))[index].view(batch, height, width)
    return scribbled & (place > limit)


def balanced_log_likelihood(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Computes how likely logits make some labels: the mean over an image's classes of the mean over their pixels.

    Args:
        logits: float [B, K, H, W].
        labels: uint8 [B, H, W]; 0…K−1 wherever `counted`.
        counted: bool [B, H, W], the pixels that count.
    Returns:
        float32 [B], at most 0; 0 for an image without a counted pixel.
    Raises:
        InputError: where the shapes do not fit.
    Source: reconstruction (held-out utility is not in the paper).
    """
    if logits.ndim != 4 or labels.shape != counted.shape or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise InputError(
            f"logits is {list(logits.shape)}, labels {list(labels.shape)}, counted {list(counted.shape)}, "
            "expected [B, K, H, W], [B, H, W], [B, H, W]"
        )
    batch, num_classes = logits.shape[:2]
    index = _class_index(labels, counted, num_classes)
    target = torch.where(counted, labels, 0).long()
    likelihood = logits.float().log_softmax(1).gather(1, target[:, None]).flatten()
    counts = _class_counts(index, batch, num_classes)
    means = _class_sums(likelihood, index, batch, num_classes) / counts.clamp_min(1)
    return (means.sum(1) / (counts > 0).sum(1).clamp_min(1)).float()


def label_gain(labels: Tensor, next_labels: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Computes what a change of label maps gained against the truth: right labels minus wrong ones.

    Args:
        labels: uint8 [B, H, W], M.
        next_labels: uint8 [B, H, W], M'.
        truth: uint8 [B, H, W]; pixels without a true class (254, 255) do not count.
        num_classes: K.
    Returns:
        gain float32 [B] in [−2, 2], over the pixels with a true class, and the same by true class, meaned over the classes that
        the truth has [B]. A pixel's worth is 1 for a right label, −1 for a wrong one and 0 without one.
    Raises:
        InputError: where the shapes differ.
    Source: reconstruction (a diagnostic; G of the study before the project).
    """
    if not labels.shape == next_labels.shape == truth.shape or labels.ndim != 3:
        raise InputError(
            f"labels is {list(labels.shape)}, next_labels {list(next_labels.shape)}, truth {list(truth.shape)}, "
            "expected [B, H, W] three times"
        )

    def worth(one: Tensor) -> Tensor:
        return torch.where(one < PADDING, torch.where(one == truth, 1.0, -1.0), 0.0)

    batch = labels.shape[0]
    index = _class_index(truth, truth < num_classes, num_classes)
    counts = _class_counts(index, batch, num_classes)
    sums = _class_sums((worth(next_labels) - worth(labels)).flatten(), index, batch, num_classes)
    gain = sums.sum(1) / counts.sum(1).clamp_min(1)
    balanced = (sums / counts.clamp_min(1)).sum(1) / (counts > 0).sum(1).clamp_min(1)
    return gain.float(), balanced.float()
