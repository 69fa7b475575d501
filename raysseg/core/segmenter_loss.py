"""The segmenter's loss on one minibatch, of which every learner passes its own rows, in pieces.

    loss =          Σ w_y · −log p_y / Σ w_y      over labelled pixels (Eq. 14); w: class weights
         + weight · Σ w_y · −log p_y / Σ w_y      over inferred labels, where they have a mean of their own
         + weight · Σ −Σ_c w_c t_c log p_c / Σ Σ_c w_c t_c    over the pixels that count in self-training, where it acts;
                                                  t: the teacher's probabilities; w: 1, or the class weights

The denominators are of the whole minibatch: the sum of `count_pixels` over all learners. A pixel counts where it lies on the
image, has no label (or an inferred one, which it then does not learn), and the teacher is confident enough of it. Where the
teacher may only speak of the classes in an image's label map, t is 0 for all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from raysseg.core.segmenter_batch import SegmenterBatch
from raysseg.core.settings import SelfTrainingSettings, TrainingSettings
from raysseg.functional.class_balance import label_mass
from raysseg.functional.class_presence import only_classes
from raysseg.functional.constants import UNLABELLED
from raysseg.segmenters import upsample_logits

Autocast = Callable[[], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the teacher says of this learner's rows of a minibatch, and how it is followed.

    Args:
        logits: before any upsampling, float32 `[B, K, h', w']`, without gradient.
        counted: pixels that learn from it, bool `[B, h, w]`.
        weight: of this part of the loss.
        class_weight: float32 `[K]`; None weighs each class 1.
    """

    logits: torch.Tensor
    counted: torch.Tensor
    weight: float
    class_weight: torch.Tensor | None = None

    def expected(self, rows: slice) -> torch.Tensor:
        """Returns w_c · t_c of some rows, whether their pixels count or not, float32 `[b, K, h, w]`."""
        expected = _probabilities(self.logits[rows], self.counted[rows])
        return expected if self.class_weight is None else expected * self.class_weight.view(1, -1, 1, 1)

    def mass(self, pieces: Sequence[slice]) -> torch.Tensor:
        """Returns the sum of w_c · t_c over the pixels that count, a float64 scalar."""
        if self.class_weight is None:
            return self.counted.sum().double()
        parts = [self.expected(rows).sum(1).masked_fill(~self.counted[rows], 0.0).sum().double() for rows in pieces]
        return torch.stack(parts).sum()


@torch.no_grad()
def teach(
    teacher: nn.Module,
    batch: SegmenterBatch,
    pieces: Sequence[slice],
    autocast: Autocast,
    settings: SelfTrainingSettings,
    class_weight: torch.Tensor | None = None,
) -> Lesson:
    """Asks the teacher about the crops of a minibatch.

    Its logits are kept and not its probabilities, which are `feature_stride`² times as large.

    Args:
        teacher: put into evaluation mode.
        batch: with `crops` and `inside`.
        pieces: of its B rows, passed one after the other.
        autocast: makes the context that networks are called in.
        settings: `pixels`, `confidence`, `weight` and `class_balanced`.
        class_weight: of the labels' loss, float32 `[K]`.

    Source: reconstruction.
    """
    assert batch.crops is not None
    teacher.eval()
    logits, counted = [], []
    for rows in pieces:
        with autocast():
            own = teacher(batch.crops[rows]).logits
        logits.append(only_classes(own.float(), None if batch.classes is None else batch.classes[rows]))
        taught = batch.taught(rows, settings.pixels)
        if settings.confidence > 0:
            taught &= _probabilities(logits[-1], taught).amax(1) >= settings.confidence
        counted.append(taught)
    return Lesson(
        logits=torch.cat(logits),
        counted=torch.cat(counted),
        weight=settings.weight,
        class_weight=class_weight if settings.class_balanced else None,
    )


