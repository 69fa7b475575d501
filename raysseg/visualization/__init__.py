"""Overlays, label evolution strips, curves, comparison tables and the HTML report of runs."""

from raysseg.visualization.alarms import alarms
from raysseg.visualization.curves import accuracy_figure, exploration_figure, figure_png, label_figure, training_figure
from raysseg.visualization.evolution import EvolutionRow, evolution_sheet, evolution_strip
from raysseg.visualization.overlay import colour_map, overlay, save_index_png
from raysseg.visualization.report import write_report
from raysseg.visualization.run_directory import RunDirectory, VariantRun, load_variant_runs
from raysseg.visualization.tables import (
    ComparisonRow,
    Spread,
    comparison_table,
    csv_table,
    default_baseline,
    markdown_table,
    rich_table,
)

__all__ = [
    "ComparisonRow",
    "EvolutionRow",
    "RunDirectory",
    "Spread",
    "VariantRun",
    "accuracy_figure",
    "alarms",
    "colour_map",
    "comparison_table",
    "csv_table",
    "default_baseline",
    "evolution_sheet",
    "evolution_strip",
    "exploration_figure",
    "figure_png",
    "label_figure",
    "load_variant_runs",
    "markdown_table",
    "overlay",
    "rich_table",
    "save_index_png",
    "training_figure",
    "write_report",
]
