"""What a sweep came to: the state of every trial, the table, the plots, and the best point as a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raysseg.algorithms.recipes import Recipe
from raysseg.algorithms.sweep_points import Axis, Job, fold, short_names
from raysseg.algorithms.sweep_settings import Sweep
from raysseg.algorithms.sweep_trial import evaluations, read_lineage
from raysseg.core.metrics_writer import write_atomically
from raysseg.visualization.curves import figure_png
from raysseg.visualization.sweep import PaperSeries, SweepRow, sort_rows, sweep_figure, sweep_markdown

STOPPED_FILE = "stopped.json"
METRIC_TITLES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_foreground_dice": "foreground Dice"}

State = Literal["finished", "stopped", "failed", "unfinished"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialOutcome:
    """What one trial came to.

    Args:
        job: the trial.
        folder: where it is.
        state: `stopped` by the scheduler, or `failed` for the reason; a `finished` one has a summary.
        reason: of a failure, in one sentence.
        scores: the metric per stage, as far as it came.
        history: of a member of a population: where it went on from, with which values.
    """

    job: Job
    folder: Path
    state: State
    reason: str
    scores: tuple[float | None, ...]
    history: tuple[dict[str, Any], ...]

    @property
    def values(self) -> Mapping[str, Any]:
        """Swept key to its value; the last one where it changed within the run."""
        return self.history[-1]["values"] if self.history else self.job.values


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """What a sweep came to.

    Args:
        trials: in the order of the plan.
        rows: of the table, the best first, points without a score last.
        best: the best point's recipe, or None where no point finished with every seed.
        best_row: its row.
        metric: title of the metric.
    """

    trials: tuple[TrialOutcome, ...]
    rows: tuple[SweepRow, ...]
    best: Recipe | None
    best_row: SweepRow | None
    metric: str

    @property
    def failed(self) -> tuple[TrialOutcome, ...]:
        """The trials that failed."""
        return tuple(trial for trial in self.trials if trial.state == "failed")


def collect(
    sweep: Sweep, jobs: Sequence[Job], folders: Mapping[str, Path], failures: Mapping[str, str]
) -> SweepOutcome:
    """Reads what every trial left in its folder.

    Args:
        sweep: that was run.
        jobs: all of its trials.
        folders: of the trials, by name.
        failures: reason per trial that failed.
    """
    trials = tuple(_outcome(job, folders[job.name], failures.get(job.name), sweep.settings.metric) for job in jobs)
    rows = sort_rows([_row(label, [t for t in trials if t.job.label == label]) for label in _labels(jobs)])
    complete = [row for row in rows if not row.baseline and len(row.scores) == len(sweep.recipe.seeds)]
    best_row = complete[0] if complete else None
    best = None
    if best_row is not None:
        job = next(job for job in jobs if job.label == best_row.label)
        # PBT's members end with other values than they began with.
        best = fold(job.recipe, job.label, best_row.values, "best")
    return SweepOutcome(
        trials=trials, rows=rows, best=best, best_row=best_row, metric=METRIC_TITLES[sweep.settings.metric]
    )


def _labels(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(job.label for job in jobs))


def _outcome(job: Job, folder: Path, reason: str | None, metric: str) -> TrialOutcome:
    summary = folder / "summary.json"
    if summary.exists():
        content = json.loads(summary.read_text())
        state: State = "finished"
        scores = tuple(row.get(metric) for row in content["stages"]) or (content.get(metric),)
    else:
        state = "failed" if reason else "stopped" if (folder / STOPPED_FILE).exists() else "unfinished"
        scores = tuple(row.get(metric) for row in evaluations(folder))
    return TrialOutcome(
        job=job,
        folder=folder,
        state=state,
        reason=reason or "" if state == "failed" else "",
        scores=scores,
        history=tuple(read_lineage(folder)),
    )


def _row(label: str, trials: Sequence[TrialOutcome]) -> SweepRow:
    notes = []
    for trial in trials:
        seed, newest = trial.job.seed, trial.scores[-1] if trial.scores else None
        if trial.state == "failed":
            notes.append(f"seed {seed} failed: {trial.reason}")
        elif trial.state == "stopped":
            notes.append(f"seed {seed} stopped after stage {len(trial.scores) - 1} at {100 * (newest or 0.0):.1f}")
        elif trial.state == "unfinished":
            notes.append(f"seed {seed} is unfinished")
    return SweepRow(
        label=label,
        values=trials[0].values,
        scores={t.job.seed: t.scores[-1] for t in trials if t.state == "finished" and t.scores[-1] is not None},
        baseline=trials[0].job.baseline,
        notes=tuple(notes),
    )


def write_results(sweep: Sweep, axes: Sequence[Axis], outcome: SweepOutcome, folder: Path) -> None:
    """Writes `table.md`, `sweep.json`, `best.yaml` and one picture per swept key."""
    keys = short_names([axis.key for axis in axes])
    write_atomically(folder / "table.md", sweep_markdown(outcome.rows, keys, outcome.metric))
    record = {
        "sweep": sweep.name,
        "description": sweep.settings.description,
        "metric": sweep.settings.metric,
        "keys": list(keys),
        "trials": [
            {
                "trial": trial.job.name,
                "values": dict(trial.values),
                "seed": trial.job.seed,
                "baseline": trial.job.baseline,
                "state": trial.state,
                "reason": trial.reason,
                "scores": list(trial.scores),
                "history": list(trial.history),
            }
            for trial in outcome.trials
        ],
        "best": outcome.best_row.label if outcome.best_row else None,
    }
    write_atomically(folder / "sweep.json", json.dumps(record, indent=1))
    best = folder / "best.yaml"
    best.unlink(missing_ok=True)
    if outcome.best is not None and outcome.best_row is not None:
        write_atomically(best, _best_comment(sweep, outcome) + outcome.best.dump())
    for axis in axes:
        papers = sweep.settings.paper.get(axis.key)
        series = []
        if papers is not None:
            series = [PaperSeries(name=n, points=points, source=papers.source) for n, points in papers.series.items()]
        figure = sweep_figure(outcome.rows, axis.key, keys, outcome.metric, paper=series)
        if figure is not None:
            (folder / f"{keys[axis.key]}.png").write_bytes(figure_png(figure))


def _best_comment(sweep: Sweep, outcome: SweepOutcome) -> str:
    """Two lines that say what the recipe is; PBT's last values alone do not give its result again."""
    assert outcome.best_row is not None
    row = outcome.best_row
    score = sum(row.scores.values()) / len(row.scores)
    lines = [
        f"# The best point of the sweep {sweep.name}: {row.label}, {outcome.metric} {100 * score:.2f} %"
        + (f", mean of {len(row.scores)} seeds." if len(row.scores) > 1 else ".")
    ]
    if sweep.settings.scheduler.name == "pbt":
        lines.append(
            "# These are its last values; they changed within the run (sweep.json has the history), "
            "so a run from the beginning with them gives another result."
        )
    return "\n".join(lines) + "\n"