class Totals(NamedTuple):
    """What the loss is a mean over, summed over a whole minibatch."""

    labelled: torch.Tensor
    """Pixels with a label of any kind."""
    labels: torch.Tensor
    """The class weights of labels, without inferred ones that have a mean of their own."""
    inferred: torch.Tensor
    """The class weights of those; 0 where there are none."""
    taught: torch.Tensor
    """Pixels that learn from the teacher."""
    lesson: torch.Tensor
    """The weights of what it says of them."""
    inside: torch.Tensor
    """In self-training, pixels that lie on images."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassWeights:
    """The class weights of a label version, float32 `[K]` each; None weighs each class 1.

    Args:
        labels: of the labels; where inferred ones have a mean of their own, of the scribbles.
        inferred: of inferred labels that have a mean of their own.
    """

    labels: torch.Tensor | None = None
    inferred: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        training: TrainingSettings,
        version: int,
        weigh: Callable[[int], torch.Tensor | None],
        *,
        self_training: bool,
    ) -> ClassWeights:
        """Returns the weights that learning from a label version needs.

        Args:
            training: says which labels are learned together.
            version: of the labels.
            weigh: returns the weights `[K]` of a version's labels; 0 are the scribbles.
            self_training: whether unlabelled pixels learn from the teacher.
        """
        apart = training.tells_inferred_apart(version, self_training=self_training)
        learned = apart and training.inferred_weight is not None
        return cls(labels=weigh(0 if apart else version), inferred=weigh(version) if learned else None)


def count_pixels(
    batch: SegmenterBatch, weights: ClassWeights, lesson: Lesson | None = None, pieces: Sequence[slice] = ()
) -> torch.Tensor:
    """Counts what the loss of this learner's rows is a mean over.

    Args:
        batch: B rows.
        weights: of the classes.
        lesson: on these rows, where self-training acts.
        pieces: of the rows, in which the lesson is gone through.

    Returns:
        float64 `[6]`, in the order of `Totals`.

    Source: design.
    """
    zero = torch.zeros((), dtype=torch.float64, device=batch.target.device)
    labelled, inferred = (batch.target != UNLABELLED).sum().double(), zero
    if batch.inferred is not None:
        labelled = labelled + (batch.inferred != UNLABELLED).sum().double()
        inferred = label_mass(batch.inferred, weights.inferred).double()
    counts = [labelled, label_mass(batch.target, weights.labels).double(), inferred]
    if lesson is None:
        return torch.stack([*counts, zero, zero, zero])
    assert batch.inside is not None
    return torch.stack([*counts, lesson.counted.sum().double(), lesson.mass(pieces), batch.inside.sum().double()])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterLoss:
    """The loss as `descend` calls it, piece by piece.

    Args:
        batch: this learner's B rows.
        weights: of the classes.
        totals: `count_pixels` of the whole minibatch.
        autocast: makes the context that networks are called in.
        inferred_weight: of inferred labels that have a mean of their own.
        lesson: on these rows, where self-training acts.
        taught: this learner's part of the self-training term before its weight, a scalar without gradient for every piece
            that has passed.
    """

    batch: SegmenterBatch
    weights: ClassWeights
    totals: Totals
    autocast: Autocast
    inferred_weight: float = 0.0
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
        if self.lesson is None and not self.inferred_weight:
            total = F.cross_entropy(
                logits, target, weight=self.weights.labels, ignore_index=UNLABELLED, reduction="sum"
            )
            return total / _mass(self.totals.labels, self.weights.labels)
        student = logits.log_softmax(1)
        loss = _label_loss(student, target, self.weights.labels, self.totals.labels)
        if self.batch.inferred is not None and self.inferred_weight > 0:
            inferred = _label_loss(student, self.batch.inferred[rows], self.weights.inferred, self.totals.inferred)
            loss = loss + self.inferred_weight * inferred
        if self.lesson is not None:
            term = self._self_training(self.lesson, student, rows)
            term = term / _mass(self.totals.lesson, self.lesson.class_weight)
            self.taught.append(term.detach())
            loss = loss + self.lesson.weight * term
        return loss

    def _self_training(self, lesson: Lesson, student: torch.Tensor, rows: slice) -> torch.Tensor:
        """Sums −Σ_c w_c t_c log p_c over the pixels of some rows that count; `student` is log p, float32 `[b, K, h, w]`."""
        return -(lesson.expected(rows) * student).sum(1).masked_fill(~lesson.counted[rows], 0.0).sum()


def _mass(total: torch.Tensor, class_weight: torch.Tensor | None) -> torch.Tensor:
    """What a sum is divided by: where nothing counts, the sum is 0, and this is not."""
    return total.clamp(min=1.0 if class_weight is None else 1e-6).float()


def _label_loss(
    student: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, total: torch.Tensor
) -> torch.Tensor:
    """The part of Σ w_y · −log p_y / Σ w_y that some rows have; `student` is log p, float32 `[b, K, h, w]`."""
    summed = F.nll_loss(student, target, weight=class_weight, ignore_index=UNLABELLED, reduction="sum")
    return summed / _mass(total, class_weight)


def _probabilities(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Probabilities float32 `[b, K, h, w]` at the resolution of a map `[b, h, w]`, made of logits as the student's are."""
    return upsample_logits(logits, (int(like.shape[-2]), int(like.shape[-1]))).softmax(1)
