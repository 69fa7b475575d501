from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysseg.visualization.curves import (
    accuracy_figure,
    exploration_figure,
    figure_png,
    label_figure,
    threshold_names,
    training_figure,
)
from raysseg.visualization.engine_curves import engine_figure
from raysseg.visualization.run_directory import load_variant_runs


def test_the_accuracy_curve_shows_the_mean_against_the_radius_with_its_band(run: Path) -> None:
    figure = accuracy_figure(load_variant_runs([run]))
    assert figure is not None
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["eil"].get_xdata(), [0, 21, 41, 61, 81])
    np.testing.assert_allclose(lines["eil"].get_ydata(), [50, 51, 52, 53, 54])
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx(54 + np.sqrt(7))
    assert edges.min() == pytest.approx(50 - np.sqrt(7))


def test_an_unfinished_seed_is_a_line_of_its_own(run: Path, make_seed: Callable[..., Path]) -> None:
    make_seed(run / "variants" / "eil" / "seed-9", 0.9, finished=False)
    figure = accuracy_figure(load_variant_runs([run]))
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["eil"].get_ydata(), [50, 51, 52, 53, 54])
    np.testing.assert_allclose(lines["eil, seed 9 (unfinished)"].get_ydata(), [86, 87, 88])


def test_without_a_growing_radius_the_stage_is_the_axis(run: Path) -> None:
    runs = load_variant_runs([run])
    assert runs[0].summary is not None
    runs[0].summary["stages"][2]["radius"] = 0
    figure = accuracy_figure(runs)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "stage"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0, 1, 2, 3, 4])


def test_only_measured_panels_are_drawn(run: Path) -> None:
    figure = label_figure(load_variant_runs([run]))
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "accepted images (%)" in titles
    assert not any("in accepted images" in title for title in titles)


def test_exploration_has_thresholds_reward_parts_and_losses(run: Path) -> None:
    figure = exploration_figure(load_variant_runs([run])[0])
    assert figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    thresholds = panels["thresholds, mean ± sd of the images"]
    assert [text.get_text() for text in thresholds.get_legend().get_texts()] == ["τ_o (object)", "τ_g (background)"]
    rewards = panels["reward r and its parts"].get_legend().get_texts()
    assert [text.get_text() for text in rewards] == ["r", "labels", "features"]
    assert {"assessor loss", "searcher loss"} <= set(panels)


def test_the_running_mean_does_not_cross_stages(run: Path) -> None:
    figure = exploration_figure(load_variant_runs([run])[0])
    assert figure is not None
    (axes,) = (a for a in figure.axes if a.get_title(loc="left") == "assessor loss")
    # Four stages: per stage one faint and one solid curve of four points, plus three dotted boundaries.
    assert [len(line.get_xdata()) for line in axes.lines].count(4) == 8
    solid = next(line for line in axes.lines if line.get_label() == "assessor")
    values = [0.1, 0.05, 0.1 / 3, 0.025]
    np.testing.assert_allclose(
        solid.get_ydata(), [np.mean(values[:2]), np.mean(values[:3]), np.mean(values[1:]), np.mean(values[2:])]
    )


def test_one_threshold_per_class_becomes_mean_and_range(run: Path) -> None:
    runs = load_variant_runs([run])
    assert runs[0].summary is not None
    for row in runs[0].summary["stages"]:
        row["threshold_mean"] = [0.2, 0.4, 0.9]
    figure = exploration_figure(runs[0])
    assert figure is not None
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.5] * 5)
    assert threshold_names(1) == ["τ"]
    assert threshold_names(3) == ["τ_0", "τ_1", "τ_2"]


def test_pretraining_comes_before_the_variants_in_the_training_curve(run: Path) -> None:
    figure = training_figure(load_variant_runs([run]), {0: [{"loss": 2.0}, {"loss": 1.0}]})
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["pre-training, seed 0"].get_ydata(), [2, 1])
    np.testing.assert_allclose(lines["eil, seed 0"].get_xdata(), [2, 3, 4])


