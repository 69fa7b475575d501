"""The accuracy after every step of an episode of contexts, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from raysseg.visualization.curves import COLOURS, MARKERS, legend, make_panels, prepare_axes
from raysseg.visualization.run_directory import VariantRun
from raysseg.visualization.tables import Spread, group_by_label, spread


def step_spreads(runs: Sequence[VariantRun]) -> dict[str, dict[int, Spread]]:
    """mIoU at every t of the last evaluation, over the finished seeds of each variant.

    Args:
        runs: variants and seeds.

    Returns:
        label → t → spread, of fractions 0…1; empty where no variant was scored at several t.
    """
    found: dict[str, dict[int, Spread]] = {}
    for label, members in group_by_label(runs).items():
        values: dict[int, list[float]] = {}
        for stages in (member.stages() for member in members if member.finished):
            last = stages[-1] if stages else {}
            for step, miou in zip(last.get("steps") or (), last.get("miou_at_steps") or (), strict=False):
                values.setdefault(int(step), []).append(float(miou))
        spreads = {step: one for step, each in sorted(values.items()) if (one := spread(each)) is not None}
        if spreads:
            found[label] = spreads
    return found if any(len(spreads) > 1 for spreads in found.values()) else {}


def step_figure(runs: Sequence[VariantRun]) -> Figure | None:
    """mIoU over the steps t, one line per variant; a variant without contexts is a dashed line at its height.

    Lines are means of the finished seeds, bands ± one standard deviation (n − 1). None where nothing was scored at several t.
    Source: CiSS-Net, the table of steps.
    """
    found = step_spreads(runs)
    if not found:
        return None
    figure, (axes,) = make_panels(1, size=(7.4, 4.2))
    prepare_axes(axes, title="mIoU after t contexts", x="t", y="mIoU (%)")
    for index, (label, spreads) in enumerate(found.items()):
        colour, steps = COLOURS[index % len(COLOURS)], list(spreads)
        mean = 100.0 * np.array([one.mean for one in spreads.values()])
        if len(steps) == 1:
            axes.axhline(mean[0], color=colour, linestyle="--", linewidth=1.2, label=label)
            continue
        band = 100.0 * np.array([one.std or 0.0 for one in spreads.values()])
        axes.plot(
            steps, mean, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5, linewidth=1.8, label=label
        )
        if band.any():
            axes.fill_between(steps, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({step for spreads in found.values() for step in spreads}))
    legend(axes)
    return figure
