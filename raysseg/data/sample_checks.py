"""What must hold for a sample before it is written into a store."""

from __future__ import annotations

import re

import numpy as np

from raysseg.data.sample import Sample
from raysseg.errors import InputError
from raysseg.functional.constants import UNLABELLED

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_sample(sample: Sample, num_classes: int) -> None:
    """Refuses a sample that is not what its fields say.

    Args:
        sample: any.
        num_classes: K of its dataset.

    Raises:
        InputError: naming the key and the first wrong value.
    """
    if not sample.key:
        raise InputError("A sample has an empty key; a name that is unique in the dataset is expected.")
    if not _SPLIT_NAME.fullmatch(sample.split):
        raise InputError(
            f"The sample '{sample.key}' is of the split '{sample.split}'; letters, digits and '_-.' are expected."
        )
    image = sample.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(
            f"The image of '{sample.key}' has the dtype {image.dtype} and the shape {image.shape}; "
            "uint8 [H, W, 3] is expected."
        )
    for what, label_map in (("label", sample.label), ("scribble", sample.scribble)):
        if label_map is not None:
            _check_plane(sample, what, label_map, np.uint8)
            counts = np.bincount(label_map.ravel(), minlength=256)
            counts[:num_classes] = 0
            counts[UNLABELLED] = 0
            if counts.any():
                raise InputError(
                    f"The {what} of '{sample.key}' holds the value {int(counts.argmax())} in {int(counts.max())} "
                    f"pixels; classes 0 to {num_classes - 1} or {UNLABELLED} (unlabelled) are expected."
                )
    if sample.instances is not None:
        _check_plane(sample, "instance map", sample.instances, np.uint16)
    for tag in sample.tags:
        if not 0 <= tag < num_classes:
            raise InputError(
                f"The sample '{sample.key}' has the tag {tag}; classes 0 to {num_classes - 1} are expected."
            )
    for expression in sample.expressions:
        _check_plane(sample, f"mask of '{expression.text}'", expression.mask, np.bool_)


def _check_plane(sample: Sample, what: str, plane: np.ndarray, dtype: type[np.generic]) -> None:
    if plane.dtype != dtype or plane.shape != sample.image.shape[:2]:
        raise InputError(
            f"The {what} of '{sample.key}' has the dtype {plane.dtype} and the shape {plane.shape}; "
            f"{np.dtype(dtype)} {sample.image.shape[:2]} is expected, as its image."
        )
