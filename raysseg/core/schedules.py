"""Optimisers by name, and learning rates as pure functions of the progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from raysseg.core.settings import OptimiserSettings


def build_optimiser(settings: OptimiserSettings, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Builds the optimiser; parameter groups may carry `learning_rate_multiplier`.

    Source: EIL, implementation details.
    """
    groups = list(parameters)
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def schedule_factor(settings: OptimiserSettings, progress: float) -> float:
    """Returns the factor on the learning rate, in [0, 1], at `progress` in [0, 1].

    Source: EIL, implementation details (poly; cos).
    """
    progress = min(max(progress, 0.0), 1.0)
    if settings.schedule == "poly":
        return float((1.0 - progress) ** settings.poly_power)
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every group, times the group's multiplier. Source: reconstruction (head multiplier)."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * float(group.get("learning_rate_multiplier", 1.0))
