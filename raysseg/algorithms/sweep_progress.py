"""What a sweep says while it runs: Tune's events as progress, and a note in the folder of a trial that was stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ray import tune

from raysseg.algorithms.sweep_points import stages_of
from raysseg.algorithms.sweep_results import STOPPED_FILE
from raysseg.algorithms.sweep_settings import Sweep
from raysseg.algorithms.sweep_trial import FAILURE_FILE, TrialPlan, reason_of
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.progress import ProgressListener

Watcher = Callable[[str, str, Mapping[str, Any]], None]
"""Takes an event (start, result, complete, error), the trial's name and its newest result."""


class SweepWatcher(tune.Callback):  # type: ignore[misc]
    """Passes Tune's events on to the function that `watching` sets; Tune pickles its callbacks, so they cannot hold it."""

    _watcher: ClassVar[Watcher | None] = None

    @classmethod
    @contextlib.contextmanager
    def watching(cls, watcher: Watcher) -> Iterator[None]:
        """Lets a function see the events as long as the context lasts."""
        cls._watcher = watcher
        try:
            yield
        finally:
            cls._watcher = None

    def _tell(self, event: str, trial: Any) -> None:
        watcher = type(self)._watcher
        if watcher is not None:
            watcher(event, str(trial), dict(trial.last_result or {}))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tells that a trial started or goes on."""
        self._tell("start", trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tells a trial's newest score."""
        watcher = type(self)._watcher
        if watcher is not None:
            watcher("result", str(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tells that a trial ended, by itself or because the scheduler stopped it."""
        self._tell("complete", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tells that a trial failed."""
        self._tell("error", trial)


def failure_of(folder: Path, error: BaseException | None = None) -> str | None:
    """The reason that a trial wrote down, or what Tune says where its process died; None where it did not fail."""
    path = folder / FAILURE_FILE
    if path.exists():
        return str(json.loads(path.read_text())["reason"])
    return reason_of(error) if error is not None else None


class SweepProgress:
    """Turns Tune's events into progress, and notes which trials the scheduler stopped."""

    def __init__(
        self, sweep: Sweep, plans: Mapping[str, TrialPlan], listener: ProgressListener, *, phase: str, finished: int
    ) -> None:
        self._sweep, self._plans, self._listener, self._phase = sweep, plans, listener, phase
        self._finished = finished
        self._shares: dict[str, float] = dict.fromkeys(plans, 0.0)
        self._states: dict[str, str] = {}
        self._best: tuple[float, str] | None = None
        self._show()

    def __call__(self, event: str, name: str, result: Mapping[str, Any]) -> None:
        """Takes one event of a trial."""
        plan = self._plans[name]
        if event == "start":
            self._states[name] = "running"
        elif event in ("complete", "error"):
            self._shares[name] = 1.0
            self._states[name] = self._end(plan, event, result)
        elif "stage" in result:
            stages = stages_of(plan.settings()) or 0
            self._shares[name] = min(1.0, int(result["stage"]) / stages) if stages else 0.0
            score = result.get(self._sweep.settings.metric)
            if score is not None and result["stage"] and (self._best is None or score > self._best[0]):
                self._best = (float(score), name)
        self._show()

    def _end(self, plan: TrialPlan, event: str, result: Mapping[str, Any]) -> str:
        reason = failure_of(plan.folder) if event == "complete" else "its process died"
        if reason is not None:
            self._listener.note(f"{plan.name} failed: {reason}")
            return "failed"
        if plan.pretraining or (plan.folder / "summary.json").exists():
            return "done"
        write_atomically(plan.folder / STOPPED_FILE, json.dumps({"stage": result.get("stage")}))
        return "stopped"

    def _show(self) -> None:
        states = list(self._states.values())
        fields: dict[str, str | int] = {
            "phase": self._phase,
            "running": states.count("running"),
            "done": states.count("done") + self._finished,
        }
        fields |= {state: states.count(state) for state in ("stopped", "failed") if state in states}
        if self._best is not None:
            fields["best"] = f"{100 * self._best[0]:.1f} % ({self._best[1]})"
        total = len(self._plans) + self._finished
        self._listener.update(sum(self._shares.values()) + self._finished, total, **fields)
