"""CiSS-Net under faults: a dead actor costs its rollout, which is played again; a killed driver resumes where it was."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from algorithms.tiny_cissnet import STEPS, VALUES, changed, settings_of
from commands import start

from raysseg.algorithms.cissnet.config import CiSSNetConfig
from raysseg.algorithms.cissnet.env_runner import CiSSNetEnvRunner
from raysseg.core.progress import Silent
from raysseg.core.run import run_variant
from raysseg.data import open_dataset

pytestmark = pytest.mark.slow

LONGEST = 600.0
CHANGES: dict[str, Any] = {
    "engine__num_cpus_per_env_runner": 0.5,
    "engine__write_rollouts": True,
    "engine__stall_seconds": 300.0,
}


def watched(folder: Path) -> type[CiSSNetEnvRunner]:
    """Returns a class of actors that write down every step they play; the first to reach a second one of its second rollout dies.

    An actor cannot import this file, so everything travels with the class.
    """
    place = str(folder)

    class WatchedRunner(CiSSNetEnvRunner):
        def sample(self, *, records: Any, context: dict[str, Any]) -> Any:
            seeds, step, advance = records.column("seed").to_pylist(), self.env.advance, [0]

            def watch(actions: Any) -> Any:
                with open(f"{place}/steps.jsonl", "a") as file:
                    row = {"seeds": seeds, "step": advance[0], "version": context["policy_version"], "by": os.getpid()}
                    file.write(json.dumps(row) + "\n")
                if advance[0] == 1 and context["policy_version"] == 1:
                    try:
                        os.unlink(f"{place}/die")
                    except FileNotFoundError:
                        pass
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)
                advance[0] += 1
                return step(actions)

            self.env.advance = watch
            try:
                return super().sample(records=records, context=context)
            finally:
                self.env.advance = step

    return WatchedRunner


@pytest.fixture
def train(tmp_path: Path, ray_session: None) -> Callable[..., Path]:
    """Trains a variant with watched actors, and returns its folder."""
    uri = open_dataset(settings_of().data, str(tmp_path / "data")).uri

    def run(name: str, *, dies: bool, **changes: Any) -> Path:
        folder, notes = tmp_path / name, tmp_path / f"{name}-actors"
        notes.mkdir()
        if dies:
            (notes / "die").touch()
        settings = settings_of(**{**CHANGES, "engine__num_env_runners": 2, **changes})
        config = CiSSNetConfig().apply(settings, run_dir=str(folder), store_uri=uri)
        config.env_runners(env_runner_cls=watched(notes))
        run_variant(config, folder, listener=Silent())
        assert not (notes / "die").exists()
        return folder

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns what a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def episodes(folder: Path) -> list[dict[str, Any]]:
    """Returns what was learned from, in order."""
    return [row for path in sorted((folder / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_death_in_the_middle_of_an_episode_costs_that_rollout_alone(train: Callable[..., Path]) -> None:
    undisturbed = train("undisturbed", dies=False)
    disturbed = train("disturbed", dies=True)
    assert (disturbed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert episodes(disturbed) == episodes(undisturbed)
    steps = {name: lines(disturbed.parent / f"{name}-actors" / "steps.jsonl") for name in ("undisturbed", "disturbed")}
    assert len(steps["undisturbed"]) == 4 * 2 * STEPS
    assert len(steps["disturbed"]) == 4 * 2 * STEPS + 2, "two steps were lost and nothing else was played twice"
    (lost,) = [row for row in steps["disturbed"] if row["step"] == 1 and is_last(row, steps["disturbed"])]
    again = [row["step"] for row in steps["disturbed"] if row["seeds"] == lost["seeds"] and row["by"] != lost["by"]]
    assert again == list(range(STEPS)), "that episode was played from its beginning"
    last = lines(disturbed / "timings.jsonl")[-1]
    assert (last["actor_deaths"], last["rollouts_lost"]) == (1, 1)


def is_last(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Says whether the process that began this step never did another."""
    return [one for one in rows if one["by"] == row["by"]][-1] == row


