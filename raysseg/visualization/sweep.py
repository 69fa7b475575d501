"""The table of a sweep, and its metric against every swept value beside what the paper reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from raysseg.visualization.curves import COLOURS, MARKERS, prepare_axes
from raysseg.visualization.tables import Spread, percent, spread

MAX_LINES = 8
"""More combinations of the other keys than this are drawn as points without lines."""

LOG_RATIO = 50.0
"""Values that span more than this are drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One point of a sweep, or a baseline.

    label: in words; values: swept key to its value, empty for a baseline; scores: seed to metric, a fraction 0…1, of the
    finished seeds; notes: what is not finished, and why.
    """

    label: str
    values: Mapping[str, Any]
    scores: Mapping[int, float]
    baseline: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def spread(self) -> Spread | None:
        """Mean and standard deviation (n − 1) over the finished seeds."""
        return spread(self.scores.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperSeries:
    """What a paper reports for one swept key on one dataset: value to mIoU in per cent, and where it stands."""

    name: str
    points: Mapping[Any, float]
    source: str


def sort_rows(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """The best mean first; rows without a finished seed last, in their order."""
    return tuple(sorted(rows, key=lambda row: -row.spread.mean if row.spread else math.inf))


def value_text(value: Any) -> str:
    """A swept value as a person reads it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _cells(rows: Sequence[SweepRow], keys: Mapping[str, str], metric: str) -> tuple[list[str], list[list[str]]]:
    headers = [*keys.values(), "seeds", metric, "notes"]
    lines = []
    for row in rows:
        if row.baseline:
            first = [f"{row.label} (baseline)", *[""] * (len(keys) - 1)]
        else:
            first = [value_text(row.values[key]) for key in keys]
        seeds = ", ".join(map(str, sorted(row.scores))) or "none finished"
        lines.append([*first, seeds, percent(row.spread, seeds=len(row.scores)), "; ".join(row.notes)])
    if not any(row.notes for row in rows):
        return headers[:-1], [line[:-1] for line in lines]
    return headers, lines


FOOTNOTE = (
    "In per cent, after the last stage: mean ± standard deviation (n − 1) over the finished seeds; the best first."
)


def sweep_table(rows: Sequence[SweepRow], keys: Mapping[str, str], metric: str) -> Table:
    """The sweep as a table for the terminal.

    Args:
        rows: sorted.
        keys: swept key to its short name.
        metric: its title.
    """
    headers, lines = _cells(rows, keys, metric)
    table = Table(title="Sweep", title_justify="left", caption=FOOTNOTE, caption_justify="left")
    for header in headers:
        table.add_column(header, justify="right" if header == metric else "left")
    for line in lines:
        # Text, not str: a value such as [5, 9] must not be read as markup.
        table.add_row(*(Text(cell) for cell in line))
    return table


def sweep_markdown(rows: Sequence[SweepRow], keys: Mapping[str, str], metric: str) -> str:
    """The sweep as Markdown.

    Args:
        rows: sorted.
        keys: swept key to its short name.
        metric: its title.
    """
    headers, lines = _cells(rows, keys, metric)
    rule = ["---:" if header == metric else "---" for header in headers]
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [headers, rule, *lines]
    )
    return f"{table}\n\n{FOOTNOTE}\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Scale:
    """Places values on the x axis: numbers where they are, anything else in a row."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.numeric = all(map(_is_number, values))
        distinct = list({value_text(value): value for value in values}.values())
        self.values = sorted(distinct) if self.numeric else distinct
        positive = self.numeric and self.values[0] > 0
        self.logarithmic = positive and self.values[-1] / self.values[0] > LOG_RATIO
        self._places = {value_text(value): float(index) for index, value in enumerate(self.values)}

    def place(self, value: Any) -> float:
        """Where a value lies."""
        return float(value) if self.numeric else self._places[value_text(value)]

    def prepare(self, axes: Axes) -> None:
        """Sets the axis' scale and its ticks."""
        if self.logarithmic:
            axes.set_xscale("log")
        if len(self.values) <= 12:
            axes.set_xticks([self.place(value) for value in self.values], [value_text(value) for value in self.values])
            axes.minorticks_off()
        if not self.numeric:
            axes.set_xlim(-0.5, len(self.values) - 0.5)


