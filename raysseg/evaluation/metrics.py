"""Confusion matrix, and the scores that are read off it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING


def confusion_matrix(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Counts the pixels of every pair of classes; matrices of several batches add up.

    Args:
        prediction: uint8 [B, H, W], classes 0…K−1 (any value where the truth is 254 or 255).
        truth: uint8 [B, H, W], classes 0…K−1; pixels of value 255 (unlabelled) and 254 (padding) are not counted.
        num_classes: K.

    Returns:
        int64 [K, K] on the same device: row = class in the truth, column = class in the prediction.

    Raises:
        InputError: for shapes that differ, or a counted pixel whose value is no class.
    """
    if prediction.shape != truth.shape:
        raise InputError(
            f"The prediction has the shape {list(prediction.shape)}, expected the truth's {list(truth.shape)}."
        )
    wanted, given = truth.flatten().long(), prediction.flatten().long()
    counted = wanted < PADDING
    wrong = counted & ((wanted >= num_classes) | (given >= num_classes))
    cells = num_classes * num_classes
    # Two cells more than the matrix has: pixels that are not counted, and values that are no class.
    index = torch.where(counted, wanted * num_classes + given, cells).masked_fill_(wrong, cells + 1)
    counts = torch.bincount(index, minlength=cells + 2)
    if counts[cells + 1] > 0:
        pair = torch.stack([wanted, given], dim=1)[wrong][0].tolist()
        raise InputError(
            f"A pixel has the truth {pair[0]} and the prediction {pair[1]}, expected classes 0 to {num_classes - 1}."
        )
    return counts[:cells].view(num_classes, num_classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of a whole set, all in [0, 1]; None marks what the set cannot say.

    Attributes:
        miou: mean intersection over union of the classes that occur in the truth or in the prediction.
        per_class_iou: one per class; None for a class that occurs in neither.
        pixel_accuracy: share of the counted pixels with the right class.
        mean_foreground_dice: mean Dice of the classes 1…K−1 that occur, pixels pooled over the set; None if none does.
        per_class_dice: one per class; None for a class that occurs in neither.
    """

    miou: float
    per_class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    mean_foreground_dice: float | None
    per_class_dice: tuple[float | None, ...]

    @classmethod
    def from_confusion(cls, matrix: Tensor) -> Scores:
        """Returns the scores of a confusion matrix.

        Args:
            matrix: int64 [K, K], row = truth, column = prediction.

        Raises:
            InputError: if the matrix holds no pixel.
        """
        counts = matrix.detach().cpu().double()
        total = counts.sum()
        if total == 0:
            raise InputError("There is nothing to score: no pixel of the truth carries a label.")
        right = counts.diagonal()
        both = counts.sum(dim=0) + counts.sum(dim=1)
        union = both - right
        ious = tuple(float(r / u) if u > 0 else None for r, u in zip(right, union, strict=True))
        dices = tuple(float(2 * r / b) if b > 0 else None for r, b in zip(right, both, strict=True))
        present = [iou for iou in ious if iou is not None]
        foreground = [dice for dice in dices[1:] if dice is not None]
        return cls(
            miou=sum(present) / len(present),
            per_class_iou=ious,
            pixel_accuracy=float(right.sum() / total),
            mean_foreground_dice=sum(foreground) / len(foreground) if foreground else None,
            per_class_dice=dices,
        )
