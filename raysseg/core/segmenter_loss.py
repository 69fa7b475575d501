"""The segmenter's loss on one minibatch, of which every learner passes its own rows, in pieces.

    loss =          Σ w_y · −log p_y / Σ w_y      over labelled pixels (Eq. 14); w: class weights
         + weight · Σ −Σ_c t_c log p_c / n        over the n pixels that count in self-training, where it acts;
                                                  t: the teacher's probabilities

Both denominators are of the whole minibatch: the sum of `count_pixels` over all learners. A pixel counts where it lies on the
image, has no label, and the teacher is confident enough of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from raysseg.core.settings import SelfTrainingSettings
from raysseg.functional.class_balance import label_mass
from raysseg.functional.constants import UNLABELLED
from raysseg.segmenters import upsample_logits

Autocast = Callable[[], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterBatch:
    """A minibatch of the segmenter's update, on the device.

    Args:
        images: augmented and ImageNet-normalised, float32 `[B, 3, h, w]`.
        target: int64 `[B, h, w]`; 255 where no label is to be learned.
        crops: in self-training, the images as the teacher sees them, float32 `[B, 3, h, w]`.
        inside: in self-training, where a crop lies on its image, bool `[B, h, w]`.
    """

    images: torch.Tensor
    target: torch.Tensor
    crops: torch.Tensor | None = None
    inside: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the teacher says of this learner's rows of a minibatch, and how it is followed.

    Args:
        logits: before any upsampling, float32 `[B, K, h', w']`, without gradient.
        counted: pixels that learn from it, bool `[B, h, w]`.
        weight: of this part of the loss.
    """

    logits: torch.Tensor
    counted: torch.Tensor
    weight: float


@torch.no_grad()
def teach(
    teacher: nn.Module,
    batch: SegmenterBatch,
    pieces: Sequence[slice],
    autocast: Autocast,
    settings: SelfTrainingSettings,
) -> Lesson:
    """Asks the teacher about the crops of a minibatch.

    Its logits are kept and not its probabilities, which are `feature_stride`² times as large.

    Args:
        teacher: put into evaluation mode.
        batch: with `crops` and `inside`.
        pieces: of its B rows, passed one after the other.
        autocast: makes the context that networks are called in.
        settings: `confidence` and `weight`.

    Source: reconstruction.
    """
    assert batch.crops is not None
    assert batch.inside is not None
    teacher.eval()
    logits, counted = [], []
    for rows in pieces:
        with autocast():
            own = teacher(batch.crops[rows]).logits
        logits.append(own.float())
        unlabelled = batch.inside[rows] & (batch.target[rows] == UNLABELLED)
        if settings.confidence > 0:
            unlabelled &= _probabilities(logits[-1], unlabelled).amax(1) >= settings.confidence
        counted.append(unlabelled)
    return Lesson(logits=torch.cat(logits), counted=torch.cat(counted), weight=settings.weight)


def count_pixels(
    batch: SegmenterBatch, class_weight: torch.Tensor | None, lesson: Lesson | None = None
) -> torch.Tensor:
    """Counts what the loss of this learner's rows is a mean over.

    Args:
        batch: B rows.
        class_weight: float32 `[K]`; None weighs each class 1.
        lesson: on these rows, where self-training acts.

    Returns:
        float64 `[2]`: labelled pixels and the sum of their class weights; with a lesson `[4]`: also the pixels that learn from it
        and all that lie on images.

    Source: design.
    """
    counts = [(batch.target != UNLABELLED).sum().double(), label_mass(batch.target, class_weight).double()]
    if lesson is not None:
        assert batch.inside is not None
        counts += [lesson.counted.sum().double(), batch.inside.sum().double()]
    return torch.stack(counts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterLoss:
    """The loss as `descend` calls it, piece by piece.

    Args:
        batch: this learner's B rows.
        class_weight: float32 `[K]`; None weighs each class 1.
        totals: `count_pixels` of the whole minibatch.
        autocast: makes the context that networks are called in.
        lesson: on these rows, where self-training acts.
        taught: this learner's part of the self-training term before its weight, a scalar without gradient for every piece
            that has passed.
    """

    batch: SegmenterBatch
    class_weight: torch.Tensor | None
    totals: torch.Tensor
    autocast: Autocast
    lesson: Lesson | None = None
    taught: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, network: nn.Module, rows: slice) -> torch.Tensor:
        """Returns the part of the whole minibatch's loss that some rows have, a scalar.

        Args:
            network: the segmenter, as it is to be called.
            rows: of `batch`.
        """
        target = self.batch.target[rows]
        with self.autocast():
            output = network(self.batch.images[rows])
        logits = upsample_logits(output.logits.float(), (int(target.shape[-2]), int(target.shape[-1])))
        mass = self.totals[1].clamp(min=1.0 if self.class_weight is None else 1e-6).float()
        if self.lesson is None:
            total = F.cross_entropy(logits, target, weight=self.class_weight, ignore_index=UNLABELLED, reduction="sum")
            return total / mass
        student = logits.log_softmax(1)
        total = F.nll_loss(student, target, weight=self.class_weight, ignore_index=UNLABELLED, reduction="sum")
        # Where no pixel counts, this is 0 over 1.
        term = self._self_training(self.lesson, student, rows) / self.totals[2].clamp(min=1.0).float()
        self.taught.append(term.detach())
        return total / mass + self.lesson.weight * term

    def _self_training(self, lesson: Lesson, student: torch.Tensor, rows: slice) -> torch.Tensor:
        """Sums −Σ_c t_c log p_c over the pixels of some rows that count; `student` is log p, float32 `[b, K, h, w]`."""
        counted = lesson.counted[rows]
        expected = _probabilities(lesson.logits[rows], counted)
        return -(expected * student).sum(1).masked_fill(~counted, 0.0).sum()


def _probabilities(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Probabilities float32 `[b, K, h, w]` at the resolution of a map `[b, h, w]`, made of logits as the student's are."""
    return upsample_logits(logits, (int(like.shape[-2]), int(like.shape[-1]))).softmax(1)
