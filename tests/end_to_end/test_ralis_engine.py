"""RALIS over processes: a remote actor and learner give the serial numbers, two actors play ahead, each episode once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from algorithms.tiny_ralis import VALUES, changed
from end_to_end.conftest import label_tables, metrics, summary, variant

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.algorithms.recipes import load_recipe, train_recipe
from raysseg.core.seeding import draw_seeds

Train = Callable[..., Path]
STEPS = 3


@pytest.fixture
def train(tmp_path: Path, ray_session: None) -> Train:
    """Trains the small recipe and returns the run directory; `ralis__policy="uniform"` changes `ralis.policy`."""

    def run(run_dir: Path, **changes: Any) -> Path:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        base = {"engine.num_cpus_per_env_runner": 0.5, "engine.stall_seconds": 300.0}
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**changed(VALUES, {**base, **dotted}), "seeds": [0], "variants": {"run": {}}}))
        train_recipe(load_recipe(str(path)), run_dir)
        return run_dir

    return run


def regions(run: Path) -> list[dict[str, Any]]:
    """Returns the labelled regions of the variant."""
    return [json.loads(line) for line in (variant(run) / "regions.jsonl").read_text().splitlines()]


def test_a_remote_actor_and_a_remote_learner_give_the_serial_numbers(train: Train, tmp_path: Path) -> None:
    serial = train(tmp_path / "serial")
    remote = train(tmp_path / "remote", engine__num_env_runners=1, engine__num_learners=1)
    for expected, row in zip(metrics(serial), metrics(remote), strict=True):
        assert row == expected
    assert regions(remote) == regions(serial)
    assert label_tables(remote) == label_tables(serial)
    assert summary(remote) == summary(serial)


def test_a_finished_variant_is_an_environment_and_starts_as_its_episodes_did(train: Train, tmp_path: Path) -> None:
    run = train(tmp_path / "run", engine__write_rollouts=True)
    path = min((variant(run) / "rollouts").glob("*.parquet"))
    first = pq.read_table(path).slice(0, 1).to_pylist()[0]
    env = gymnasium.make("raysseg/RALIS-v0", run=str(variant(run)))
    seed = int(draw_seeds(0, "play", 0, count=1)[0])
    observation, _ = env.reset(options={"rows": np.zeros(1, np.int64), "seeds": np.array([seed])})
    assert observation["state"].astype(np.float16).tobytes() == first["state"]
    assert observation["candidates"].astype(np.float16).tobytes() == first["candidates"]
    _, reward, terminated, truncated, info = env.step(np.array(first["chosen"]))
    assert reward == pytest.approx(first["reward"], abs=1e-5)
    assert info["miou"] == pytest.approx(first["miou"], abs=1e-6)
    assert not terminated
    assert not truncated


def test_two_actors_in_turn_play_all_episodes_and_learn_from_each(train: Train, tmp_path: Path) -> None:
    run = train(
        tmp_path / "two", engine__num_env_runners=2, ralis__learning__episodes=4, engine__updates_per_iteration=1
    )
    rows = [row for row in metrics(run) if row["phase"] == "play"]
    assert [row["update"] for row in rows] == [1, 2], "an update for every two episodes, twice as many minibatches"
    assert [row["episodes"] for row in rows] == [2, 2]
    assert [row["replay_size"] for row in rows] == [2 * STEPS * 3, 4 * STEPS * 3]


@pytest.mark.parametrize("learners", [0, 1])
def test_two_actors_play_ahead_and_every_episode_is_played_once(train: Train, tmp_path: Path, learners: int) -> None:
    run = train(
        tmp_path / "run",
        engine__mode="asynchronous",
        engine__num_env_runners=2,
        engine__num_learners=learners,
        engine__write_rollouts=True,
        ralis__learning__episodes=8,
        ralis__learning__replay__capacity=200,
    )
    rows = [row for row in metrics(run) if row["phase"] == "play"]
    assert rows[-1]["update"] == 8
    assert all(np.isfinite(row["q_loss"]) for row in rows)
    tables = [pq.read_table(path) for path in sorted((variant(run) / "rollouts").glob("*.parquet"))]
    episodes = np.concatenate([table.column("episode").to_numpy() for table in tables])
    counts = np.bincount(episodes)
    assert set(counts[counts > 0]) == {STEPS}, "no episode is played twice"
    assert (counts > 0).sum() == 8, "how many are played is part of the method"
    versions = np.concatenate([table.column("policy_version").to_numpy() for table in tables])
    assert len(np.unique(versions)) > 1, "actors pulled weights again"
    for episode in np.unique(episodes):
        assert len(np.unique(versions[episodes == episode])) == 1, "the policy rests within an episode"
    assert summary(run)["budget"] == 12