def test_nothing_measured_gives_no_figure(tmp_path: Path) -> None:
    (tmp_path / "variants" / "eil" / "seed-0").mkdir(parents=True)
    runs = load_variant_runs([tmp_path])
    assert accuracy_figure(runs) is None
    assert label_figure(runs) is None
    assert exploration_figure(runs[0]) is None
    assert training_figure(runs) is None


def test_one_drawing_gives_the_same_bytes_twice(run: Path) -> None:
    pictures = []
    for _ in range(2):
        figure = accuracy_figure(load_variant_runs([run]))
        assert figure is not None
        pictures.append(figure_png(figure, dpi=50))
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")


def panels_of(figure: Figure | None) -> dict[str, Axes]:
    """The panels of a figure under their titles."""
    assert figure is not None
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_engine_is_drawn_over_the_minutes_of_the_iterations(run: Path, make_timings: Callable[..., Path]) -> None:
    (first, *_) = load_variant_runs([run])
    make_timings(first.path)
    panels = panels_of(engine_figure(first))
    assert list(panels) == [
        "rollouts per second",
        "policy lag of the rollouts",
        "learner's time",
        "actors",
        "rollouts without use, since the start",
    ]
    lost = next(line for line in panels["rollouts without use, since the start"].lines if "lost" in line.get_label())
    np.testing.assert_allclose(lost.get_xdata(), np.arange(1, 41) / 2)
    np.testing.assert_allclose(lost.get_ydata(), [0] * 12 + [3] * 28)
    alive = next(line for line in panels["actors"].lines if line.get_label() == "alive")
    assert alive.get_ydata()[12] == 1
    assert panels["learner's time"].get_ylim() == (0.0, 1.03)


def test_a_running_mean_of_the_engine_does_not_leave_its_phase(run: Path, make_timings: Callable[..., Path]) -> None:
    (first, *_) = load_variant_runs([run])
    make_timings(first.path)
    axes = panels_of(engine_figure(first))["rollouts per second"]
    explored = [line for line in axes.lines if line.get_ydata().any()]
    # Four explorations of four iterations: every value faint, and its mean over the neighbours.
    assert [len(line.get_xdata()) for line in explored] == [4] * 8
    np.testing.assert_allclose(explored[0].get_ydata(), [2, 3, 2, 3])
    np.testing.assert_allclose(explored[1].get_ydata(), [2.5, 7 / 3, 8 / 3, 2.5])
    assert sum(line.get_label() == "rollouts" for line in axes.lines) == 1
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    np.testing.assert_allclose(spans, [(0, 2), (5, 7), (10, 12), (15, 17)])


def test_the_engine_of_one_process_has_no_panels_about_actors(run: Path, make_timings: Callable[..., Path]) -> None:
    (first, *_) = load_variant_runs([run])
    make_timings(first.path, remote=False)
    assert list(panels_of(engine_figure(first))) == [
        "rollouts per second",
        "policy lag of the rollouts",
        "learner's time",
    ]


@pytest.mark.parametrize("torn", ['{"iteration": 40, "sec', "40"])
def test_a_torn_line_of_the_timings_is_left_out(run: Path, make_timings: Callable[..., Path], torn: str) -> None:
    (first, *_) = load_variant_runs([run])
    make_timings(first.path)
    whole = [line.get_xdata().tolist() for axes in panels_of(engine_figure(first)).values() for line in axes.lines]
    with (first.path / "timings.jsonl").open("a") as file:
        file.write(torn)
    again = [line.get_xdata().tolist() for axes in panels_of(engine_figure(first)).values() for line in axes.lines]
    assert again == whole


def test_without_rollouts_there_is_no_engine_to_draw(run: Path) -> None:
    (first, *_) = load_variant_runs([run])
    assert engine_figure(first) is None
    (first.path / "timings.jsonl").write_text('{"iteration": 0, "seconds": 1.0, "rollouts_per_second": 0.0}\n')
    assert engine_figure(first) is None
