import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raysseg.visualization.curves import figure_png
from raysseg.visualization.sweep import (
    PaperSeries,
    SweepRow,
    sort_rows,
    sweep_figure,
    sweep_markdown,
    sweep_table,
    value_text,
)

KEYS = {"eil.gamma": "gamma"}


def row(value: Any, *scores: float, notes: tuple[str, ...] = (), **others: Any) -> SweepRow:
    """A point at `eil.gamma` = value with the scores of seeds 0, 1, …"""
    values = {"eil.gamma": value, **{key.replace("__", "."): other for key, other in others.items()}}
    return SweepRow(label=f"gamma={value}", values=values, scores=dict(enumerate(scores)), notes=notes)


BASELINE = SweepRow(label="none", values={}, scores={0: 0.5, 1: 0.6}, baseline=True)


def test_the_best_mean_comes_first_and_what_has_no_score_last() -> None:
    rows = [row(0.1, notes=("seed 0 failed: no memory",)), row(0.5, 0.4, 0.5), row(0.9, 0.44), BASELINE]
    assert [r.label for r in sort_rows(rows)] == ["none", "gamma=0.5", "gamma=0.9", "gamma=0.1"]


def test_the_table_has_values_means_and_reasons() -> None:
    rows = sort_rows([row(0.1, notes=("seed 0 failed: a | b",)), row([5, "image"], 0.4, 0.5), BASELINE])
    lines = sweep_markdown(rows, KEYS, "mIoU").splitlines()
    assert lines[:5] == [
        "| gamma | seeds | mIoU | notes |",
        "| --- | --- | ---: | --- |",
        "| none (baseline) | 0, 1 | 55.0 ± 7.1 |  |",
        '| [5, "image"] | 0, 1 | 45.0 ± 7.1 |  |',
        "| 0.1 | none finished | – | seed 0 failed: a \\| b |",
    ]
    stream = io.StringIO()
    Console(file=stream, width=120).print(sweep_table(rows, KEYS, "mIoU"))
    assert '[5, "image"]' in stream.getvalue()
    assert "notes" not in sweep_markdown([BASELINE], KEYS, "mIoU")


def test_the_figure_has_means_seeds_baseline_and_the_paper_beside_it() -> None:
    paper = [PaperSeries(name="VOC", points={0.9: 77.9, 0.5: 70.0}, source="Table 3")]
    rows = [row(0.9, 0.4, 0.5), row(0.0, 0.2, 0.3), row(0.5), BASELINE]
    figure = sweep_figure(rows, "eil.gamma", KEYS, "mIoU", paper=paper)
    assert figure is not None
    ours, theirs = figure.axes
    means, dots, baseline = ours.lines
    np.testing.assert_allclose(means.get_xydata(), [[0.0, 25.0], [0.9, 45.0]])
    np.testing.assert_allclose(dots.get_xydata(), [[0.0, 20], [0.0, 30], [0.9, 40], [0.9, 50]])
    np.testing.assert_allclose(baseline.get_ydata(), [55, 55])
    np.testing.assert_allclose(theirs.lines[0].get_xydata(), [[0.5, 70.0], [0.9, 77.9]])
    assert "Table 3" in theirs.get_xlabel()
    assert figure_png(figure, dpi=40).startswith(b"\x89PNG")


def test_other_keys_are_lines_of_their_own() -> None:
    keys = {**KEYS, "eil.stages": "stages"}
    rows = [row(value, 0.1 * stages + value / 10, eil__stages=stages) for value in (0.0, 1.0) for stages in (1, 2)]
    figure = sweep_figure(rows, "eil.gamma", keys, "mIoU")
    assert figure is not None
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["stages 1", "stages 2"]
    np.testing.assert_allclose(lines["stages 2"].get_xydata(), [[0.0, 20.0], [1.0, 30.0]])


def test_many_combinations_are_points_without_lines() -> None:
    keys = {**KEYS, "eil.delta": "delta"}
    rows = [row(value, value, eil__delta=value) for value in np.linspace(0.1, 0.9, 12).tolist()]
    figure = sweep_figure(rows, "eil.gamma", keys, "mIoU")
    assert figure is not None
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"None"}
    assert figure.axes[0].get_legend() is None


def test_words_stand_in_a_row_and_wide_ranges_are_logarithmic() -> None:
    figure = sweep_figure([row("image", 0.5), row(9, 0.4)], "eil.gamma", KEYS, "mIoU")
    assert figure is not None
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["image", "9"]
    assert axes.lines[0].get_linestyle() == "None"
    figure = sweep_figure([row(1e-4, 0.5), row(1e-1, 0.4)], "eil.gamma", KEYS, "mIoU")
    assert figure is not None
    assert figure.axes[0].get_xscale() == "log"


def test_nothing_finished_gives_no_figure() -> None:
    assert sweep_figure([row(0.1), BASELINE], "eil.gamma", KEYS, "mIoU") is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1e-5, "1e-05"), ("l1", "l1"), ([5, 9], "[5, 9]"), (True, "true")]
)
def test_values_as_a_person_reads_them(value: Any, text: str) -> None:
    assert value_text(value) == text
