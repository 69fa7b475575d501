"""Runs with budgets of labelled regions: their table, their curves and their place in the report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysseg.visualization import evolution_sheet, load_variant_runs, write_report
from raysseg.visualization.curves import accuracy_figure, exploration_figure
from raysseg.visualization.evolution import EvolutionRow
from raysseg.visualization.tables import budget_quantities, comparison_table, csv_table, default_baseline, table_cells

ALL = 4000


def write_variant(root: Path, name: str, seed: int, budgets: list[int], mious: list[float], rare: float) -> None:
    """Writes one finished variant that was scored before and after each of its budgets."""
    folder = root / "variants" / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "iteration": i,
            "phase": "play",
            "stage": 0,
            "reward": 0.1 * i,
            "q_loss": 1.0 / (1 + i),
            "epsilon": 0.9 - 0.1 * i,
        }
        for i in range(4 if name == "query" else 0)
    ]
    for stage, (budget, miou) in enumerate(zip([0, *budgets], mious, strict=True)):
        row = {"iteration": 10 + stage, "phase": "evaluate", "stage": stage, "budget": budget, "miou": miou}
        row |= {"labelled_share": budget / ALL, "rare_share": rare if budget else None}
        rows.append({**row, "per_class_iou": [miou, miou]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [row for row in rows if row["phase"] == "evaluate"]
    numbers = {key: stages[-1][key] for key in ("miou", "per_class_iou", "labelled_share", "rare_share", "budget")}
    summary = {"method": "ralis", "recipe": "made-up", "variant": name, "seed": seed, "split": "val", "images": 4}
    summary |= {"class_names": ["a", "b"], "wall_seconds": 1.0, "complete": True, "stages": stages, **numbers}
    (folder / "summary.json").write_text(json.dumps(summary))
    if name != "full":
        (folder / "pictures").mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "pictures" / "regions.png")


@pytest.fixture
def budgets_run(tmp_path: Path) -> Path:
    """Two seeds of two policies that share a budget of 480, and full supervision."""
    for seed, bonus in ((0, 0.0), (1, 0.02)):
        write_variant(tmp_path / "run", "uniform", seed, [480, 960], [0.40, 0.42 + bonus, 0.44], 0.1)
        write_variant(tmp_path / "run", "query", seed, [480, 960], [0.40, 0.43 + 2 * bonus, 0.47], 0.3)
        write_variant(tmp_path / "run", "full", seed, [ALL], [0.40, 0.6], 0.12)
    return tmp_path / "run"


def test_the_table_has_every_shared_budget_and_the_difference_from_uniform(budgets_run: Path) -> None:
    runs = load_variant_runs([budgets_run])
    assert default_baseline(runs) == "uniform"
    assert list(budget_quantities(runs)) == ["miou_at_480", "miou_at_960"], "all regions are no budget of others"
    rows = {row.label: row for row in comparison_table(runs, baseline="uniform")}
    assert rows["query"].final["miou_at_480"].mean == pytest.approx(0.45)
    # Paired: 0.43 - 0.42 and 0.47 - 0.44.
    assert rows["query"].differences["miou_at_480"].mean == pytest.approx(0.02)
    assert rows["query"].differences["miou_at_480"].std == pytest.approx(0.01 * 2**0.5)
    assert "miou_at_480" not in rows["full"].final
    assert rows["full"].final["miou"].mean == pytest.approx(0.6)
    assert rows["query"].final["rare_share"].mean == pytest.approx(0.3)
    assert "miou_last_stages" not in rows["query"].final, "budgets are not averaged"
    headers, cells = table_cells(list(rows.values()))
    assert headers[2:6] == [
        "mIoU at 480 regions",
        "Δ mIoU at 480 regions",
        "mIoU at 960 regions",
        "Δ mIoU at 960 regions",
    ]
    table = {line[0]: dict(zip(headers, line, strict=True)) for line in cells}
    assert table["query"]["mIoU at 480 regions"] == "45.0 ± 2.8"
    assert table["query"]["Δ mIoU at 480 regions"] == "+2.0 ± 1.4 (n=2)"
    assert table["full"]["mIoU at 480 regions"] == "–"
    assert table["uniform (baseline)"]["rare classes in labels"] == "10.0 ± 0.0"


def test_the_csv_has_them_too(budgets_run: Path) -> None:
    rows = comparison_table(load_variant_runs([budgets_run]), baseline="uniform")
    lines = [line for line in csv.DictReader(io.StringIO(csv_table(rows))) if line["label"] == "query"]
    found = {line["quantity"]: float(line["mean"]) for line in lines if not line["stage"]}
    assert found["miou_at_480"] == pytest.approx(0.45)
    assert found["miou_at_480_difference"] == pytest.approx(0.02)


def test_one_variant_alone_shows_its_own_budgets(budgets_run: Path) -> None:
    runs = load_variant_runs([budgets_run / "variants" / "full"])
    assert list(budget_quantities(runs)) == [f"miou_at_{ALL}"]


def test_accuracy_is_drawn_over_regions_and_full_supervision_is_a_line(budgets_run: Path) -> None:
    figure = accuracy_figure(load_variant_runs([budgets_run]))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "labelled regions"
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves["query"].get_xdata()) == [0, 480, 960]
    assert list(curves["query"].get_ydata()) == pytest.approx([40, 45, 47])
    assert list(curves["full"].get_ydata()) == pytest.approx([60, 60])
    assert list(curves["full"].get_xdata()) == [0, 1], "over the whole width"


def test_play_is_drawn_as_exploration_is(budgets_run: Path) -> None:
    runs = {run.variant: run for run in load_variant_runs([budgets_run])}
    figure = exploration_figure(runs["query"])
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "reward r and its parts", "loss of the query network", "exploration",
    ]  # fmt: skip
    assert exploration_figure(runs["uniform"]) is None


def test_the_report_shows_the_labelled_regions(budgets_run: Path, tmp_path: Path) -> None:
    page = write_report([budgets_run], tmp_path / "report.html").read_text()
    assert "<h2>Labelled regions</h2>" in page
    assert page.count("Labelled regions of query: regions") == 1
    assert "<h2>Label evolution</h2>" not in page
    assert page.count("This variant explores nothing") == 2


def test_maps_over_the_image_keep_the_image_where_they_say_nothing() -> None:
    image = np.full((120, 240, 3), 200, np.uint8)
    labels = np.full((120, 240), 255, np.uint8)
    labels[:60, :120] = 1
    palette = ((0, 0, 0), (255, 0, 0))
    sheets = {}
    for over in (False, True):
        row = EvolutionRow(image=image, maps=[labels], titles=["480 regions"], truth=labels, over_image=over)
        sheets[over] = np.asarray(evolution_sheet([row], palette, class_names=("ground", "thing")))
    changed = np.argwhere((sheets[False] != sheets[True]).any(2))
    top, left = changed.min(0)
    height, width = changed.max(0) - changed.min(0) + 1
    assert (height, width) == (118, 238), "the panel of the map within its frame, and neither image nor truth"
    panel = sheets[True][top : top + height, left : left + width]
    assert panel[10, 10].tolist() == [236, 70, 70], "0.65 of red and 0.35 of the image"
    assert panel[100, 200].tolist() == [90, 90, 90], "the image, dimmed"
    assert panel[10, 118].tolist() == panel[58, 10].tolist() == [255, 255, 255], "a line around what is labelled"
    assert panel[10, 119].tolist() == panel[59, 10].tolist() == [90, 90, 90]
