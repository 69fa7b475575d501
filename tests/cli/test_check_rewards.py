"""`raysseg check-rewards` on the pre-training of a tiny run, and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysseg.algorithms.recipes import load_recipe, train_recipe

Refused = Callable[..., str]
Command = Callable[..., Any]


@pytest.fixture
def pretraining(picture_recipe: Path, tmp_path: Path, ray_session: None) -> Path:
    """The folder of a run's pre-training."""
    train_recipe(load_recipe(str(picture_recipe)), tmp_path / "run")
    return tmp_path / "run" / "pretrain" / "seed-0"


def test_the_table_is_printed_and_written(
    pretraining: Path, command: Command, refused: Refused, tmp_path: Path
) -> None:
    words = ("check-rewards", pretraining, "--images", 2, "--actions", 3)
    outcome = command(*words, "--set", "eil.virtual_steps=1", "--out", tmp_path / "out" / "rewards.json")
    assert outcome.status == 0, outcome
    rows = {row["reward"]: row for row in json.loads((tmp_path / "out" / "rewards.json").read_text())}
    assert list(rows) == ["paper", "summed_reliability", "held_out", "true gain"]
    assert all(name in outcome.out for name in rows)
    assert rows["true gain"]["truth"] is None
    assert rows["true gain"]["greedy_gain"] >= rows["paper"]["greedy_gain"]
    # The recipe has no virtual steps, which one reward cannot do without.
    frozen = command(*words, "--out", tmp_path / "frozen.json")
    assert frozen.status == 0, frozen
    assert [row["reward"] for row in json.loads((tmp_path / "frozen.json").read_text())] == [
        "paper",
        "summed_reliability",
        "true gain",
    ]
    assert "virtual_steps is 0" in refused(*words, "--rewards", "held_out")
    assert "Unknown reward 'papers', expected one of paper" in refused(*words, "--rewards", "papers")
    assert "--set takes eil.key=value or training.key=value here, not 'data.path=x'" in refused(
        *words, "--set", "data.path=x"
    )
    assert "windw" in refused(*words, "--set", "eil.windw=3")
    assert "ends in '.txt'" in refused(*words, "--out", "table.txt")
    assert "has no config.yaml" in refused("check-rewards", tmp_path)


def test_constant_policies_are_rehearsed(pretraining: Path, command: Command, refused: Refused, tmp_path: Path) -> None:
    words = ("check-rewards", pretraining, "--images", 4, "--rehearse", 2, "--out", tmp_path / "rehearsed.json")
    options = ("--set", "eil.population.updates=2", "--set", "eil.population.windows=[5,image]")
    outcome = command(*words, *options)
    assert outcome.status == 0, outcome
    record = json.loads((tmp_path / "rehearsed.json").read_text())
    rows = {row["name"]: row for row in record["policies"]}
    assert len(rows) == 11
    assert set(record["correlations"]) == {"overlap", "agreement", "on_strokes", "labelled_share"}
    assert all(name in outcome.out for name in ("nothing", "0.7, window 5", "0.98, window image", "true mIoU"))
    shares = [rows[name]["labelled_share"] for name in ("nothing", "0.98, window 5", "0, window 5", "0, window image")]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert "elites is 3 but size is 2" in refused(*words, "--set", "eil.population.size=2")
