"""Learning rates against their formulas, optimisers against what was asked for."""

from __future__ import annotations

import math

import pytest
import torch

from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.settings import OptimiserSettings


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_poly_is_its_formula(progress: float) -> None:
    settings = OptimiserSettings(schedule="poly", poly_power=0.9)
    assert schedule_factor(settings, progress) == pytest.approx((1 - progress) ** 0.9)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0)])
def test_cosine_goes_from_one_to_zero(progress: float, factor: float) -> None:
    assert schedule_factor(OptimiserSettings(schedule="cosine"), progress) == pytest.approx(factor)


def test_constant_stays() -> None:
    assert {schedule_factor(OptimiserSettings(schedule="constant"), step / 7) for step in range(8)} == {1.0}


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_beyond_the_end_nothing_is_learned(schedule: str) -> None:
    settings = OptimiserSettings(schedule=schedule)  # type: ignore[arg-type]
    assert schedule_factor(settings, 1.5) == 0.0
    assert schedule_factor(settings, -0.5) == 1.0


def test_a_power_of_two_bends_poly() -> None:
    assert schedule_factor(OptimiserSettings(poly_power=2.0), 0.5) == 0.25


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimisers_take_their_settings(name: str, kind: type) -> None:
    settings = OptimiserSettings(name=name, learning_rate=0.02, momentum=0.8, weight_decay=0.1)  # type: ignore[arg-type]
    optimiser = build_optimiser(settings, [torch.zeros(2, requires_grad=True)])
    assert type(optimiser) is kind
    group = optimiser.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)
    if name == "sgd":
        assert group["momentum"] == 0.8


def test_groups_keep_their_multiplier() -> None:
    backbone, head = (torch.zeros(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [backbone]}, {"params": [head], "learning_rate_multiplier": 10.0}]
    optimiser = build_optimiser(OptimiserSettings(name="sgd", weight_decay=0.0, momentum=0.0), groups)
    set_learning_rate(optimiser, 0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [0.5, 5.0]
    backbone.grad, head.grad = torch.ones(1), torch.ones(1)
    optimiser.step()
    assert math.isclose(backbone.item(), -0.5)
    assert math.isclose(head.item(), -5.0)