def sweep_figure(
    rows: Sequence[SweepRow], key: str, keys: Mapping[str, str], metric: str, *, paper: Sequence[PaperSeries] = ()
) -> Figure | None:
    """Draws the metric against one swept key: means, every seed as a dot, baselines as dashed lines, and beside it what
    the paper reports, on an axis of its own.

    Args:
        rows: of the table.
        key: the swept key on the x axis.
        keys: all swept keys with their short names; every combination of the others is a line.
        metric: its title.
        paper: what the paper reports for the key.

    Returns:
        The figure, or None where no point has finished.
    """
    points = [row for row in rows if not row.baseline and row.scores]
    if not points:
        return None
    panels = 2 if paper else 1
    figure = Figure(figsize=(6.2 if panels == 1 else 10.4, 4.0), layout="constrained")
    grid = figure.add_gridspec(1, panels, width_ratios=[6, 4][:panels])
    all_axes = [figure.add_subplot(grid[0, index]) for index in range(panels)]
    scale = _Scale([row.values[key] for row in points])
    prepare_axes(all_axes[0], title="measured here", x=keys[key], y=f"{metric} (%)")
    _draw_points(all_axes[0], points, key, keys, scale)
    for index, row in enumerate(row for row in rows if row.baseline and row.spread):
        assert row.spread is not None
        style = [(0, (5, 3)), (0, (1, 2)), (0, (6, 2, 1, 2))][index % 3]
        all_axes[0].axhline(100 * row.spread.mean, color="#555555", linewidth=1.2, linestyle=style, label=row.label)
    scale.prepare(all_axes[0])
    if len(all_axes[0].get_legend_handles_labels()[1]) > 1:
        all_axes[0].legend(fontsize=8, frameon=False)
    if paper:
        _draw_paper(all_axes[1], paper, keys[key])
    return figure


def _draw_points(axes: Axes, points: Sequence[SweepRow], key: str, keys: Mapping[str, str], scale: _Scale) -> None:
    lines: dict[str, list[SweepRow]] = {}
    for row in points:
        others = ", ".join(f"{short} {value_text(row.values[name])}" for name, short in keys.items() if name != key)
        lines.setdefault(others, []).append(row)
    joined = len(lines) <= MAX_LINES
    for index, (name, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda row: scale.place(row.values[key]))
        colour = COLOURS[index % len(COLOURS) if joined else 0]
        places = [scale.place(row.values[key]) for row in members]
        means = [100 * row.spread.mean for row in members if row.spread is not None]
        axes.plot(
            places,
            means,
            color=colour,
            marker=MARKERS[index % len(MARKERS) if joined else 0],
            linestyle="-" if joined and scale.numeric else "none",
            linewidth=1.8,
            markersize=6,
            label=(name or "mean") if joined else None,
        )
        dots = [
            (place, 100 * score) for place, row in zip(places, members, strict=True) for score in row.scores.values()
        ]
        if any(len(row.scores) > 1 for row in members):
            axes.plot(*zip(*dots, strict=True), "o", color=colour, alpha=0.45, markersize=3.5)


def _draw_paper(axes: Axes, paper: Sequence[PaperSeries], name: str) -> None:
    scale = _Scale([value for series in paper for value in series.points])
    sources = "; ".join(dict.fromkeys(series.source for series in paper))
    prepare_axes(axes, title="the paper", x=f"{name}\n{_wrapped(sources)}", y="mIoU (%)")
    for index, series in enumerate(paper):
        places = sorted((scale.place(value), miou) for value, miou in series.points.items())
        axes.plot(
            *zip(*places, strict=True),
            color=["#6f6f6f", "#a3a3a3", "#444444"][index % 3],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if scale.numeric else "none",
            linewidth=1.2,
            label=series.name,
        )
    scale.prepare(axes)
    axes.legend(fontsize=8, frameon=False)


def _wrapped(text: str, width: int = 62) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
