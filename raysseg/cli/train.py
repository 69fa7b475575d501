"""`raysseg train` and `raysseg recipes`."""

from __future__ import annotations

import datetime
import functools
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raysseg.algorithms.recipes import choose, load_recipe, shipped_recipes, train_recipe
from raysseg.cli.progress import Progress
from raysseg.errors import InputError
from raysseg.visualization import comparison_table, load_variant_runs, markdown_table, rich_table, write_report


def train_command(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe (see `raysseg recipes`), or a YAML file.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one value of the recipe; may be repeated."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where everything is written; by default runs/<recipe>-<time>.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Only these variants of the recipe, separated by commas.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="These seeds in place of the recipe's, separated by commas.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its newest checkpoints.")
    ] = False,
) -> None:
    """Trains every variant of a recipe from one pre-trained segmenter per seed, and ends with a table, a picture and
    a report.
    """
    if resume and run_dir is None:
        raise InputError("--resume needs --run-dir: the directory of the run to continue.")
    plan = load_recipe(recipe, override or [])
    plan = choose(plan, variants=_names(variants), seeds=seed_numbers(seeds))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = run_dir or Path("runs") / f"{plan.name}-{stamp}"
    train_recipe(plan, folder, resume=resume, listener_for=functools.partial(Progress, None))
    rows = comparison_table(load_variant_runs([folder]))
    (folder / "table.md").write_text(markdown_table(rows))
    report = write_report([folder], folder / "report.html")
    # Without a terminal rich assumes 80 columns, which cuts the table to pieces.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(rich_table(rows))
    pictures = sorted(folder.glob("variants/*/seed-*/pictures/*.png"))
    console.print(f"Table     {folder / 'table.md'}", soft_wrap=True, highlight=False)
    if pictures:
        console.print(f"Pictures  {pictures[0]}", soft_wrap=True, highlight=False)
    console.print(f"Report    {report}", soft_wrap=True, highlight=False)


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def seed_numbers(text: str | None) -> list[int]:
    """Reads seeds separated by commas. Raises `InputError` for anything else."""
    names = _names(text)
    if not all(name.isdigit() for name in names):
        raise InputError(f"--seeds takes numbers from 0 separated by commas, not '{text}'.")
    return [int(name) for name in names]


def recipes_command() -> None:
    """Lists the recipes that come with the package."""
    table = Table("recipe", "what it does")
    for name, description in shipped_recipes().items():
        table.add_row(name, description)
    Console().print(table)
