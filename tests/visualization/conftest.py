"""A small made-up run directory: every number is chosen, so that means and differences can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ["background", "cat", "dog"]
STAGES = 4


def evaluation(stage: int, miou: float, *, accepted: float | None = 0.5) -> dict[str, Any]:
    """One evaluate row; the labelled share grows by 0.1 per stage."""
    return {
        "iteration": 10 * stage + 9,
        "phase": "evaluate",
        "stage": stage,
        "miou": miou,
        "per_class_iou": [miou, miou / 2, None],
        "pixel_accuracy": 0.9,
        "mean_foreground_dice": miou + 0.1,
        "labelled_share": 0.03 + 0.1 * stage,
        "label_precision": None if stage == 0 else 0.95,
        "class_mean_precision": 0.8,
        "accepted_share": None if stage == 0 else accepted,
        "threshold_mean": [0.8, 0.6],
        "threshold_std": [0.05, 0.1],
        "threshold_saturation": 0.1,
        "radius": 0 if stage == 0 else 1 + 20 * stage,
    }


def exploration(stage: int, step: int, **changes: float) -> dict[str, Any]:
    """One explore row without any hazard, unless `changes` bring one."""
    row = {
        "iteration": 10 * stage + step,
        "phase": "explore",
        "stage": stage,
        "assessor_loss": 0.1 / (1 + step),
        "searcher_loss": -0.01 * step,
        "reward": 0.01 * step,
        "reward_relabel": 0.02 * step,
        "reward_features": -0.01 * step,
        "share_positive_reward": 0.4,
        "corr_q_r": 0.5,
        "action_sensitivity": 0.2,
    }
    return {**row, **changes}


def write_seed(
    folder: Path,
    miou: float,
    *,
    finished: bool = True,
    explores: bool = True,
    hazards: Mapping[str, float] | None = None,
    accepted: float | None = 0.5,
) -> Path:
    """Writes one variant folder `…/<variant>/seed-<s>` whose last stage has this mIoU (0.01 less per earlier stage)."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"iteration": i, "phase": "pretrain", "stage": 0, "epoch": i, "loss": 1.0 / (1 + i)} for i in range(3)
    ]
    last = STAGES if finished else 2
    for stage in range(last + 1):
        if stage and explores:
            rows += [exploration(stage - 1, step, **(hazards or {})) for step in range(4)]
        rows.append(evaluation(stage, miou - 0.01 * (STAGES - stage), accepted=accepted))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.yaml").write_text("method: eil\nnote: a <tag> & more\n", encoding="utf-8")
    if finished:
        final = rows[-1]
        summary = {
            "method": "eil",
            "recipe": "made-up",
            "variant": folder.parent.name,
            "seed": int(folder.name.removeprefix("seed-")),
            "split": "val",
            "images": 4,
            "class_names": CLASSES,
            "wall_seconds": 36.0,
            "stages": [row for row in rows if row["phase"] == "evaluate"],
            "complete": True,
            **{
                key: final[key]
                for key in (
                    "miou",
                    "per_class_iou",
                    "pixel_accuracy",
                    "mean_foreground_dice",
                    "labelled_share",
                    "label_precision",
                )
            },
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


ENGINE_ROWS = 10
"""Iterations of a stage that `write_timings` describes; the last one evaluates, the first four explore."""


def write_timings(folder: Path, *, remote: bool = True) -> Path:
    """Writes a timings.jsonl for a seed of `write_seed`: half a minute per iteration, one actor dead at iteration 12."""
    rows = []
    for iteration in range(40):
        row: dict[str, Any] = {"iteration": iteration, "seconds": 30.0, "images_per_second": 5.0}
        explores = iteration % ENGINE_ROWS < 4
        row |= {"rollouts_per_second": 2.0 + iteration % 2 if explores else 0.0, "learner_busy_share": 0.9}
        if explores:
            row |= {"policy_lag_mean": 1.0, "policy_lag_max": 3.0}
        if remote:
            row |= {"actors_total": 2.0, "actors_alive": 1.0 if iteration == 12 else 2.0}
            row |= {"rollouts_lost": 0.0 if iteration < 12 else 3.0, "rollouts_dropped": 0.0}
        rows.append(row)
    (folder / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_run(root: Path, mious: Mapping[str, Mapping[int, float]], **options: Any) -> Path:
    """Writes a run directory: variant → seed → mIoU after the last stage."""
    for variant, seeds in mious.items():
        for seed, miou in seeds.items():
            folder = write_seed(root / "variants" / variant / f"seed-{seed}", miou, **options)
            (folder / "pictures").mkdir()
            picture = np.full((4, 6, 3), 40 * seed, dtype=np.uint8)
            Image.fromarray(picture).save(folder / "pictures" / "evolution-1.png")
    (root / "config.yaml").write_text("method: eil\nrecipe: made-up\n", encoding="utf-8")
    (root / "versions.json").write_text(json.dumps({"raysseg": "0.1.0", "torch": "2.14"}), encoding="utf-8")
    return root


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """`write_run`, for tests."""
    return write_run


@pytest.fixture
def make_seed() -> Callable[..., Path]:
    """`write_seed`, for tests."""
    return write_seed


@pytest.fixture
def make_timings() -> Callable[..., Path]:
    """`write_timings`, for tests."""
    return write_timings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three finished seeds of `eil`, three of `none`."""
    return write_run(tmp_path / "first", {"none": {0: 0.50, 1: 0.52, 2: 0.54}, "eil": {0: 0.51, 1: 0.55, 2: 0.56}})
