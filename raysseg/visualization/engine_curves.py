"""What actors and learner did over the minutes of a run, as matplotlib figures."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysseg.visualization.curves import COLOURS, legend, make_panels, prepare_axes, smooth
from raysseg.visualization.run_directory import SAMPLING_PHASES, Row, VariantRun, number

ENGINE_PANELS: dict[str, tuple[str, dict[str, str]]] = {
    "rollouts per second": ("", {"rollouts_per_second": "rollouts"}),
    "policy lag of the rollouts": ("policy versions", {"policy_lag_mean": "mean", "policy_lag_max": "largest"}),
    "learner's time": (
        "share",
        {
            "learner_busy_share": "in updates",
            "learner_idle_share": "without work",
            "learner_prepare_share": "of the updates: records not ready",
        },
    ),
    "actors": ("", {"actors_total": "all", "actors_alive": "alive", "orders_in_flight": "orders in flight"}),
    "rollouts without use, since the start": (
        "rollouts",
        {"rollouts_dropped": "dropped: too old", "rollouts_lost": "lost with an actor"},
    ),
    "age of the weights that acted": ("seconds", {"weights_age_seconds": "mean"}),
}
"""Title → label of the y axis and the keys of timings.jsonl with their names."""

LEVELS = ("actors", "rollouts without use, since the start")
"""Panels of numbers that hold until they change; drawn as steps."""


def engine_rows(run: VariantRun) -> list[Row]:
    """Reads timings.jsonl as far as it is whole; empty where there is none."""
    path, rows = run.path / "timings.jsonl", []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                break
    return rows


def engine_figure(run: VariantRun) -> Figure | None:
    """What actors and learner did over the minutes of the run; None where nothing was sampled.

    Shaded: actors sample. Minutes count the iterations alone, so the time between a kill and a resume is left out.
    """
    rows = engine_rows(run)
    if not any(number(row, "rollouts_per_second") for row in rows):
        return None
    remote = any(number(row, "actors_total") for row in rows)
    panels = {
        title: (unit, keys)
        for title, (unit, keys) in ENGINE_PANELS.items()
        if (remote or title not in LEVELS) and any(number(row, key) is not None for row in rows for key in keys)
    }
    minutes = np.cumsum([number(row, "seconds") or 0.0 for row in rows]) / 60.0
    phases = {row.get("iteration"): row.get("phase") for row in run.metrics}
    spans = _phase_spans([phases.get(row.get("iteration")) for row in rows])
    figure, all_axes = make_panels(len(panels))
    for axes, (title, (unit, keys)) in zip(all_axes, panels.items(), strict=True):
        prepare_axes(axes, title=title, x="minutes", y=unit)
        for phase, begin, end in spans:
            if phase in SAMPLING_PHASES:
                axes.axvspan(minutes[begin - 1] if begin else 0.0, minutes[end - 1], color="#f1f1f1", lw=0, zorder=0)
        for index, (key, name) in enumerate(keys.items()):
            values = [number(row, key) for row in rows]
            pieces = [(0, len(rows))] if title in LEVELS else [(begin, end) for _, begin, end in spans]
            for begin, end in pieces:
                points = [(minutes[i], v) for i in range(begin, end) if (v := values[i]) is not None]
                if points:
                    _plot_piece(axes, points, COLOURS[index], name, steps=title in LEVELS)
        axes.set_ylim(bottom=0.0, top=1.03 if unit == "share" else None)
        axes.set_xlim(left=0.0)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            legend(axes)
    return figure


def _phase_spans(phases: Sequence[str | None]) -> list[tuple[str | None, int, int]]:
    """Each stretch of one phase: its name, its first row and the row after its last one."""
    starts = [i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
    return [(phases[begin], begin, end) for begin, end in zip(starts, [*starts[1:], len(phases)], strict=True)]


def _plot_piece(axes: Axes, points: Sequence[tuple[float, float]], colour: str, name: str, *, steps: bool) -> None:
    """One curve within one phase: a step line, or every value faint and its running mean on top; named once."""
    x, y = np.array(points, dtype=np.float64).T
    label = "" if name in axes.get_legend_handles_labels()[1] else name
    if steps:
        axes.step(x, y, where="post", color=colour, linewidth=1.6, label=label)
        return
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8, marker=".", markersize=3)
    axes.plot(x, smooth(y), color=colour, linewidth=1.6, label=label)
