"""`raysseg tune`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer

from raysseg.algorithms.sweep_points import read_axes, short_names
from raysseg.algorithms.sweep_settings import load_sweep
from raysseg.algorithms.sweeps import run_sweep
from raysseg.cli.console import table_console
from raysseg.cli.progress import Progress
from raysseg.cli.train import seed_numbers
from raysseg.errors import InputError
from raysseg.visualization.sweep import sweep_table


def tune_command(
    file: Annotated[Path, typer.Argument(help="The sweep: a YAML file such as those of tune_configs/.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one value of the sweep's recipe; may be repeated."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="These seeds in place of the sweep's, separated by commas.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where everything is written; by default runs/<file>-<time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted sweep; finished trials are kept.")
    ] = False,
) -> int:
    """Trains every point of a sweep side by side, and ends with a table, plots and the best point as a recipe."""
    if resume and run_dir is None:
        raise InputError("--resume needs --run-dir: the directory of the sweep to continue.")
    sweep = load_sweep(file, override or [], seeds=seed_numbers(seeds))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = run_dir or Path("runs") / f"{sweep.name}-{stamp}"
    with Progress(None, f"sweep {sweep.name}") as progress:
        outcome = run_sweep(sweep, folder, resume=resume, listener=progress)
    keys = short_names([axis.key for axis in read_axes(sweep)])
    console = table_console()
    console.print(sweep_table(outcome.rows, keys, outcome.metric))
    lines = {"Table": str(folder / "table.md"), "Trials": str(folder / "sweep.json")}
    lines |= {key: str(path) for key, name in keys.items() if (path := folder / f"{name}.png").exists()}
    if outcome.best is not None:
        lines["Best"] = f"raysseg train {folder / 'best.yaml'}"
    width = max(map(len, lines))
    for title, text in lines.items():
        console.print(f"{title:{width}}  {text}", soft_wrap=True, highlight=False, markup=False)
    if outcome.failed:
        names = ", ".join(trial.job.name for trial in outcome.failed)
        print(
            f"{len(outcome.failed)} of {len(outcome.trials)} trials failed ({names}); their folders hold error.txt, "
            "and --resume tries them again.",
            file=sys.stderr,
        )
        return 1
    return 0
