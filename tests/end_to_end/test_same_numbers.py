"""One seed gives one result: twice in this process, and on remote actors with a remote learner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from algorithms.tiny_eil import build, settings_of
from end_to_end.conftest import label_tables, metrics, summary, variant
from safetensors.torch import load_file

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.core.modules import SEGMENTER
from raysseg.data import open_dataset
from raysseg.errors import InputError

Train = Callable[..., Path]


def test_the_same_seed_gives_the_same_run_and_another_does_not(train: Train, tmp_path: Path) -> None:
    first, second = train(tmp_path / "first"), train(tmp_path / "second")
    assert metrics(first) == metrics(second)
    assert len(metrics(first)) > 10
    assert label_tables(first) == label_tables(second)
    assert summary(first) == summary(second)
    one, two = (load_file(variant(run) / "segmenter" / "online.safetensors") for run in (first, second))
    assert all(torch.equal(two[name], value) for name, value in one.items())
    other = train(tmp_path / "other", data__synthetic__seed=1)
    assert metrics(other) != metrics(first)


def test_a_remote_actor_and_a_remote_learner_give_the_serial_numbers(train: Train, tmp_path: Path) -> None:
    serial = train(tmp_path / "serial")
    remote = train(tmp_path / "remote", engine__num_env_runners=1, engine__num_learners=1)
    for expected, row in zip(metrics(serial), metrics(remote), strict=True):
        assert row == expected
    assert label_tables(remote) == label_tables(serial)


def test_self_training_gives_the_serial_numbers_on_a_remote_learner(train: Train, tmp_path: Path) -> None:
    view = {"brightness": 0.4, "contrast": 0.4, "blur": 1.0, "cutout": 0.25}
    self_training = {"weight": 1.0, "classes": "labelled", "student_view": view}
    changes = {"eil__policy": "fixed", "training__self_training": self_training, "training__pretrain_epochs": 1}
    serial = train(tmp_path / "serial", **changes)
    remote = train(tmp_path / "remote", engine__num_env_runners=1, engine__num_learners=1, **changes)
    assert any("self_training_loss" in row for row in metrics(serial))
    assert metrics(remote) == metrics(serial)
    assert label_tables(remote) == label_tables(serial)


def test_two_actors_infer_what_one_process_infers(train: Train, tmp_path: Path) -> None:
    changes = {"eil__policy": "fixed", "eil__thresholds": 0.6, "eil__window": 9}
    serial = train(tmp_path / "serial", **changes)
    two = train(tmp_path / "two", engine__num_env_runners=2, **changes)
    assert label_tables(two) == label_tables(serial)
    assert summary(two) == summary(serial)


def test_two_actors_explore_twice_as_much(train: Train, tmp_path: Path) -> None:
    two = train(tmp_path / "two", engine__num_env_runners=2)
    rows = [row for row in metrics(two) if row["phase"] == "explore"]
    assert [row["replay_size"] for row in rows] == [16, 16]
    assert all(np.isfinite(row["assessor_loss"]) for row in rows)


def test_a_finished_run_is_kept_and_not_run_over(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run")
    before = metrics(done)
    with pytest.raises(InputError, match="not empty; add --resume"):
        train(tmp_path / "run")
    assert metrics(done) == before


def test_a_finished_variant_is_an_environment(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run", eil__policy="fixed")
    env = gymnasium.make("raysseg/EIL-v0", run=str(variant(done)), window=5)
    observation, _ = env.reset(seed=0)
    rewards = []
    for threshold in (0.3, 0.3):
        observation, reward, terminated, truncated, _ = env.step(np.full(2, threshold, np.float32))
        rewards.append(reward)
    assert np.isfinite(observation).all()
    assert any(rewards)
    assert terminated
    assert not truncated


def test_an_order_brings_the_newest_weights_and_only_what_is_new(tmp_path: Path, ray_session: None) -> None:
    def fill(learner: Any) -> None:
        with torch.no_grad():
            learner.module[SEGMENTER].unwrapped().online.decoder.head.bias.add_(1000.0)

    # Functions of the test itself: an actor cannot import this file.
    def bias(runner: Any) -> float:
        return float(runner.segmenter.online.decoder.head.bias.mean())

    store_uri = open_dataset(settings_of().data, tmp_path / "data").uri
    algorithm = build(settings_of(engine__num_env_runners=1), tmp_path / "run", store_uri)
    try:
        for _ in range(2):
            algorithm.learner_group.foreach_learner(fill)
            algorithm.segmenter_version += 1
            algorithm.publish(SEGMENTER)
        newest = algorithm.weights[SEGMENTER]
        algorithm.publish(SEGMENTER)
        assert algorithm.weights[SEGMENTER] is newest, "what is published already stays"
        algorithm.map_runners("count_labels", [{"rows": np.arange(2), "version": 0}])
        group = algorithm.env_runner_group
        assert group.foreach_env_runner(bias, local_env_runner=False) == [pytest.approx(2000, abs=10)]
    finally:
        algorithm.stop()