def test_an_asynchronous_run_ends_with_all_of_its_updates_though_an_actor_dies(train: Callable[..., Path]) -> None:
    folder = train("ahead", dies=True, engine__mode="asynchronous", cissnet__learning__updates=8)
    rows = [row for row in lines(folder / "metrics.jsonl") if row["phase"] == "learn"]
    assert [row["update"] for row in rows] == list(range(1, 9))
    crops = [(row["row"], row["seed"]) for row in episodes(folder)]
    assert len(crops) == len(set(crops)) == 8 * 4
    steps = lines(folder.parent / "ahead-actors" / "steps.jsonl")
    (lost,) = [row for row in steps if row["version"] == 1 and row["step"] == 1 and is_last(row, steps)][:1]
    assert {(row["seeds"] == lost["seeds"]) for row in steps if row["by"] != lost["by"]} == {True, False}
    last = lines(folder / "timings.jsonl")[-1]
    assert last["actor_deaths"] == 1
    assert last["rollouts_lost"] >= 1


# ---- the driver -----------------------------------------------------------------------------------------------------


def finish(process: Any, run_dir: Path) -> None:
    """Waits for the end of a command that must succeed."""
    assert process.wait(LONGEST) == 0, run_dir.with_suffix(".log").read_text()[-3000:]


def kill_in(process: Any, run_dir: Path, folder: Path, phase: str, after: int) -> None:
    """Kills the driver as soon as a phase has written more rows than `after`."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + LONGEST
    while not path.exists() or path.read_text().count(f'"phase": "{phase}"') <= after:
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{phase} has not come"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def write_recipe(path: Path, **changes: Any) -> Path:
    """Writes the small recipe with one variant, a checkpoint after every second update."""
    dotted = {"engine.checkpoint_interval": 2, "engine.write_rollouts": True, "cissnet.learning.updates": 20}
    dotted |= {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(yaml.safe_dump({**changed(VALUES, dotted), "seeds": [0], "variants": {"run": {}}}))
    return path


def test_a_killed_driver_resumes_to_the_same_metrics(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.yaml")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start("train", recipe, undisturbed), undisturbed)
    folders = [run / "variants" / "run" / "seed-0" for run in (undisturbed, killed)]
    for number, after in enumerate((4, 11)):
        process = start("train", recipe, killed, *(["--resume"] if number else []))
        kill_in(process, killed, folders[1], "learn", after)
        assert not (folders[1] / "summary.json").exists(), "the run was over before it was killed"
    finish(start("train", recipe, killed, "--resume"), killed)
    assert (folders[1] / "metrics.jsonl").read_bytes() == (folders[0] / "metrics.jsonl").read_bytes()
    assert episodes(folders[1]) == episodes(folders[0])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for one in summaries:
        del one["wall_seconds"]
    assert summaries[1] == summaries[0]


def test_an_asynchronous_run_whose_driver_is_killed_does_every_update_once(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path / "small.yaml"), tmp_path / "run"
    engine = {"engine__mode": "asynchronous", "engine__num_env_runners": 2, "engine__num_cpus_per_env_runner": 0.5}
    write_recipe(recipe, engine__rollouts_per_update=2.0, engine__rollouts_ahead=3, **engine)
    folder = run / "variants" / "run" / "seed-0"
    kill_in(start("train", recipe, run), run, folder, "learn", 4)
    finish(start("train", recipe, run, "--resume"), run)
    rows = [row for row in lines(folder / "metrics.jsonl") if row["phase"] == "learn"]
    assert [row["update"] for row in rows] == list(range(1, 21))
    crops = [(row["row"], row["seed"]) for row in episodes(folder)]
    assert len(crops) == len(set(crops)) == 20 * 4, "what was fresh at the checkpoint is learned from once"
