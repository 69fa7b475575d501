"""An actor of RALIS that dies in the middle of an episode costs that episode, which is played again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from algorithms.tiny_ralis import settings_of

from raysseg.algorithms.ralis.config import RALISConfig
from raysseg.algorithms.ralis.env_runner import RALISEnvRunner
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.progress import Silent
from raysseg.core.run import run_variant
from raysseg.data import open_dataset

pytestmark = pytest.mark.slow

EPISODES, STEPS = 4, 3
CHANGES: dict[str, Any] = {
    "ralis__learning__episodes": EPISODES,
    "engine__num_cpus_per_env_runner": 0.5,
    "engine__updates_per_iteration": 1,
    "engine__write_rollouts": True,
    "engine__stall_seconds": 300.0,
}


def watched(folder: Path) -> type[RALISEnvRunner]:
    """Returns a class of actors that write down every step they play; the first to reach a second step of D_T dies there.

    An actor cannot import this file, so everything travels with the class.
    """
    place = str(folder)

    class WatchedRunner(RALISEnvRunner):
        def _play(self, policy: str, epsilon: float) -> Any:
            game, step = self.episode.game, self.episode.step
            assert game is not None
            with open(f"{place}/steps.jsonl", "a") as file:
                file.write(json.dumps({"game": game.name, "seed": game.seed, "step": step, "by": os.getpid()}) + "\n")
            if step == 1 and game.name == "ralis.learning.budget":
                try:
                    os.unlink(f"{place}/die")
                except FileNotFoundError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super()._play(policy, epsilon)

    return WatchedRunner


@pytest.fixture
def train(tmp_path: Path, ray_session: None) -> Callable[..., Path]:
    """Trains a variant with watched actors, and returns its folder."""
    uri = open_dataset(settings_of(**CHANGES).data, str(tmp_path / "data")).uri

    def run(name: str, *, dies: bool, **changes: Any) -> Path:
        folder, notes = tmp_path / name, tmp_path / f"{name}-actors"
        notes.mkdir()
        if dies:
            (notes / "die").touch()
        config = RALISConfig().apply(settings_of(**{**CHANGES, **changes}), run_dir=str(folder), store_uri=uri)
        config.env_runners(env_runner_cls=watched(notes))
        run_variant(config, folder, listener=Silent())
        assert not (notes / "die").exists()
        return folder

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns what a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_death_in_the_middle_of_an_episode_costs_that_episode_alone(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # One process that does the orders of two actors, one after the other.
        patch.setattr(SegmentationAlgorithm, "num_actors", property(lambda algorithm: 2))
        undisturbed = train("undisturbed", dies=False)
    disturbed = train("disturbed", dies=True, engine__num_env_runners=2)

    assert lines(disturbed / "metrics.jsonl") == lines(undisturbed / "metrics.jsonl")
    assert (disturbed / "regions.jsonl").read_text() == (undisturbed / "regions.jsonl").read_text()
    steps = {name: lines(disturbed.parent / f"{name}-actors" / "steps.jsonl") for name in ("undisturbed", "disturbed")}
    assert len(steps["undisturbed"]) == EPISODES * STEPS + 4
    (lost,) = [row for row in steps["disturbed"] if row["step"] == 1 and is_lost(row, steps["disturbed"])]
    again = [row for row in steps["disturbed"] if row["seed"] == lost["seed"] and row["by"] != lost["by"]]
    assert [row["step"] for row in again] == list(range(STEPS)), "that episode was played from its beginning"
    assert len(steps["disturbed"]) == len(steps["undisturbed"]) + 2, "and nothing else was played twice"
    last = lines(disturbed / "timings.jsonl")[-1]
    assert last["actor_deaths"] == 1
    assert last["rollouts_lost"] == 1
    tables = [pq.read_table(path) for path in (disturbed / "rollouts").glob("*.parquet")]
    assert sorted(row["episode"] for table in tables for row in table.to_pylist()) == sorted(
        list(range(EPISODES)) * STEPS
    )


def is_lost(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Says whether the process that began this step never did another."""
    return [one for one in rows if one["by"] == row["by"]][-1] == row
