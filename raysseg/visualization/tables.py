"""Comparison of variants over seeds: mean ± standard deviation, and paired differences from a baseline."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rich.table import Table
from rich.text import Text

from raysseg.errors import InputError, nearest_name
from raysseg.visualization.run_directory import VariantRun, number

FINAL_QUANTITIES = {
    "miou": "mIoU",
    "miou_last_stages": "mIoU, last 3 stages",
    "mean_foreground_dice": "foreground Dice",
    "pixel_accuracy": "pixel accuracy",
    "labelled_share": "labelled share",
    "label_precision": "label precision",
    "rare_share": "rare classes in labels",
}
"""What is compared after the last stage; all are fractions 0…1 in the files and per cent in the table."""

BUDGET_QUANTITY = "miou_at_"
"""With the number of labelled regions behind it: the mIoU after a budget, where variants have some in common."""

STAGE_QUANTITIES = ("labelled_share", "label_precision", "accepted_share")
"""What is compared stage by stage, from stage 1 on; the rendered table shows the last one, the CSV holds all."""

DIFFERENCE_QUANTITIES = ("miou", "mean_foreground_dice")
"""What the rendered table shows as difference; the CSV holds all."""

DEFAULT_BASELINES = ("uniform", "none")

LAST_STAGES = 3
"""Stages that `miou_last_stages` averages, because one stage alone moves by about a point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and standard deviation (n − 1) of n values; `std` is None where n is 1."""

    mean: float
    std: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation (n − 1) of the values; None for no values."""
    numbers = list(values)
    if not numbers:
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(mean=statistics.fmean(numbers), std=std, n=len(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One variant over its finished seeds.

    final: spread after the last stage per quantity of FINAL_QUANTITIES that was measured, and of the mIoU per budget;
    stages: per quantity of STAGE_QUANTITIES the spread of stage 1…T (None where not measured);
    differences: spread of (this − baseline) over the seeds that both have; empty for the baseline itself;
    notes: unfinished seeds and odd files, in words.
    """

    label: str
    variant: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    final: dict[str, Spread]
    stages: dict[str, tuple[Spread | None, ...]]
    differences: dict[str, Spread] = field(default_factory=dict)
    baseline: str | None = None
    notes: tuple[str, ...] = ()


def budget_quantities(runs: Sequence[VariantRun]) -> dict[str, str]:
    """The mIoU at each budget that several variants share (or the only one reached), with its title.

    Args:
        runs: variants and seeds; those without budgets add nothing.
    """
    reached = [(run.variant, int(at)) for run in runs for row in run.stages() if (at := number(row, "budget"))]
    variants = len({variant for variant, _ in reached})
    shared = {at for _, at in reached if variants == 1 or len({name for name, each in reached if each == at}) > 1}
    return {f"{BUDGET_QUANTITY}{at}": f"mIoU at {at} regions" for at in sorted(shared)}


def _title(quantity: str) -> str:
    if quantity.startswith(BUDGET_QUANTITY):
        return f"mIoU at {quantity.removeprefix(BUDGET_QUANTITY)} regions"
    return FINAL_QUANTITIES[quantity]


def final_value(run: VariantRun, quantity: str) -> float | None:
    """The value after the last stage: from the summary, else from the last evaluation; None where not measured.

    Of a quantity of one budget, the value after that budget.
    """
    stages = run.stages()
    if quantity.startswith(BUDGET_QUANTITY):
        wanted = int(quantity.removeprefix(BUDGET_QUANTITY))
        return next((number(row, "miou") for row in stages if number(row, "budget") == wanted), None)
    if quantity == "miou_last_stages":
        if any("budget" in row for row in stages):
            return None
        values = [value for row in stages[-LAST_STAGES:] if (value := number(row, "miou")) is not None]
        return statistics.fmean(values) if len(values) == LAST_STAGES else None
    value = number(run.summary or {}, quantity)
    return value if value is not None or not stages else number(stages[-1], quantity)


def group_by_label(runs: Sequence[VariantRun]) -> dict[str, list[VariantRun]]:
    """Groups runs into the rows of a table, in the order in which the variants first occur.

    Seeds of one variant out of several run directories make one row, unless two directories hold the same seed or were
    run with another method, recipe or data: then each directory gets its own row, labelled `variant (run)`.
    """
    by_variant: dict[str, list[VariantRun]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    groups: dict[str, list[VariantRun]] = {}
    for variant, members in by_variant.items():
        seeds = [member.seed for member in members]
        settings = {
            tuple(str(member.summary.get(key)) for key in ("method", "recipe", "split", "images"))
            for member in members
            if member.summary is not None
        }
        separate = len({m.run for m in members}) > 1 and (len(set(seeds)) < len(seeds) or len(settings) > 1)
        for member in members:
            label = f"{variant} ({member.run})" if separate else variant
            groups.setdefault(label, []).append(member)
    return groups


def _per_stage(runs: Sequence[VariantRun], quantity: str) -> tuple[Spread | None, ...]:
    """Spread over the runs of a quantity at the stages 1…T."""
    rows = {(run.seed, int(row["stage"])): number(row, quantity) for run in runs for row in run.stages()}
    last = max((stage for _, stage in rows), default=0)
    return tuple(
        spread(value for (_, at), value in rows.items() if at == stage and value is not None)
        for stage in range(1, last + 1)
    )


def _find_baseline(groups: dict[str, list[VariantRun]], baseline: str) -> str:
    if baseline in groups:
        return baseline
    labels = [label for label, members in groups.items() if members[0].variant == baseline]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise InputError(f"The baseline '{baseline}' stands for {len(labels)} rows; name one of: {', '.join(labels)}.")
    raise InputError(f"The baseline '{baseline}' is not among the variants{nearest_name(baseline, groups)}")


def default_baseline(runs: Sequence[VariantRun]) -> str | None:
    """The row of the variant that the others are usually held against, where there is exactly one; else None.

    That is `uniform`, which labels as much as the others, or else `none`, which goes without what they add.
    """
    groups = group_by_label(runs)
    for name in DEFAULT_BASELINES:
        labels = [label for label, members in groups.items() if members[0].variant.lower() == name]
        if labels:
            return labels[0] if len(labels) == 1 else None
    return None


def comparison_table(variant_runs: Sequence[VariantRun], *, baseline: str | None = None) -> list[ComparisonRow]:
    """Compares variants over their finished seeds; unfinished seeds are named in the row's notes.

    Args:
        variant_runs: variants and seeds of one or several runs.
        baseline: a variant, or a row's label; every other row then gets paired differences over the common seeds.

    Returns:
        One row per variant (per variant and run, where two runs hold the same seed).

    Raises:
        InputError: for a baseline that is not there or stands for several rows.
    """
    groups = group_by_label(variant_runs)
    baseline_label = None if baseline is None else _find_baseline(groups, baseline)
    values = {
        label: {
            quantity: {m.seed: v for m in members if m.finished and (v := final_value(m, quantity)) is not None}
            for quantity in (*FINAL_QUANTITIES, *budget_quantities(variant_runs))
        }
        for label, members in groups.items()
    }
    rows = []
    for label, members in groups.items():
        finished = [member for member in members if member.finished]
        differences = {}
        if baseline_label is not None and label != baseline_label:
            for quantity, mine in values[label].items():
                theirs = values[baseline_label][quantity]
                differences[quantity] = spread(mine[seed] - theirs[seed] for seed in mine if seed in theirs)
        notes = [f"seed {m.seed} is {m.status()}" for m in members if not m.finished]
        notes += [f"seed {m.seed}: {remark}" for m in members for remark in m.remarks]
        rows.append(
            ComparisonRow(
                label=label,
                variant=members[0].variant,
                runs=tuple(dict.fromkeys(member.run for member in members)),
                seeds=tuple(sorted(member.seed for member in finished)),
                final={q: s for q, by_seed in values[label].items() if (s := spread(by_seed.values())) is not None},
                stages={quantity: _per_stage(finished, quantity) for quantity in STAGE_QUANTITIES},
                differences={quantity: s for quantity, s in differences.items() if s is not None},
                baseline=baseline_label,
                notes=tuple(notes),
            )
        )
    return rows


def percent(value: Spread | None, *, seeds: int, signed: bool = False) -> str:
    """`53.7 ± 0.4` in per cent; n is added where it is not the row's number of seeds; `–` where not measured."""
    if value is None:
        return "–"
    text = f"{100 * value.mean:{'+' if signed else ''}.1f}"
    if value.std is not None:
        text += f" ± {100 * value.std:.1f}"
    return text if value.n == seeds and not signed else f"{text} (n={value.n})"


def _final_text(row: ComparisonRow, *, quantity: str) -> str:
    return percent(row.final.get(quantity), seeds=len(row.seeds))


def _difference_text(row: ComparisonRow, *, quantity: str) -> str:
    if row.label == row.baseline:
        return ""
    return percent(row.differences.get(quantity), seeds=len(row.seeds), signed=True)


def _stage_text(row: ComparisonRow, *, quantity: str) -> str:
    """Means of the stages in whole per cent, `12 / 25 / 34`; `–` where none was measured."""
    spreads = row.stages[quantity]
    if all(value is None for value in spreads):
        return "–"
    return " / ".join("–" if value is None else f"{100 * value.mean:.0f}" for value in spreads)


def _ordered(budgets: Iterable[str]) -> list[str]:
    """Returns all quantities of a table: the budgets stand in front, ascending."""
    return [*sorted(budgets, key=lambda one: int(one.removeprefix(BUDGET_QUANTITY))), *FINAL_QUANTITIES]


def table_cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, as text, of the columns for which any row has a value."""
    columns: list[tuple[str, Callable[[ComparisonRow], str]]] = [
        ("variant", lambda row: row.label + (" (baseline)" if row.label == row.baseline else "")),
        ("seeds", lambda row: ", ".join(map(str, row.seeds)) or "none finished"),
    ]
    budgets = {quantity for row in rows for quantity in row.final if quantity.startswith(BUDGET_QUANTITY)}
    for quantity in _ordered(budgets):
        title = _title(quantity)
        if any(quantity in row.final for row in rows):
            columns.append((title, partial(_final_text, quantity=quantity)))
        if (quantity in DIFFERENCE_QUANTITIES or quantity in budgets) and any(
            quantity in row.differences for row in rows
        ):
            columns.append((f"Δ {title}", partial(_difference_text, quantity=quantity)))
    if any(value is not None for row in rows for value in row.stages["accepted_share"]):
        columns.append(("accepted images per stage", partial(_stage_text, quantity="accepted_share")))
    return [title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def footnotes(rows: Sequence[ComparisonRow]) -> list[str]:
    """What a reader of the table has to know: units, seeds, baseline, and everything unfinished."""
    notes = [
        "All numbers in per cent, after the last stage: mean ± standard deviation (n − 1) over the seeds; "
        "one seed has no ±."
    ]
    baseline = next((row.baseline for row in rows if row.baseline is not None), None)
    if baseline is not None:
        notes.append(f"Δ: paired differences from {baseline} over the n seeds that both have.")
    notes += [f"{row.label}: {note}." for row in rows for note in row.notes]
    return notes


def rich_table(rows: Sequence[ComparisonRow]) -> Table:
    """The comparison as a table for the terminal."""
    headers, cells = table_cells(rows)
    table = Table(title="Comparison", title_justify="left", caption="\n".join(footnotes(rows)), caption_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < 2 else "right")
    for line in cells:
        # Text, not str: a name such as eil[a] must not be read as markup.
        table.add_row(*(Text(cell) for cell in line))
    return table


def markdown_table(rows: Sequence[ComparisonRow]) -> str:
    """The comparison as Markdown, with its footnotes as a list."""
    headers, cells = table_cells(rows)
    lines = [headers, ["---"] * 2 + ["---:"] * (len(headers) - 2), *cells]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in footnotes(rows)) + "\n"


def csv_table(rows: Sequence[ComparisonRow]) -> str:
    """Every number of the comparison, unrounded fractions 0…1, one per line; no `stage`: after the last one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "variant", "runs", "quantity", "stage", "mean", "std", "n", "baseline", "note"])
    for row in rows:
        head = [row.label, row.variant, " ".join(row.runs)]

        def write(quantity: str, stage: int | str, value: Spread, baseline: str, head: list[str] = head) -> None:
            std = "" if value.std is None else value.std
            writer.writerow([*head, quantity, stage, value.mean, std, value.n, baseline, ""])

        for quantity, value in row.final.items():
            write(quantity, "", value, "")
        for quantity, value in row.differences.items():
            write(f"{quantity}_difference", "", value, row.baseline or "")
        for quantity, spreads in row.stages.items():
            for stage, at_stage in enumerate(spreads, start=1):
                if at_stage is not None:
                    write(quantity, stage, at_stage, "")
        for note in row.notes:
            writer.writerow([*head, "note", "", "", "", "", "", note])
    return text.getvalue()
