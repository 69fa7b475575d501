"""`raysseg compare`: the table of one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raysseg.cli.console import table_console
from raysseg.errors import InputError
from raysseg.visualization.run_directory import load_variant_runs
from raysseg.visualization.tables import comparison_table, csv_table, default_baseline, markdown_table, rich_table

WRITERS = {".md": markdown_table, ".csv": csv_table}


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or variant folders of one.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Variant that the others are compared with, seed by seed; by default 'uniform', or else 'none', where it was run."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this .md or .csv file.")] = None,
) -> None:
    """Compares the variants of runs: mean ± standard deviation over seeds, and paired differences from a baseline."""
    if out is not None and out.suffix not in WRITERS:
        raise InputError(f"The file {out} ends in '{out.suffix}'; expected is a name that ends in .md or .csv.")
    variant_runs = load_variant_runs(runs)
    rows = comparison_table(variant_runs, baseline=baseline or default_baseline(variant_runs))
    console = table_console()
    console.print(rich_table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(WRITERS[out.suffix](rows), encoding="utf-8")
        console.print(f"Written to {out}", highlight=False, markup=False, soft_wrap=True)
