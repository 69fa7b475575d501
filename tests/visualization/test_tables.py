import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from raysseg.errors import InputError
from raysseg.visualization.run_directory import load_variant_runs
from raysseg.visualization.tables import (
    ComparisonRow,
    Spread,
    comparison_table,
    csv_table,
    default_baseline,
    markdown_table,
    rich_table,
    spread,
)


def by_label(rows: list[ComparisonRow]) -> dict[str, ComparisonRow]:
    return {row.label: row for row in rows}


def close(value: Spread, mean: float, std: float | None, n: int) -> None:
    assert value.mean == pytest.approx(mean)
    assert value.std == (None if std is None else pytest.approx(std))
    assert value.n == n


def test_mean_and_sample_deviation_over_the_seeds(run: Path) -> None:
    rows = by_label(comparison_table(load_variant_runs([run])))
    assert rows["eil"].seeds == (0, 1, 2)
    # 51, 55, 56: mean 54, squares 9 + 1 + 4 = 14, 14 / (3 − 1) = 7.
    close(rows["eil"].final["miou"], 0.54, math.sqrt(7) / 100, 3)
    close(rows["eil"].final["mean_foreground_dice"], 0.64, math.sqrt(7) / 100, 3)
    # Stages 2, 3 and 4 are 2, 1 and 0 points below the last one.
    close(rows["eil"].final["miou_last_stages"], 0.53, math.sqrt(7) / 100, 3)
    close(rows["none"].final["miou"], 0.52, 0.02, 3)
    assert rows["eil"].differences == {}


def test_differences_are_paired_by_seed(run: Path) -> None:
    rows = by_label(comparison_table(load_variant_runs([run]), baseline="none"))
    # 51 − 50 = 1, 55 − 52 = 3, 56 − 54 = 2: mean 2, squares 1 + 1 + 0, deviation 1.
    close(rows["eil"].differences["miou"], 0.02, 0.01, 3)
    assert rows["none"].differences == {}
    assert rows["eil"].baseline == rows["none"].baseline == "none"


def test_differences_use_the_common_seeds_only(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {"none": {1: 0.5, 2: 0.6}, "eil": {0: 0.9, 2: 0.7}, "rand": {5: 0.1}})
    rows = by_label(comparison_table(load_variant_runs([path]), baseline="none"))
    close(rows["eil"].differences["miou"], 0.1, None, 1)
    close(rows["eil"].final["miou"], 0.8, math.sqrt(0.02), 2)
    assert rows["rand"].differences == {}


def test_stages_are_averaged_each_for_itself(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {"eil": {0: 0.5, 1: 0.6}}, accepted=0.25)
    (row,) = comparison_table(load_variant_runs([path]))
    assert [s.mean for s in row.stages["labelled_share"] if s] == pytest.approx([0.13, 0.23, 0.33, 0.43])
    assert [s.n for s in row.stages["accepted_share"] if s] == [2, 2, 2, 2]
    assert "25 / 25 / 25 / 25" in markdown_table([row])


def test_unfinished_seeds_are_named_and_not_averaged(run: Path, make_seed: Callable[..., Path]) -> None:
    make_seed(run / "variants" / "eil" / "seed-7", 0.99, finished=False)
    make_seed(run / "variants" / "slow" / "seed-0", 0.99, finished=False)
    rows = by_label(comparison_table(load_variant_runs([run]), baseline="none"))
    assert rows["eil"].seeds == (0, 1, 2)
    assert rows["eil"].final["miou"].mean == pytest.approx(0.54)
    assert rows["slow"].seeds == ()
    assert rows["slow"].final == {}
    text = markdown_table(list(rows.values()))
    assert "- eil: seed 7 is unfinished: stage 2 evaluated" in text
    assert "| slow | none finished | – |" in text


def test_seeds_of_two_runs_make_one_row_unless_one_seed_is_in_both(
    run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    more = make_run(tmp_path / "second", {"eil": {3: 0.58}, "none": {2: 0.9}})
    rows = by_label(comparison_table(load_variant_runs([run, more]), baseline="none (first)"))
    assert set(rows) == {"eil", "none (first)", "none (second)"}
    assert rows["eil"].seeds == (0, 1, 2, 3)
    assert rows["eil"].runs == ("first", "second")
    close(rows["eil"].differences["miou"], 0.02, 0.01, 3)
    close(rows["none (second)"].differences["miou"], 0.36, None, 1)


def test_seeds_of_other_recipes_are_not_pooled(run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", {"eil": {3: 0.58}})
    summary = other / "variants" / "eil" / "seed-3" / "summary.json"
    summary.write_text(summary.read_text().replace('"made-up"', '"longer"'))
    labels = by_label(comparison_table(load_variant_runs([run, other])))
    assert set(labels) == {"eil (first)", "eil (second)", "none"}


def test_an_unclear_baseline_is_refused(run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nonne' is not among the variants; did you mean 'none'"):
        comparison_table(load_variant_runs([run]), baseline="nonne")
    more = make_run(tmp_path / "second", {"none": {0: 0.5}})
    with pytest.raises(InputError, match=r"stands for 2 rows; name one of: none \(first\), none \(second\)"):
        comparison_table(load_variant_runs([run, more]), baseline="none")


def test_the_default_baseline_is_none_where_there_is_exactly_one(
    run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    assert default_baseline(load_variant_runs([run])) == "none"
    more = make_run(tmp_path / "second", {"none": {0: 0.5}})
    assert default_baseline(load_variant_runs([run, more])) is None
    assert default_baseline(load_variant_runs([run / "variants" / "eil"])) is None


def test_one_seed_has_no_deviation_and_no_value_none() -> None:
    assert spread([]) is None
    assert spread([0.5]) == Spread(mean=0.5, std=None, n=1)


def test_markdown_has_the_numbers_and_escapes_pipes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {"none": {0: 0.5, 1: 0.52}, "a|b": {0: 0.51, 1: 0.55}})
    text = markdown_table(comparison_table(load_variant_runs([path]), baseline="none"))
    header, _, first, second = text.splitlines()[:4]
    assert header.startswith("| variant | seeds | mIoU | Δ mIoU |")
    assert first.startswith("| a\\|b | 0, 1 | 53.0 ± 2.8 | +2.0 ± 1.4 (n=2) |")
    assert second.startswith("| none (baseline) | 0, 1 | 51.0 ± 1.4 |  |")


def test_csv_holds_unrounded_numbers(run: Path) -> None:
    text = csv_table(comparison_table(load_variant_runs([run]), baseline="none"))
    lines = {(r["label"], r["quantity"], r["stage"]): r for r in csv.DictReader(io.StringIO(text))}
    assert float(lines["eil", "miou", ""]["std"]) == pytest.approx(math.sqrt(7) / 100)
    assert float(lines["eil", "miou_difference", ""]["mean"]) == pytest.approx(0.02)
    assert lines["eil", "miou_difference", ""]["baseline"] == "none"
    assert float(lines["none", "labelled_share", "3"]["mean"]) == pytest.approx(0.33)


def test_names_are_not_read_as_markup_in_the_terminal(make_run: Callable[..., Path], tmp_path: Path) -> None:
    from rich.console import Console

    path = make_run(tmp_path / "run", {"eil[red]": {0: 0.5}})
    console = Console(file=io.StringIO(), width=200)
    console.print(rich_table(comparison_table(load_variant_runs([path]))))
    assert "eil[red]" in console.file.getvalue()  # type: ignore[attr-defined]
