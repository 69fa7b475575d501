"""Self-training acts in EIL's refining, whatever the policy; pre-training does not know of it, and resuming changes no bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithms.base import weights_of
from algorithms.tiny_eil import build, play, settings_of

from raysseg.algorithms.recipes import load_recipe
from raysseg.core import checkpoint

Train = Callable[..., tuple[Any, list[dict[str, Any]]]]
VIEW = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "blur": 1.0, "cutout": 0.25}
ON = {"weight": 1.0, "student_view": VIEW}
NUMBERS = {"self_training_loss", "self_training_share"}


@pytest.mark.parametrize("policy", ["none", "fixed", "full"])
def test_refining_uses_it_whatever_the_policy(trained: Train, policy: str) -> None:
    whole = {"scale": [1.0, 1.0], "rotation": 0.0, "crop": None}
    changes = {"training__augmentation": whole, "training__self_training": ON}
    _, records = trained(eil__policy=policy, eil__thresholds=0.6, **changes)
    for record in records:
        assert (set(record) & NUMBERS) == (NUMBERS if record["phase"] == "refine" else set()), record
    shares = [record["self_training_share"] for record in records if record["phase"] == "refine"]
    for share, stage in zip(shares, (1, 2), strict=True):
        labelled = next(r["labelled_share"] for r in records if r["phase"] == "evaluate" and r["stage"] == stage)
        assert share == pytest.approx(1 - labelled), "what has no label learns from the teacher"


def test_soft_labels_are_the_inferred_ones(trained: Train) -> None:
    whole = {"scale": [1.0, 1.0], "rotation": 0.0, "crop": None}
    changes = {"training__augmentation": whole, "training__self_training": {**ON, "pixels": "inferred"}}
    _, records = trained(eil__policy="fixed", eil__thresholds=0.6, **changes)
    drawn = next(record["labelled_share"] for record in records if record["phase"] == "evaluate")
    shares = [record["self_training_share"] for record in records if record["phase"] == "refine"]
    labelled = [r["labelled_share"] for r in records if r["phase"] == "evaluate" and r["stage"] > 0]
    assert shares == pytest.approx([share - drawn for share in labelled])
    assert 0 < shares[0] < shares[1]


def test_inferred_labels_with_a_mean_of_their_own_train_another_network(trained: Train) -> None:
    found = [
        trained(eil__policy="fixed", eil__thresholds=0.6, **more)[1]
        for more in ({}, {"training__inferred_weight": 1.0})
    ]
    before, after = ([record["loss"] for record in records if record["phase"] == "pretrain"] for records in found)
    assert before == after, "in pre-training nothing is inferred"
    one, other = ([record["loss"] for record in records if record["phase"] == "refine"] for records in found)
    assert one != other


def test_pretraining_does_not_know_of_it_and_a_run_resumes_bit_by_bit(
    tmp_path: Path, store_uri: str, ray_session: None
) -> None:
    changes = {"eil__policy": "none", "engine__updates_per_iteration": 1}
    found: dict[str, list[dict[str, Any]]] = {}
    plain = build(settings_of(**changes), tmp_path / "plain", store_uri)
    found["plain"] = [copy.deepcopy(record) for record in play(plain)]
    plain.stop()
    settings = settings_of(**changes, training__self_training=ON)
    algorithm, folder = build(settings, tmp_path / "on", store_uri), tmp_path / "checkpoints"
    found["on"] = []
    while not algorithm.done:
        algorithm.train()
        found["on"].append(copy.deepcopy(algorithm.record))
        if algorithm.iteration == 4:
            checkpoint.save(algorithm, folder, keep=1)
    expected = weights_of(algorithm)
    algorithm.stop()

    rows = [(record["phase"], record["stage"], record.get("loss")) for record in found["on"]]
    other = [(record["phase"], record["stage"], record.get("loss")) for record in found["plain"]]
    assert [row[:2] for row in rows] == [row[:2] for row in other]
    assert [row[0] for row in rows[:4]] == ["pretrain", "pretrain", "evaluate", "refine"]
    assert rows[:3] == other[:3], "pre-training is the same"
    assert rows[3] != other[3]

    resumed = build(settings, tmp_path / "on", store_uri)
    checkpoint.restore(resumed, folder / f"{4:08d}")
    assert resumed.position.step == 1, "inside refining"
    while not resumed.done:
        resumed.train()
        assert resumed.record == found["on"][resumed.iteration - 1]
    after = weights_of(resumed)
    resumed.stop()
    assert all(torch.equal(after[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("name", "saturation"), [("eil-acdc", 0.0), ("eil-camvid", 0.4)])
def test_recipes_have_it_with_and_without_constant_thresholds(name: str, saturation: float) -> None:
    recipe = load_recipe(name)
    assert recipe.pretraining(0).training.self_training.weight == 0
    options = []
    for variant, policy in (("self-training", "none"), ("fixed-0.9-image+self-training", "fixed")):
        settings: Any = recipe.settings(variant, 0)
        assert settings.eil.policy == policy
        options.append(settings.training.self_training)
    assert settings.eil.model_dump() == recipe.settings("fixed-0.9-image", 0).model_dump()["eil"]
    assert options[0] == options[1]
    assert (options[0].weight, options[0].confidence) == (1.0, 0.0)
    assert options[0].student_view.model_dump() == {
        "brightness": 0.4, "contrast": 0.4, "saturation": saturation,
        "blur": 1.0, "blur_share": 0.5, "cutout": 0.25, "cutout_share": 0.5,
    }  # fmt: skip
