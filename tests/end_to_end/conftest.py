"""A recipe of seconds, and what two runs must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES, changed

from raysseg.algorithms.recipes import load_recipe, train_recipe
from raysseg.data.label_store import LabelStore


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes the small recipe with one variant, `run`; `eil__policy="fixed"` changes `eil.policy`."""

    def write(**changes: Any) -> Path:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        base = {
            "training.pretrain_epochs": 8,
            "training.teacher_interval": "update",
            "training.stage_epochs": 2,
            "eil.virtual_steps": 1,
            "eil.operators.searcher_bias": -1.0,
            "engine.num_cpus_per_env_runner": 0.5,
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**changed(VALUES, {**base, **dotted}), "seeds": [0], "variants": {"run": {}}}))
        return path

    return write


@pytest.fixture
def train(write_recipe: Callable[..., Path], ray_session: None) -> Callable[..., Path]:
    """Trains the small recipe in this process and returns the run directory."""

    def run(run_dir: Path, **changes: Any) -> Path:
        train_recipe(load_recipe(str(write_recipe(**changes))), run_dir)
        return run_dir

    return run


def variant(run_dir: Path) -> Path:
    """Returns the folder of the only variant."""
    return run_dir / "variants" / "run" / "seed-0"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the metrics of pre-training and then of the variant."""
    paths = [run_dir / "pretrain" / "seed-0" / "metrics.jsonl", variant(run_dir) / "metrics.jsonl"]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def label_tables(run_dir: Path) -> list[dict[str, list[Any]]]:
    """Returns the contents of every label version of the variant."""
    store = LabelStore(str(variant(run_dir) / "labels"))
    return [store.table(version).to_pydict() for version in store.versions()]


def summary(run_dir: Path) -> dict[str, Any]:
    """Returns the variant's summary without what depends on the clock."""
    values: dict[str, Any] = json.loads((variant(run_dir) / "summary.json").read_text())
    del values["wall_seconds"]
    return values
