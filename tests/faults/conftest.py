"""Runs of seconds on real processes, and what it takes to disturb them at a known place and to see what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from algorithms.tiny_eil import settings_of

from raysseg.algorithms.eil.algorithm import EIL
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.env_runner import EILEnvRunner
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.core.progress import Silent
from raysseg.core.run import run_variant
from raysseg.core.seeding import draw_seeds
from raysseg.data import open_dataset
from raysseg.data.label_store import LabelStore

LONGEST = 400.0
"""Seconds after which something that must happen has not happened."""

SMALL: dict[str, Any] = {
    "training__pretrain_epochs": 0,
    "training__teacher_interval": "update",
    "eil__stages": 1,
    "eil__virtual_steps": 1,
    "eil__operators__searcher_bias": -1.0,
    "engine__num_cpus_per_env_runner": 0.5,
    "engine__num_cpus_per_learner": 0.5,
    "engine__updates_per_iteration": 1,
    "engine__write_rollouts": True,
}
"""What all runs of this folder have in common."""

Script = Generator[None, EIL, Any]
"""Is resumed after every iteration with the run, and disturbs it where it wants to."""


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Waits for something that must happen."""
    deadline = time.monotonic() + LONGEST
    while not happened():
        assert time.monotonic() < deadline, f"{what} has not happened"
        time.sleep(0.01)


def small_settings(**changes: Any) -> EILSettings:
    """Returns the settings of a run of seconds; `eil__window=5` replaces `eil.window`."""
    return settings_of(**{**SMALL, **changes})


class Notes(Silent):
    """Keeps the sentences that a run says."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def note(self, message: str) -> None:
        """Keeps one."""
        self.sentences.append(message)


class Laboratory:
    """One run, its watched actors and what it wrote.

    Args:
        folder: of the run, and beside it the files that hold actors.
        store_uri: the data.
    """

    def __init__(self, folder: Path, store_uri: str) -> None:
        self.folder = folder / "run"
        self.store_uri = store_uri
        self.notes = Notes()
        self._actors = folder / "actors"
        self._actors.mkdir(parents=True)

    def config(self, **changes: Any) -> EILConfig:
        """Returns the run's configuration with watched actors."""
        config = EILConfig().apply(small_settings(**changes), run_dir=str(self.folder), store_uri=self.store_uri)
        config.env_runners(env_runner_cls=watched(self._actors))
        return config

    def run(
        self,
        script: Script | None = None,
        *,
        resume: bool = False,
        look: Callable[[EIL], None] = lambda algorithm: None,
        **changes: Any,
    ) -> None:
        """Trains to the end.

        Args:
            script: disturbs it.
            resume: from its newest checkpoint.
            look: is called after every iteration.
            changes: of the settings.
        """
        if script is not None:
            next(script)

        def after_iteration(algorithm: EIL) -> None:
            look(algorithm)
            if script is not None:
                with contextlib.suppress(StopIteration):
                    script.send(algorithm)

        run_variant(
            self.config(**changes),
            self.folder,
            resume=resume,
            listener=self.notes,
            after_iteration=after_iteration,
        )

    # ---- the actors' side -------------------------------------------------------------------------------------------

    def log(self, event: str) -> list[dict[str, Any]]:
        """Returns what actors wrote down: `started`, `held`, or `sample` with the weights they acted with."""
        path = self._actors / "log.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["event"] == event]

    def hold(self, algorithm: EIL, actor: int, process: int) -> Script:
        """Lets an actor stop in its next rollout, and returns the number of its orders then; it may still get one more."""
        (self._actors / f"hold-{process}").touch()
        while not any(row["process"] == process for row in self.log("held")):
            algorithm = yield
        # Whatever it answered before has arrived after one more iteration.
        algorithm = yield
        return orders_with(algorithm, actor)

    def close_the_door(self) -> None:
        """Lets actors that start from now on wait before they are built."""
        (self._actors / "closed").touch()

    def open_the_door(self) -> None:
        """Lets them be built."""
        (self._actors / "closed").unlink()

    def die_once_in(self, *functions: str) -> None:
        """Lets some actor kill itself in the middle of each of these functions, once."""
        for function in functions:
            (self._actors / f"die-in-{function}").touch()

    def deaths_left(self) -> list[str]:
        """Returns the functions in which no actor has died yet."""
        return sorted(path.name for path in self._actors.glob("die-in-*"))

    # ---- what was written -------------------------------------------------------------------------------------------

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the deterministic numbers of every iteration."""
        return self._rows("metrics.jsonl")

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns what depends on the clock, of every iteration."""
        return self._rows("timings.jsonl")

    def labels(self) -> list[dict[str, list[Any]]]:
        """Returns the contents of every label version."""
        store = LabelStore(str(self.folder / "labels"))
        return [store.table(version).to_pydict() for version in store.versions()]

    def played(self) -> list[int]:
        """Returns the numbers of the rollouts that were learned from, ascending."""
        return played_in(self.folder)


