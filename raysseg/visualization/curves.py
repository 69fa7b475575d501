"""Curves of runs as matplotlib figures: accuracy, labels per stage, thresholds, rewards, losses."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from raysseg.visualization.run_directory import SAMPLING_PHASES, Row, VariantRun, number
from raysseg.visualization.tables import group_by_label, spread

COLOURS = ("#4269d0", "#e8743b", "#2a9d6f", "#b0489c", "#8c6d46", "#3aa7c2", "#d64550", "#7f7f7f", "#c9a227", "#5e4fa2")
MARKERS = "osD^vPX<>*"
GREY_STYLES = ("-", "--", ":", "-.")
"""Tell apart the seeds of the pre-training, which all are grey."""

Reader = Callable[[Row], float | None]


def figure_png(figure: Figure, *, dpi: int = 130) -> bytes:
    """Renders a figure as PNG bytes."""
    buffer = io.BytesIO()
    # Without the software tag the same figure gives the same bytes under every matplotlib of one drawing.
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def prepare_axes(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Gives axes a title, labels and the look that all figures share.

    Args:
        axes: of one panel.
        title: above it.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    axes.set_title(title, fontsize=11, loc="left", color="#262626")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, colors="#555555")
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b5b5b5")


def legend(axes: Axes) -> None:
    """Names the curves of a panel that has any."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=8, frameon=False, ncols=1 + len(labels) // 9)


def _percent_of(key: str) -> Reader:
    def read(row: Row) -> float | None:
        value = number(row, key)
        return None if value is None else 100.0 * value

    return read


def _stage_axis(runs: Sequence[VariantRun]) -> tuple[str, str]:
    """Key and label of the x axis: labelled regions where all stages have a budget, the cumulative radius where it grows
    with every stage of all runs, else stage.
    """
    if all(number(row, "budget") is not None for run in runs for row in run.stages()):
        return "budget", "labelled regions"
    for run in runs:
        radii = [r for row in run.stages() if (r := number(row, "radius")) is not None]
        if len(radii) < len(run.stages()) or radii != sorted(set(radii)):
            return "stage", "stage"
    return "radius", "cumulative extension radius (pixels)"


def _points(run: VariantRun, x: str, read: Reader) -> dict[float, float]:
    """x → value of every stage at which both were measured."""
    found = ((number(row, x), read(row)) for row in run.stages())
    return {at: value for at, value in found if at is not None and value is not None}


