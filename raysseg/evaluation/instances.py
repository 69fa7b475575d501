"""Cityscapes' instance-level IoU: every object of a class weighs the same, however many pixels it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysseg.data.readers.cityscapes import CLASSES, OBJECTS_PER_LABEL_ID
from raysseg.errors import InputError

AVERAGE_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
"""Mean number of pixels of an object of each class that has objects and is scored.

Source: `avgClassSize` in cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py of the dataset's scripts."""

AVERAGE_SIZES_AREA = 2048 * 1024
"""Pixels of the images that `AVERAGE_SIZES` were counted on, Cityscapes' own."""

_STEPS_PER_PIXEL = 1 << 20
_LABEL_IDS = -(-(1 << 16) // OBJECTS_PER_LABEL_ID)
"""A uint16 holds label ids below this."""


def tells_objects_apart(class_names: Sequence[str]) -> bool:
    """Whether instances of a dataset with these classes can be scored: the classes must be Cityscapes'. Source: design."""
    return tuple(class_names) == tuple(CLASSES)


def instance_sums(prediction: Tensor, instances: Tensor, sizes: Tensor) -> Tensor:
    """Counts pixels of objects, each weighed by the mean size of its class over its own; sums of several batches add up.

    An object's pixels together weigh as much as the mean size of its class, scaled by the image's area over that of
    Cityscapes' own images; without this a class would weigh more against its false positives in images made smaller.
    The sums of an image are rounded to 2^-20 pixel, so that those of a set do not depend on the order of its images.

    Args:
        prediction: uint8 or int64 [B, H, W], Cityscapes' classes 0…18.
        instances: int32 [B, H, W], ids of the dataset: label id · 1000 + number of the object. What is not above 1000
            (no objects, groups, and the 0 beside an image) or of a class that is never scored is not counted.
        sizes: int64 [B, 2], (H, W) of each image in pixels.

    Returns:
        float64 [19, 2] on the same device: weighed pixels with the right class (iTP) and the others (iFN).

    Raises:
        InputError: for shapes that differ.

    Source: the dataset's scripts; scale and rounding are a reconstruction.
    """
    if prediction.shape != instances.shape:
        raise InputError(
            f"The prediction has the shape {list(prediction.shape)}, expected that of the instances, "
            f"{list(instances.shape)}."
        )
    device, batch, scored = instances.device, len(instances), len(AVERAGE_SIZES)
    names = list(CLASSES)
    classes = torch.tensor([names.index(name) for name in AVERAGE_SIZES] + [-1], device=device)
    # One place more than scored classes: pixels that are not counted.
    table = torch.full((_LABEL_IDS,), scored, device=device)
    table[[CLASSES[name][0] for name in AVERAGE_SIZES]] = torch.arange(scored, device=device)
    ids = instances.long()
    place = table[ids // OBJECTS_PER_LABEL_ID]
    image = torch.arange(batch, device=device).view(-1, 1, 1)
    cell = (image * (scored + 1) + place) * OBJECTS_PER_LABEL_ID + ids % OBJECTS_PER_LABEL_ID
    shape = (batch, scored + 1, OBJECTS_PER_LABEL_ID)
    cells = batch * (scored + 1) * OBJECTS_PER_LABEL_ID
    pixels = torch.bincount(cell.flatten(), minlength=cells).view(shape)[:, :scored]
    hits = torch.bincount(cell[prediction.long() == classes[place]], minlength=cells).view(shape)[:, :scored]
    shares = hits.double() / pixels.clamp(min=1)
    averages = torch.tensor(list(AVERAGE_SIZES.values()), dtype=torch.float64, device=device)
    weights = averages * (sizes.to(device).prod(1, keepdim=True) / AVERAGE_SIZES_AREA)
    found = shares.sum(2) * weights
    missed = (pixels > 0).sum(2) * weights - found
    exact = torch.round(torch.stack([found, missed], dim=2) * _STEPS_PER_PIXEL) / _STEPS_PER_PIXEL
    sums = torch.zeros(len(CLASSES), 2, dtype=torch.float64, device=device)
    sums[classes[:scored]] = exact.sum(0)
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceScores:
    """Instance-level scores of a whole set, all in [0, 1]; None marks what the set cannot say.

    Attributes:
        iiou: mean over the classes with objects that occur; None if none does.
        per_class_iiou: one per class, iTP / (iTP + FP + iFN); None for a class without objects, and for one of which there
            is neither an object nor a false positive.
    """

    iiou: float | None
    per_class_iiou: tuple[float | None, ...]

    @classmethod
    def from_sums(cls, sums: Tensor, matrix: Tensor) -> InstanceScores:
        """Returns the scores of a set.

        Args:
            sums: float64 [19, 2] of `instance_sums`.
            matrix: int64 [19, 19] of the same pixels, row = truth, column = prediction; its false positives weigh 1 each.

        Source: the dataset's scripts.
        """
        counts = matrix.detach().cpu().double()
        wrong = counts.sum(0) - counts.diagonal()
        scores: list[float | None] = []
        for name, (found, missed), false in zip(CLASSES, sums.tolist(), wrong.tolist(), strict=True):
            whole = found + missed + false
            scores.append(found / whole if name in AVERAGE_SIZES and whole > 0 else None)
        present = [score for score in scores if score is not None]
        return cls(iiou=sum(present) / len(present) if present else None, per_class_iiou=tuple(scores))
