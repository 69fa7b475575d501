"""`raysseg report`: one HTML page about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raysseg.visualization.report import write_report


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or variant folders of one.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; by default report.html in the run, or here for several runs.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Variant that the others are compared with, seed by seed; by default 'none' where it was run."
        ),
    ] = None,
) -> None:
    """Writes one self-contained HTML page: tables, curves, label evolution, diagnostics, configuration."""
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    typer.echo(write_report(runs, out or default, baseline=baseline))
