"""A minibatch of the segmenter's update, read and augmented next to the loss."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from raysseg.core.crops import read_crops
from raysseg.core.prefetch import to_device
from raysseg.core.settings import TrainingSettings
from raysseg.data.batches import DeviceDataset
from raysseg.data.photometric import vary_colours
from raysseg.functional.class_presence import present_classes
from raysseg.functional.constants import PADDING, UNLABELLED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterBatch:
    """A minibatch of the segmenter's update, on the device.

    Args:
        images: augmented and ImageNet-normalised, float32 `[B, 3, h, w]`.
        target: int64 `[B, h, w]`; 255 where no label is to be learned.
        inferred: where inferred labels are not learned as scribbles are, these, int64 `[B, h, w]`; `target` is then the scribbles.
        crops: in self-training, the images as the teacher sees them, float32 `[B, 3, h, w]`.
        inside: in self-training, where a crop lies on its image, bool `[B, h, w]`.
        classes: in self-training, those that the teacher may speak of, bool `[B, K]`; None: all.
    """

    images: torch.Tensor
    target: torch.Tensor
    inferred: torch.Tensor | None = None
    crops: torch.Tensor | None = None
    inside: torch.Tensor | None = None
    classes: torch.Tensor | None = None

    def taught(self, rows: slice, pixels: Literal["unlabelled", "inferred"]) -> torch.Tensor:
        """Returns which pixels of some rows may learn from the teacher, bool `[b, h, w]`."""
        assert self.inside is not None
        bare = self.inside[rows] & (self.target[rows] == UNLABELLED)
        if self.inferred is None:
            return bare if pixels == "unlabelled" else torch.zeros_like(bare)
        return bare & ((self.inferred[rows] == UNLABELLED) == (pixels == "unlabelled"))


def read_segmenter_batch(
    data: DeviceDataset,
    records: pa.RecordBatch,
    version: int,
    training: TrainingSettings,
    num_classes: int,
    *,
    self_training: bool,
) -> SegmenterBatch:
    """Reads and augments images and label maps, and in self-training varies what the student sees of them.

    Args:
        data: the training split.
        records: with the columns `row` and `seed`.
        version: label version.
        training: augmentation, self-training, and whether inferred labels have a mean of their own.
        num_classes: K.
        self_training: whether unlabelled pixels learn from the teacher.

    Raises:
        InputError: an unknown row or version.

    Source: reconstruction.
    """
    rows = torch.tensor(np.asarray(records.column("row")), dtype=torch.int64)
    seeds = to_device(np.asarray(records.column("seed")), data.device)
    apart = training.tells_inferred_apart(version, self_training=self_training)
    maps = [data.labels(rows, number) for number in ((version, 0) if apart else (version,))]
    crops, labels, *drawn = read_crops(data, rows, seeds, training, *maps)
    target, inferred = split_labels(labels, drawn[0] if apart else None)
    if not self_training:
        return SegmenterBatch(images=crops, target=target, inferred=inferred)
    own = training.self_training
    return SegmenterBatch(
        images=vary_colours(crops, seeds, own.student_view),
        target=target,
        inferred=inferred,
        crops=crops,
        inside=labels != PADDING,
        classes=present_classes(maps[0], num_classes) if own.classes == "labelled" else None,
    )


def split_labels(
    labels: torch.Tensor, scribbles: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns label maps as a loss takes them: 255 beside an image as well.

    Args:
        labels: uint8 `[B, h, w]`.
        scribbles: uint8 `[B, h, w]`, where inferred labels are told apart.

    Returns:
        All labels, or the scribbles, int64 `[B, h, w]`; and what was inferred, int64 `[B, h, w]`, or None.

    Source: reconstruction.
    """
    everything = torch.where(labels == PADDING, UNLABELLED, labels).long()
    if scribbles is None:
        return everything, None
    drawn = torch.where(scribbles == PADDING, UNLABELLED, scribbles).long()
    return drawn, everything.masked_fill(drawn != UNLABELLED, UNLABELLED)