def _plot_stages(axes: Axes, runs: Sequence[VariantRun], read: Reader, x: str) -> bool:
    """One line per variant: mean over the finished seeds, band of ± one standard deviation; unfinished seeds dashed."""
    drawn = False
    for index, (label, members) in enumerate(group_by_label(runs).items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        curves = [_points(member, x, read) for member in members if member.finished]
        places = sorted({at for curve in curves for at in curve})
        if places:
            spreads = [spread(curve[at] for curve in curves if at in curve) for at in places]
            mean = np.array([s.mean for s in spreads if s is not None])
            band = np.array([s.std or 0.0 for s in spreads if s is not None])
            axes.plot(places, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
            if band.any():
                low, high = np.maximum(mean - band, 0.0), np.minimum(mean + band, 100.0)
                axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            drawn = True
        for member in members:
            curve = _points(member, x, read)
            if not member.finished and curve:
                name = f"{label}, seed {member.seed} (unfinished)"
                axes.plot(list(curve), list(curve.values()), "--", color=colour, marker=marker, ms=3, lw=1, label=name)
                drawn = True
    ticks = sorted({at for run in runs for row in run.stages() if (at := number(row, x)) is not None})
    if 0 < len(ticks) <= 12:
        axes.set_xticks(ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def make_panels(count: int, *, columns: int = 3, size: tuple[float, float] = (4.0, 3.1)) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `count` panels side by side, and these."""
    columns = min(columns, count)
    lines = -(-count // columns)
    # Room between the label below one panel and the title of the next one.
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout=layout)
    return figure, [figure.add_subplot(lines, columns, index + 1) for index in range(count)]


def _has(runs: Sequence[VariantRun], key: str) -> bool:
    return any(number(row, key) is not None for run in runs for row in run.stages())


def accuracy_figure(runs: Sequence[VariantRun]) -> Figure | None:
    """mIoU per stage against the cumulative radius, one line per variant. Source: EIL, Fig. 2.

    Where the radius does not grow with every stage of every variant, the stage is the x axis; where labels have a budget,
    that is. Lines are means of the finished seeds, bands ± one standard deviation (n − 1); what labels everything is a
    dashed line at its height. None without evaluations.
    """
    if not _has(runs, "miou"):
        return None
    figure, (axes,) = make_panels(1, size=(7.4, 4.2))
    x, x_label = _stage_axis(runs)
    prepare_axes(axes, title="mIoU on the evaluation split", x=x_label, y="mIoU (%)")
    ceilings = [run for run in runs if x == "budget" and _labels_everything(run)]
    others = [run for run in runs if run not in ceilings]
    _plot_stages(axes, others or runs, _percent_of("miou"), x)
    if others:
        for index, (label, members) in enumerate(group_by_label(ceilings).items()):
            height = spread(
                v for one in members if one.finished and (v := number(one.stages()[-1], "miou")) is not None
            )
            if height is not None:
                style = GREY_STYLES[1 + index % 3]
                axes.axhline(100.0 * height.mean, color="#6f6f6f", linestyle=style, linewidth=1.2, label=label)
    legend(axes)
    return figure


def _labels_everything(run: VariantRun) -> bool:
    return bool(run.stages()) and number(run.stages()[-1], "labelled_share") == 1.0


LABEL_PANELS = {
    "labelled_share": "labelled share of the pixels (%)",
    "label_precision": "precision of the inferred labels (%)",
    "class_mean_precision": "precision, mean of the classes (%)",
    "accepted_share": "accepted images (%)",
    "accepted_precision": "precision in accepted images (%)",
    "rejected_precision": "precision in rejected images (%)",
    "rare_share": "rare classes in the labels asked for (%)",
}


def label_figure(runs: Sequence[VariantRun]) -> Figure | None:
    """Labelled share, precision and acceptance per stage, one line per variant; None where none was measured."""
    panels = {key: title for key, title in LABEL_PANELS.items() if _has(runs, key)}
    if not panels:
        return None
    figure, all_axes = make_panels(len(panels))
    for axes, (key, title) in zip(all_axes, panels.items(), strict=True):
        prepare_axes(axes, title=title, x="stage", y="%")
        _plot_stages(axes, runs, _percent_of(key), "stage")
    legend(all_axes[0])
    return figure


def threshold_names(count: int) -> list[str]:
    """Names of an action's thresholds: τ alone, τ_o and τ_g, or one per class."""
    return {1: ["τ"], 2: ["τ_o (object)", "τ_g (background)"]}.get(count, [f"τ_{index}" for index in range(count)])


def _thresholds(row: Row, key: str) -> list[float]:
    values = row.get(key)
    return [float(v) for v in values if v is not None] if isinstance(values, list) else []


def _plot_thresholds(axes: Axes, run: VariantRun) -> None:
    """Mean ± standard deviation over the images of each threshold per stage; more than two: their mean and range."""
    rows = [row for row in run.stages() if _thresholds(row, "threshold_mean")]
    stages = [row["stage"] for row in rows]
    means = np.array([_thresholds(row, "threshold_mean") for row in rows])
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if means.shape[1] > 2:
        axes.plot(
            stages, means.mean(axis=1), color=COLOURS[0], marker="o", label=f"mean of {means.shape[1]} thresholds"
        )
        axes.fill_between(stages, means.min(axis=1), means.max(axis=1), color=COLOURS[0], alpha=0.15, linewidth=0)
        return
    for index, name in enumerate(threshold_names(means.shape[1])):
        deviations = [(_thresholds(row, "threshold_std") or [0.0] * means.shape[1])[index] for row in rows]
        # Side by side, so that equal thresholds do not hide each other.
        places = [stage + 0.06 * (2 * index - 1) for stage in stages]
        axes.errorbar(
            places, means[:, index], yerr=deviations, color=COLOURS[index], marker=MARKERS[index], capsize=3, label=name
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a tenth of the curve, shorter at its ends."""
    half = max(1, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _plot_series(axes: Axes, rows: Sequence[Row], keys: Mapping[str, str]) -> None:
    """Each key over the rows: every value faint, its running mean within a stage on top; dotted: a stage begins."""
    places = [value if (value := number(row, "iteration")) is not None else i for i, row in enumerate(rows)]
    starts = [i for i in range(len(rows)) if i == 0 or rows[i].get("stage") != rows[i - 1].get("stage")]
    named: set[str] = set()
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        for index, (key, name) in enumerate(keys.items()):
            points = [(places[i], v) for i in range(begin, end) if (v := number(rows[i], key)) is not None]
            if not points:
                continue
            x, y = np.array(points, dtype=np.float64).T
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(y), color=colour, linewidth=1.6, label="" if key in named else name)
            named.add(key)
        if begin:
            axes.axvline(places[begin], color="#9a9a9a", linewidth=0.8, linestyle=":")


EXPLORATION_PANELS: dict[str, dict[str, str]] = {
    "reward r and its parts": {"reward": "r", "reward_relabel": "labels", "reward_features": "features"},
    "assessor loss": {"assessor_loss": "assessor"},
    "searcher loss": {"searcher_loss": "searcher"},
    "does the assessor know the reward?": {"corr_q_r": "corr(q, r)", "share_positive_reward": "share of r > 0"},
    "action sensitivity |∂q/∂a|": {"action_sensitivity": "|∂q/∂a|"},
    "return of an episode": {"episode_return": "sum of r"},
    "loss of the query network": {"q_loss": "loss"},
    "Q of the chosen and its target": {"q_value": "Q", "q_target": "target"},
    "exploration": {"epsilon": "epsilon"},
    "loss of the networks on X": {"loss": "whole", "segmentation_loss": "segmentation"},
    "policy loss": {"policy_loss": "policy"},
    "value loss": {"value_loss": "value"},
    "entropy of the policy (nats)": {"entropy": "entropy"},
    "share of the positions in the context": {"context_share": "share"},
    "share of the positions that are right": {"first_accuracy": "at t = 0", "last_accuracy": "at the end"},
}


def exploration_figure(run: VariantRun) -> Figure | None:
    """Thresholds per stage, and reward parts, losses and diagnostics over the sampling; None where there is nothing.

    Faint: every logged value; solid: running mean within the stage; dotted: a new stage begins.
    """
    rows = run.rows(*SAMPLING_PHASES)
    panels = {
        title: keys
        for title, keys in EXPLORATION_PANELS.items()
        if any(number(row, key) is not None for row in rows for key in keys)
    }
    thresholds = any(_thresholds(row, "threshold_mean") for row in run.stages())
    if not panels and not thresholds:
        return None
    figure, all_axes = make_panels(len(panels) + int(thresholds))
    for axes, (title, keys) in zip(all_axes[int(thresholds) :], panels.items(), strict=True):
        prepare_axes(axes, title=title, x="iteration", y="")
        _plot_series(axes, rows, keys)
        if any("reward" in key or key == "corr_q_r" for key in keys):
            axes.axhline(0.0, color="#6f6f6f", linewidth=0.8)
    if thresholds:
        prepare_axes(all_axes[0], title="thresholds, mean ± sd of the images", x="stage", y="probability")
        _plot_thresholds(all_axes[0], run)
    for axes in all_axes:
        if len(axes.get_legend_handles_labels()[0]) > 1:
            legend(axes)
    return figure


def training_figure(
    runs: Sequence[VariantRun], pretraining: Mapping[int, Sequence[Row]] | None = None
) -> Figure | None:
    """Training loss of the segmenter over its epochs: pre-training, then each variant's first seed.

    Args:
        runs: variants and seeds.
        pretraining: metrics of the shared pre-training per seed, where it was run apart.

    Returns:
        The figure, or None where no loss was logged.
    """
    curves: dict[str, list[float]] = {}
    for seed, rows in (pretraining or {}).items():
        curves[f"pre-training, seed {seed}"] = _losses(rows)
    firsts = {label: members[0] for label, members in group_by_label(runs).items()}
    for label, run in firsts.items():
        curves[f"{label}, seed {run.seed}"] = _losses(run.rows("pretrain", "refine"))
    curves = {name: losses for name, losses in curves.items() if losses}
    if not curves:
        return None
    figure, (axes,) = make_panels(1, size=(7.4, 3.4))
    prepare_axes(axes, title="training loss of the segmenter", x="logged step", y="cross-entropy")
    before = max((len(v) for name, v in curves.items() if name.startswith("pre-training")), default=0)
    for index, (name, losses) in enumerate(curves.items()):
        apart = name.startswith("pre-training")
        start = 0 if apart else before
        colour, style = (
            ("#6f6f6f", GREY_STYLES[index % len(GREY_STYLES)]) if apart else (COLOURS[index % len(COLOURS)], "-")
        )
        axes.plot(np.arange(start, start + len(losses)), losses, style, color=colour, linewidth=1.4, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)
    return figure


def _losses(rows: Sequence[Row]) -> list[float]:
    return [loss for row in rows if (loss := number(row, "loss")) is not None]
