"""What is counted over the images of a set, batch by batch and actor by actor, before it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raysseg.evaluation.instances import InstanceScores, instance_sums
from raysseg.evaluation.metrics import Scores, confusion_matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """Counts of some images; those of several batches add up.

    Attributes:
        confusion: int64 [K, K], row = truth, column = prediction.
        instances: float64 [K, 2], iTP and iFN of `instance_sums`; None where no instances are scored.
    """

    confusion: Tensor
    instances: Tensor | None

    @classmethod
    def of(
        cls, prediction: Tensor, truth: Tensor, num_classes: int, *, instances: Tensor | None, sizes: Tensor
    ) -> Counts:
        """Counts the pixels of a batch.

        Args:
            prediction: uint8 or int64 [B, H, W], classes 0…K−1.
            truth: uint8 [B, H, W], classes 0…K−1; 255 (unlabelled) and 254 (padding) are not counted.
            num_classes: K.
            instances: int32 [B, H, W] of Cityscapes, or None.
            sizes: int64 [B, 2], (H, W) of each image in pixels.

        Raises:
            InputError: for shapes that differ, or a counted pixel whose value is no class.
        """
        return cls(
            confusion=confusion_matrix(prediction, truth, num_classes),
            instances=None if instances is None else instance_sums(prediction, instances, sizes),
        )

    def __add__(self, other: Counts) -> Counts:
        """Returns the counts of both."""
        both = None
        if self.instances is not None and other.instances is not None:
            both = self.instances + other.instances
        return Counts(confusion=self.confusion + other.confusion, instances=both)

    def cpu(self) -> Counts:
        """Returns these counts on the CPU."""
        return Counts(
            confusion=self.confusion.cpu(), instances=None if self.instances is None else self.instances.cpu()
        )

    def scores(self) -> Scores:
        """Returns the scores of the confusion matrix; raises `InputError` where it holds no pixel."""
        return Scores.from_confusion(self.confusion)

    def instance_scores(self) -> InstanceScores | None:
        """Returns the scores of the objects, or None where no instances are scored."""
        return None if self.instances is None else InstanceScores.from_sums(self.instances, self.confusion)

    def record(self) -> dict[str, Any]:
        """Returns what an evaluation logs: mIoU and its companions, and of the objects iIoU where they are scored."""
        scores, objects = self.scores(), self.instance_scores()
        return {
            "miou": scores.miou,
            "per_class_iou": list(scores.per_class_iou),
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_foreground_dice": scores.mean_foreground_dice,
            **({} if objects is None else {"iiou": objects.iiou, "per_class_iiou": list(objects.per_class_iiou)}),
        }
