"""`raysseg check-rewards`: what each of EIL's rewards says of actions whose true gain is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from raysseg.algorithms.eil.rehearsal_check import correlations, rehearse_constants
from raysseg.algorithms.eil.reward_check import RewardRow, check_rewards
from raysseg.algorithms.recipes import set_value
from raysseg.cli.console import table_console
from raysseg.cli.progress import Progress
from raysseg.core.metrics_writer import write_atomically
from raysseg.errors import InputError

SECTIONS = ("eil.", "training.")
"""What may be set: the rest of a variant is what its segmenter was trained with."""

COLUMNS = {
    "reward": "reward",
    "within": "corr within",
    "within_balanced": "balanced",
    "between": "corr between",
    "between_balanced": "balanced",
    "truth": "truth earns",
    "truth_positive": "images > 0",
    "greedy_gain": "greedy gains",
    "greedy_balanced": "balanced",
    "greedy_share": "new labels",
}


def check_rewards_command(
    variant: Annotated[
        Path,
        typer.Argument(help="Folder of a finished variant of EIL, or of a run's pre-training (RUN/pretrain/seed-0)."),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace one option of EIL (eil.window=image) or of training (training.self_training.weight=1); may be repeated.",
        ),
    ] = None,
    rewards: Annotated[str | None, typer.Option(help="Only these rewards, separated by commas.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Training images that are drawn.")] = 64,
    actions: Annotated[int, typer.Option(min=2, help="Actions that are drawn for each image.")] = 16,
    rehearse: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="FOLDS", help="Rehearse a stage with constant policies instead, each this many times."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this JSON file.")] = None,
) -> None:
    """Compares EIL's rewards with the true gain of label maps, before anything is trained with them.

    corr within: over drawn actions of one image, meaned over images; corr between: over images under one threshold, meaned over
    thresholds; 'balanced': the same for the gain that weighs classes alike. truth earns: the reward of true labels. greedy
    gains: what each image's best action by the reward gains.

    With --rehearse: the return of a whole stage, which policies are searched by, for constant policies, beside the mIoU that their
    networks truly have on images left out, and the correlation of both over policies.
    """
    if out is not None and out.suffix != ".json":
        raise InputError(f"The file {out} ends in '{out.suffix}'; expected is a name that ends in .json.")
    if rehearse is not None:
        _rehearse(variant, _options(override or []), images, rehearse, out)
        return
    names = [part.strip() for part in rewards.split(",") if part.strip()] if rewards else []
    with Progress(images, "checking rewards") as bar:

        def show(done: int, total: int) -> None:
            bar.update(done, total)

        rows = check_rewards(
            variant, options=_options(override or []), images=images, drawn=actions, rewards=names, show=show
        )
    console = table_console()
    console.print(_table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps([_plain(row) for row in rows], indent=1))
        console.print(f"Written to {out}", highlight=False, markup=False, soft_wrap=True)


def _rehearse(variant: Path, options: dict[str, Any], images: int, folds: int, out: Path | None) -> None:
    """Prints the table of rehearsed constant policies."""
    with Progress(folds, "rehearsing") as bar:
        rows = rehearse_constants(variant, options=options, images=images, folds=folds, show=bar.update)
    found = correlations(rows)
    table = Table(
        caption="correlation with the mIoU over policies: "
        + ", ".join(
            f"{name.replace('_', ' ')} {'–' if math.isnan(value) else f'{value:.2f}'}" for name, value in found.items()
        )
    )
    titles = ("policy", "labelled", "return", "agreement", "on strokes", "true mIoU")
    for title in titles:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in dataclasses.astuple(row)))
    console = table_console()
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: None if math.isnan(value) else value for name, value in found.items()}
        record = {"correlations": plain, "policies": [dataclasses.asdict(row) for row in rows]}
        write_atomically(out, json.dumps(record, indent=1))
        console.print(f"Written to {out}", highlight=False, markup=False, soft_wrap=True)


def _options(overrides: list[str]) -> dict[str, Any]:
    """Reads `eil.key=value` and `training.key=value` overrides by section. Raises `InputError` for any other key."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key.startswith(SECTIONS):
            raise InputError(f"--set takes eil.key=value or training.key=value here, not '{override}'.")
        try:
            set_value(values, key, yaml.safe_load(raw))
        except yaml.YAMLError:
            raise InputError(f"--set {override}: the value is not YAML.") from None
    return values


def _plain(row: RewardRow) -> dict[str, Any]:
    """The row's values by name; what is undefined is None, as JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(row).items()
    }


def _table(rows: list[RewardRow]) -> Table:
    table = Table()
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title == "reward" else "right")
    for row in rows:
        values = _plain(row)
        table.add_row(*(_cell(values[name]) for name in COLUMNS))
    return table


def _cell(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3f}"
