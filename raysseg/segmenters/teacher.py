"""The teacher: a moving average of the segmenters of previous epochs (EIL, Eq. 13)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.segmenters.segmenter import Segmenter


def make_teacher(online: Segmenter) -> Segmenter:
    """Returns a copy of the segmenter that shares nothing with it, in evaluation mode and without gradients."""
    teacher = copy.deepcopy(online)
    teacher.requires_grad_(False)
    teacher.zero_grad(set_to_none=True)
    return teacher.eval()


@torch.no_grad()
def update_teacher(teacher: Segmenter, online: Segmenter, momentum: float) -> None:
    """Moves the teacher, in place: teacher ← momentum · teacher + (1 − momentum) · online.

    Parameters and the running statistics of the batch normalisation are averaged; integer buffers (numbers of batches)
    are copied.

    Args:
        teacher: from `make_teacher`.
        online: the segmenter in training, on the same device.
        momentum: in [0, 1]; 0 copies, 1 leaves the teacher as it is.

    Raises:
        InputError: for a momentum outside [0, 1].

    Source: Eq. 13 (the moving average); that the buffers are averaged too is a reconstruction.
    """
    if not 0.0 <= momentum <= 1.0:
        raise InputError(f"The teacher's momentum is {momentum}, expected a number in [0, 1].")
    averaged: list[Tensor] = []
    towards: list[Tensor] = []
    current = online.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            averaged.append(value)
            towards.append(current[name])
        else:
            value.copy_(current[name])
    torch._foreach_lerp_(averaged, towards, 1.0 - momentum)
