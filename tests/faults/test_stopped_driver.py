"""`raysseg train` that is killed, or asked to stop, and goes on with --resume."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES, changed
from faults.conftest import LONGEST, SMALL, Laboratory, played_in, wait_until

from raysseg.data.label_store import LabelStore

pytestmark = pytest.mark.slow


class Command:
    """`raysseg train` on a recipe with one variant, in processes of their own.

    Args:
        folder: for the recipe, the run and what the processes say.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        folder.mkdir()
        self.run_dir = folder / "run"
        self.variant = self.run_dir / "variants" / "run" / "seed-0"
        self._recipe, self._log = folder / "small.yaml", folder / "said.txt"
        dotted = {key.replace("__", "."): value for key, value in {**SMALL, **changes}.items()}
        self._recipe.write_text(yaml.safe_dump({**changed(VALUES, dotted), "seeds": [0], "variants": {"run": {}}}))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """Starts the command with a Ray of its own."""
        command = [sys.executable, "-m", "raysseg.cli.main", "train", str(self._recipe), "--run-dir", str(self.run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return self.process

    def said(self) -> str:
        """Returns what the last command has said."""
        return self._log.read_text()

    def finish(self) -> None:
        """Waits for the end of a command that must succeed."""
        assert self.process is not None
        assert self.process.wait(LONGEST) == 0, self.said()[-3000:]

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        """Returns the lines that are complete."""
        path = self.variant / f"{name}.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
            if path.exists()
            else []
        )

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Waits for something that the running command must reach."""
        process = self.process

        def look() -> bool:
            assert process is not None
            assert process.poll() is None, f"{what} has not happened: {self.said()[-3000:]}"
            return happened()

        wait_until(look, what)

    def updates(self) -> list[int]:
        """Returns the numbers of the updates after which exploring stood at the end of each iteration."""
        return [row["update"] for row in self.rows() if row["phase"] == "explore"]

    def explore_more(self, updates: int) -> None:
        """Waits until exploring is so many updates further."""
        before = max(self.updates(), default=0)
        self.wait_for(lambda: max(self.updates(), default=0) >= before + updates, "exploring")

    def kill_rest(self) -> None:
        """Ends what is still there."""
        if self.process is not None and self.process.poll() is None:
            family = descendants(self.process.pid)
            self.process.kill()
            self.process.wait()
            end(family)


def descendants(process: int) -> list[tuple[int, str]]:
    """Returns the processes below a process, each with the time of its start, which tells it from a later one of the same id."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = (int(fields[1]), fields[19])
    found, waiting = [], [process]
    while waiting:
        above = waiting.pop()
        below = [(child, started) for child, (parent, started) in parents.items() if parent == above]
        found += below
        waiting += [child for child, _ in below]
    return found


def is_there(process: int, started: str) -> bool:
    """Says whether a process lives; one that only waits for its parent to take notice does not."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[19] == started and fields[0] != "Z"
    return False


def end(family: list[tuple[int, str]]) -> None:
    """Kills those that are left."""
    for process, started in family:
        if is_there(process, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def actors_of(driver: int) -> list[int]:
    """Returns the processes of a driver's actors."""
    found = []
    for process, _ in descendants(driver):
        with contextlib.suppress(OSError):
            if b"ray::EILEnvRunner" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


@pytest.fixture
def make_command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Makes commands by name; what still runs at the end is killed."""
    made: list[Command] = []

    def make(name: str, **changes: Any) -> Command:
        made.append(Command(tmp_path / name, **changes))
        return made[-1]

    yield make
    for command in made:
        command.kill_rest()


def stages(variant: Path) -> list[dict[str, Any]]:
    """Returns the scores of a finished variant, without where its iterations were cut."""
    values: list[dict[str, Any]] = json.loads((variant / "summary.json").read_text())["stages"]
    return [{name: value for name, value in stage.items() if name != "iteration"} for stage in values]


def labels(variant: Path) -> dict[int, dict[str, list[Any]]]:
    """Returns the contents of every label version."""
    store = LabelStore(str(variant / "labels"))
    return {version: store.table(version).to_pydict() for version in store.versions()}


def stop(command: Command, number: signal.Signals) -> int:
    """Sends a signal in the middle of exploring and returns the iteration that the command says it stopped at."""
    assert command.process is not None
    command.process.send_signal(number)
    assert command.process.wait(LONGEST) == 128 + number, command.said()[-3000:]
    said = command.said()
    assert "Traceback" not in said
    sentence = said.splitlines()[-1]
    match = re.fullmatch(
        rf"Stopped by {number.name} at iteration (\d+) \(explore\); a checkpoint was written, continue with --resume.",
        sentence,
    )
    assert match, said[-3000:]
    newest = max(path.name for path in (command.variant / "checkpoints").glob("[0-9]*"))
    assert int(newest) == int(match[1]) == command.rows()[-1]["iteration"]
    return int(match[1])


def test_signals_leave_a_checkpoint_and_change_nothing(
    make_command: Callable[..., Command], make_laboratory: Callable[..., Laboratory], ray_session: None
) -> None:
    changes = {
        "eil__exploration__updates_per_stage": 30,
        "engine__updates_per_iteration": 3,
        "engine__checkpoint_interval": 1000,
    }
    undisturbed, disturbed = make_laboratory("undisturbed"), make_command("disturbed", **changes)
    undisturbed.run(**changes)
    stopped_at: int | None = None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        disturbed.start(resume=stopped_at is not None)
        disturbed.explore_more(4)
        stopped_at, before = stop(disturbed, number), stopped_at
        if before is not None:
            assert f"resumed at iteration {before} (explore)" in disturbed.said()
    disturbed.start(resume=True)
    disturbed.finish()
    assert f"resumed at iteration {stopped_at} (explore)" in disturbed.said()
    assert stages(disturbed.variant) == stages(undisturbed.folder)
    assert labels(disturbed.variant) == labels(undisturbed.folder)
    assert played_in(disturbed.variant) == list(range(30))
    assert disturbed.updates() == sorted(set(disturbed.updates()))


def test_the_second_signal_stops_at_once(make_command: Callable[..., Command]) -> None:
    command = make_command("long", training__pretrain_epochs=5000, engine__updates_per_iteration=10000)
    process = command.start()
    iterating = command.run_dir / "pretrain" / "seed-0" / "tensorboard"
    command.wait_for(iterating.exists, "the first iteration")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None, "an iteration is finished first, and this one takes minutes"
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONGEST) == 130
    said = command.said()
    assert said.splitlines()[-1] == "Interrupted; give the same command again, of train and tune with --resume."
    assert "Traceback" not in said


def test_a_killed_driver_goes_on_where_its_checkpoint_was(make_command: Callable[..., Command]) -> None:
    command = make_command(
        "ahead",
        engine__mode="asynchronous",
        engine__num_env_runners=2,
        engine__checkpoint_interval=1,
        engine__stall_seconds=1000.0,
        eil__exploration__updates_per_stage=40,
    )
    process = command.start()
    command.explore_more(4)
    os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    command.wait_for(lambda: command.rows("timings")[-1]["actor_deaths"] == 1, "the actor's death")
    command.explore_more(2)
    family = descendants(process.pid)
    assert len(family) > 3
    process.kill()
    assert process.wait(LONGEST) == -signal.SIGKILL
    wait_until(lambda: not any(is_there(*one) for one in family), "the end of the processes that the driver started")
    before, counted = command.rows(), command.rows("timings")[-1]

    command.start(resume=True)
    command.explore_more(4)
    resumed = re.search(r"resumed at iteration (\d+) \(explore\)", command.said())
    assert resumed
    assert len(before) - 1 <= int(resumed[1]) <= len(before), "at most one checkpoint interval is lost"
    stopped_at = stop(command, signal.SIGINT)
    assert stopped_at > int(resumed[1])

    command.start(resume=True)
    command.finish()
    assert f"resumed at iteration {stopped_at} (explore)" in command.said()
    assert command.rows()[: int(resumed[1])] == before[: int(resumed[1])]
    assert [row["iteration"] for row in command.rows()] == list(range(1, len(command.rows()) + 1))
    assert command.updates() == sorted(command.updates())
    assert max(command.updates()) == 40
    numbers = played_in(command.variant)
    assert numbers == list(range(len(numbers))), "every order is played once, whatever was under way"
    sizes = [row["replay_size"] for row in command.rows() if row["phase"] == "explore" and "replay_size" in row]
    assert sizes == sorted(sizes), "replay is in the checkpoint"
    last = command.rows("timings")[-1]
    assert last["actor_deaths"] == counted["actor_deaths"] == 1
    assert last["rollouts_lost"] == counted["rollouts_lost"] >= 1
    assert list(labels(command.variant)) == [1]
    assert command.rows()[-1]["phase"] == "evaluate"