def played_in(folder: Path, *, size: int = 4, most: int = 500) -> list[int]:
    """Returns the numbers of the rollouts that a run wrote down; the seeds of a rollout's episodes tell its number."""
    number_of = {int(draw_seeds(0, "explore-items", place, count=size)[0]): place for place in range(most)}
    numbers = []
    for path in (folder / "rollouts").glob("*.parquet"):
        seeds = pq.read_table(path).column("seed").to_numpy()
        numbers += [number_of[int(seed)] for seed in seeds[::size]]
    return sorted(numbers)


def watched(folder: Path) -> type[EILEnvRunner]:
    """Returns a class of actors that write down what they do and wait or die where a file asks for it.

    An actor cannot import this file, so everything travels with the class.
    """
    place, operators = str(folder), OPERATORS

    class WatchedRunner(EILEnvRunner):
        def __init__(self, **kwargs: Any) -> None:
            self._wait_while("closed")
            super().__init__(**kwargs)
            self._write({"event": "started"})

        def _wait_while(self, name: str) -> None:
            while os.path.exists(f"{place}/{name}"):
                time.sleep(0.01)

        def _write(self, row: dict[str, Any]) -> None:
            with open(f"{place}/log.jsonl", "a") as file:
                file.write(json.dumps({**row, "process": os.getpid(), "seconds": time.time()}) + "\n")

        def _die_if_asked(self, function: str) -> None:
            try:
                os.unlink(f"{place}/die-in-{function}")
            except FileNotFoundError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        def sample(self, *, records: Any, context: dict[str, Any]) -> Any:
            searcher = self.module[operators].searcher
            weights = sum(float(value.detach().double().abs().sum()) for value in searcher.parameters())
            self._write({"event": "sample", "version": context["policy_version"], "weights": weights})
            if os.path.exists(f"{place}/hold-{os.getpid()}"):
                self._write({"event": "held"})
                self._wait_while(f"hold-{os.getpid()}")
            result = super().sample(records=records, context=context)
            self._die_if_asked("sample")
            return result

        def infer(self, **arguments: Any) -> Any:
            self._die_if_asked("infer")
            return super().infer(**arguments)

        def evaluate(self, **arguments: Any) -> Any:
            self._die_if_asked("evaluate")
            return super().evaluate(**arguments)

    return WatchedRunner


def processes(algorithm: EIL) -> dict[int, int]:
    """Returns actor number to process id; every actor answers after the orders that are with it."""
    handles = algorithm.env_runner_group._worker_manager.actors()
    numbers = list(handles)
    return dict(
        zip(numbers, ray.get([handles[n].apply.remote(lambda runner: os.getpid()) for n in numbers]), strict=True)
    )


def orders_with(algorithm: EIL, actor: int) -> int:
    """Returns the number of orders that an actor has not answered."""
    assert algorithm.pool is not None
    return sum(sent.actor == actor for sent in algorithm.pool._sent.values())


def learner_weights(algorithm: EIL) -> float:
    """Returns what actors write down about the searcher, of the learner in this process."""
    searcher = algorithm.learner_group._learner.module[OPERATORS].unwrapped().searcher
    with torch.no_grad():
        return sum(float(value.detach().double().abs().sum()) for value in searcher.parameters())


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight training and four validation scenes."""
    return open_dataset(small_settings().data, tmp_path_factory.mktemp("data")).uri


@pytest.fixture
def make_laboratory(tmp_path: Path, store_uri: str) -> Iterator[Callable[[str], Laboratory]]:
    """Makes laboratories by name; actors that still wait are let go at the end."""
    made: list[Path] = []

    def make(name: str = "disturbed", *, store_uri: str = store_uri) -> Laboratory:
        made.append(tmp_path / name)
        return Laboratory(tmp_path / name, store_uri)

    yield make
    for folder in made:
        for path in (folder / "actors").iterdir():
            if not path.name.endswith(".jsonl"):
                path.unlink()
