"""What the return of a rehearsed stage says of constant policies, beside the mIoU that their rehearsals truly reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysseg.algorithms.eil.policy import Policy
from raysseg.algorithms.eil.rehearsal import Outcome, Rehearsal
from raysseg.algorithms.eil.reward_check import FrozenStates, with_policy

THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.98)
NOTHING = 40.0
"""The logit of a threshold that is 1 in single precision, which adopts nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedPolicy:
    """One constant policy's line of the table; every number is a mean over folds.

    Args:
        name: its threshold and window.
        labelled_share: of the images' pixels.
        overlap: the return.
        agreement: of both networks with each other.
        on_strokes: their overlap with strokes that they did not learn from.
        miou: of both networks on the images that were left out.
    """

    name: str
    labelled_share: float
    overlap: float
    agreement: float
    on_strokes: float
    miou: float


def rehearse_constants(
    folder: Path,
    *,
    options: dict[str, Any],
    images: int,
    folds: int,
    show: Callable[[int, int], None],
) -> list[RehearsedPolicy]:
    """Rehearses one stage with constant policies of every threshold and window, and with the one that adopts nothing.

    Args:
        folder: of a finished variant of EIL, or of a run's pre-training; its training images need ground truth.
        options: by section (`eil`, `training`), in place of those it was trained with; `population.windows` says the windows, and
            `training.self_training` whether rehearsals learn from the teacher too.
        images: how many are held.
        folds: times that each policy is rehearsed, on other images left out.
        show: called with the rehearsals done and their number.

    Raises:
        InputError: the folder is no variant of EIL, an option is unknown, or an image has no ground truth.
    """
    states = FrozenStates.open(folder, with_policy(options, "population"), images=images)
    settings = states.builder.options
    sides = settings.population.windows
    size = settings.action_size(0)

    def constant(threshold: float, place: int) -> Policy:
        bias = NOTHING if threshold >= 1.0 else float(np.log(max(threshold, 1e-12) / (1.0 - threshold)))
        middle = (place + 0.5) / len(sides)
        parameters = np.array([bias, 0.0, 0.0] * size + [np.log(middle / (1.0 - middle))])
        return Policy.of(parameters, settings)

    policies = {"nothing": constant(1.0, 0)}
    for place, side in enumerate(sides):
        policies |= {f"{threshold:g}, window {side}": constant(threshold, place) for threshold in THRESHOLDS}
    found: list[RehearsedPolicy] = []
    total = folds * len(policies)
    with torch.inference_mode():
        rehearsal = Rehearsal(states.builder, states.segmenter, states.rows, version=0, truth=True)
        centre = (torch.zeros(2, device=states.rows.device), torch.ones(2, device=states.rows.device))
        show(0, total)
        for name, policy in policies.items():
            outcomes = []
            for fold in range(folds):
                outcomes.append(rehearsal.play(policy, centre, seed=states.builder.settings.seed, fold=fold))
                show(len(found) * folds + len(outcomes), total)
            found.append(_mean(name, outcomes))
    return found


def _mean(name: str, outcomes: Sequence[Outcome]) -> RehearsedPolicy:
    return RehearsedPolicy(
        name=name,
        labelled_share=float(np.mean([one.labelled_share for one in outcomes])),
        overlap=float(np.mean([one.overlap for one in outcomes])),
        agreement=float(np.mean([one.agreement for one in outcomes])),
        on_strokes=float(np.mean([one.on_strokes for one in outcomes])),
        miou=float(np.mean([one.miou for one in outcomes])),
    )


def correlations(rows: Sequence[RehearsedPolicy]) -> dict[str, float]:
    """Returns the correlation over policies of the return, and of what it is made of, with the mIoU; NaN where nothing varies."""
    miou = np.array([row.miou for row in rows])

    def with_miou(values: Sequence[float]) -> float:
        varies = np.ptp(values) > 0 and np.ptp(miou) > 0
        return float(np.corrcoef(values, miou)[0, 1]) if varies else float("nan")

    names = ("overlap", "agreement", "on_strokes", "labelled_share")
    return {name: with_miou([getattr(row, name) for row in rows]) for name in names}
