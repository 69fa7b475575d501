"""The accuracy over the steps of an episode, and what is drawn of a run that learns contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysseg.visualization.curves import exploration_figure
from raysseg.visualization.report import write_report
from raysseg.visualization.run_directory import load_variant_runs
from raysseg.visualization.step_curves import step_figure, step_spreads

MIOUS = {"cissnet": {0: [0.40, 0.50, 0.52], 1: [0.42, 0.56, 0.52]}, "baseline": {0: [0.45], 1: [0.47]}}


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Two seeds of CiSS-Net, scored at t = 0, 2 and 4, two of its baseline, and one seed that is not finished."""
    for variant, seeds in MIOUS.items():
        for seed, mious in seeds.items():
            steps = [0, 2, 4][: len(mious)]
            learned: dict[str, Any] = {"phase": "learn", "stage": 1, "loss": 1.0, "segmentation_loss": 0.8}
            if variant == "cissnet":
                learned |= {"reward": 0.3, "episode_return": 0.9, "policy_loss": 0.1, "value_loss": 0.2}
                learned |= {"entropy": 0.6, "context_share": 0.5, "first_accuracy": 0.7, "last_accuracy": 0.8}
            last = {"phase": "evaluate", "stage": 1, "miou": mious[-1], "steps": steps, "miou_at_steps": mious}
            rows = [{"phase": "evaluate", "stage": 0, "miou": 0.4}, learned, learned, last]
            rows = [{"iteration": number, **row} for number, row in enumerate(rows)]
            folder = tmp_path / "run" / "variants" / variant / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            stages = [row for row in rows if row["phase"] == "evaluate"]
            summary = {"method": "cissnet", "miou": mious[-1], "stages": stages, "complete": True}
            if (variant, seed) != ("cissnet", 2):
                (folder / "summary.json").write_text(json.dumps(summary))
    unfinished = tmp_path / "run" / "variants" / "cissnet" / "seed-2"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text(json.dumps({"iteration": 0, **last}) + "\n")
    return tmp_path / "run"


def test_spreads_are_means_over_the_finished_seeds(contexts: Path) -> None:
    found = step_spreads(load_variant_runs([contexts]))
    assert list(found) == ["baseline", "cissnet"]
    assert {step: one.mean for step, one in found["cissnet"].items()} == pytest.approx({0: 0.41, 2: 0.53, 4: 0.52})
    assert [one.n for one in found["cissnet"].values()] == [2, 2, 2]
    assert found["cissnet"][2].std == pytest.approx(0.06 / 2**0.5)
    assert list(found["baseline"]) == [0]


def test_what_is_scored_once_is_a_height_and_the_rest_a_line(contexts: Path) -> None:
    figure = step_figure(load_variant_runs([contexts]))
    assert figure is not None
    (axes,) = figure.axes
    height, line = axes.get_lines()
    assert list(height.get_ydata()) == pytest.approx([46.0, 46.0])
    assert list(line.get_xdata()) == [0, 2, 4]
    assert list(line.get_ydata()) == pytest.approx([41.0, 53.0, 52.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["baseline", "cissnet"]


def test_runs_without_steps_have_no_figure(run: Path) -> None:
    assert step_spreads(load_variant_runs([run])) == {}
    assert step_figure(load_variant_runs([run])) is None
    assert "Accuracy over the steps" not in write_report([run], run / "report.html").read_text(encoding="utf-8")


def test_every_number_of_the_learning_is_drawn(contexts: Path) -> None:
    baseline, _, cissnet, *_ = load_variant_runs([contexts])
    figure = exploration_figure(cissnet)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "reward r and its parts",
        "return of an episode",
        "loss of the networks on X",
        "policy loss",
        "value loss",
        "entropy of the policy (nats)",
        "share of the positions in the context",
        "share of the positions that are right",
    ]
    figure = exploration_figure(baseline)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss of the networks on X"]


def test_the_report_has_the_table_over_t(contexts: Path) -> None:
    page = write_report([contexts], contexts / "report.html", baseline="baseline").read_text(encoding="utf-8")
    assert "<h2>Accuracy over the steps</h2>" in page
    assert "<th>t = 0</th><th>t = 2</th><th>t = 4</th>" in page
    assert "<td>cissnet</td><td>41.0 ± 1.4</td><td>53.0 ± 4.2</td><td>52.0 ± 0.0</td>" in page
    assert "<td>baseline</td><td>46.0 ± 1.4</td><td>–</td><td>–</td>" in page
    assert "explores nothing" not in page
