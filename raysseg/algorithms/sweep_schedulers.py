"""Ray Tune's schedulers and callback for sweeps: trials known by their names, so that a resumed sweep can be told what
happened before it was killed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.schedulers.trial_scheduler import FIFOScheduler

from raysseg.algorithms.sweep_points import Axis
from raysseg.algorithms.sweep_settings import AshaSettings, PbtSettings
from raysseg.core.metrics_writer import write_atomically

NO_LAST_STAGE = 1_000_000
"""For ASHA, which asks for the last stage: our trials say themselves when they are done."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """Stands for a trial in ASHA's rungs, under a name that outlives the command."""

    trial_id: str


class StageHalving(ASHAScheduler):  # type: ignore[misc]
    """ASHA over stages; `recall` fills its rungs with what trials reported before a kill."""

    def __init__(self, settings: AshaSettings, metric: str) -> None:
        super().__init__(
            time_attr="stage",
            metric=metric,
            mode="max",
            max_t=NO_LAST_STAGE,
            grace_period=settings.grace_stages,
            reduction_factor=settings.reduction_factor,
        )

    def recall(self, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the scores that a trial reported before, stage by stage."""
        trial = _Named(trial_id=name)
        super().on_trial_add(None, trial)
        for score in scores:
            super().on_trial_result(None, trial, dict(score))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Adds a trial under its name."""
        super().on_trial_add(tune_controller, _Named(trial_id=str(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decides whether a trial goes on."""
        return str(super().on_trial_result(tune_controller, _Named(trial_id=str(trial)), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Records the last score of a trial."""
        super().on_trial_complete(tune_controller, _Named(trial_id=str(trial)), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forgets a trial that ended otherwise."""
        super().on_trial_remove(tune_controller, _Named(trial_id=str(trial)))


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Synchronous PBT over stages that writes down every exchange, so that a killed sweep goes on from the last one.

    Args:
        settings: of PBT.
        metric: more is better.
        axes: the swept keys; values stay in their ranges.
        start: stage of the last exchange before this command; 0 for a new sweep.
        record: file that holds the last exchange: its stage, and per member its values and where it starts from.
    """

    def __init__(self, settings: PbtSettings, metric: str, axes: Sequence[Axis], *, start: int, record: Path) -> None:
        super().__init__(
            time_attr="stage",
            metric=metric,
            mode="max",
            perturbation_interval=settings.interval_stages,
            # The next exchange is the first one that this scheduler sees.
            burn_in_period=start + settings.interval_stages,
            hyperparam_mutations={axis.key: _mutation(axis) for axis in axes},
            quantile_fraction=settings.quantile_fraction,
            resample_probability=settings.resample_probability,
            perturbation_factors=settings.factors,
            custom_explore_fn=partial(_keep_inside, {axis.key: axis.bounds for axis in axes if axis.bounds}),
            log_config=False,
            synch=True,
        )
        self._keys = [axis.key for axis in axes]
        self._interval, self._first = settings.interval_stages, start + settings.interval_stages
        self._record = record
        self._stages: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Lets the last member that reaches an exchange make it, and writes down what it decided."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        stage = int(result["stage"])
        if stage < self._first or stage % self._interval:
            return decision
        self._stages[str(trial)] = stage
        alive = list(tune_controller.get_live_trials())
        if all(self._stages.get(str(member)) == stage for member in alive):
            members = {}
            for member in alive:
                name, donor = str(member), str(member.config["job"])
                # Whoever took over a configuration took over the donor's name in it.
                members[name] = {
                    "member": donor,
                    "stage": stage,
                    "values": {key: member.config[key] for key in self._keys},
                }
                member.set_config({**member.config, "job": name})
            write_atomically(self._record, json.dumps({"stage": stage, "members": members}, indent=1))
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Returns the next member to run; where the one that all others waited for has failed, they exchange without it."""
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        waiting = list(tune_controller.get_live_trials())
        if not waiting or any(member.status != "PAUSED" for member in waiting):
            return None
        self.on_trial_result(tune_controller, waiting[0], waiting[0].last_result)
        return super().choose_trial_to_run(tune_controller)


def _mutation(axis: Axis) -> Any:
    if axis.choices is not None:
        return list(axis.choices)
    assert axis.distribution is not None
    assert axis.bounds is not None
    if axis.distribution.randint is not None:
        low, high = axis.distribution.randint
        return tune.randint(low, high + 1)
    return tune.loguniform(*axis.bounds) if axis.distribution.loguniform is not None else tune.uniform(*axis.bounds)


def _keep_inside(bounds: Mapping[str, tuple[float, float]], config: dict[str, Any]) -> dict[str, Any]:
    """Keeps mutated values in their ranges, with six digits."""
    for key, (low, high) in bounds.items():
        value = config[key]
        config[key] = min(max(value if isinstance(value, int) else float(f"{value:.6g}"), low), high)
    return config


def plain_scheduler() -> FIFOScheduler:
    """Returns the scheduler under which every trial runs to its end."""
    return FIFOScheduler()
