"""A checkpoint is complete or not there, whenever the process is killed; a damaged one is passed over in one sentence."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.test_replay import batch

from raysseg.core import checkpoint
from raysseg.core.replay import ReplayBuffer
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError


class Writer:
    """Stands for an algorithm: writes two files, or fails between them, and has a replay buffer where one is given."""

    def __init__(self, iteration: int = 0, *, fails: OSError | None = None, replay: ReplayBuffer | None = None) -> None:
        self.iteration = iteration
        self.fails = fails
        self.replay = replay

    def save_to_path(self, path: str) -> None:
        folder = Path(path) / "learner"
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(256)) * self.iteration)
        if self.fails is not None:
            raise self.fails
        (folder.parent / "state.json").write_text(f'{{"iteration": {self.iteration}}}')

    def restore_from_path(self, path: str) -> None:
        self.iteration = json.loads((Path(path) / "state.json").read_text())["iteration"]

    def replay_buffers(self) -> dict[str, ReplayBuffer]:
        return {} if self.replay is None else {"operators": self.replay}

    def restore_replay(self, states: dict[str, dict[str, Any]], folder: Path) -> None:
        for name, buffer in self.replay_buffers().items():
            buffer.load(folder / name, states[name])


def write(writer: Any, folder: Path, *, keep: int = 2) -> Path:
    return checkpoint.save(writer, folder, keep=keep)


def save(iteration: int, folder: Path, *, keep: int = 2, fails: OSError | None = None) -> Path:
    return write(Writer(iteration, fails=fails), folder, keep=keep)


def grown(iteration: int, *, capacity: int = 12) -> Writer:
    """Returns what a run holds after some iterations of four transitions each."""
    writer = Writer(iteration, replay=ReplayBuffer(ReplaySettings(capacity=capacity, priority_exponent=0.5)))
    for number in range(iteration):
        advance(writer, number)
    return writer


def advance(writer: Writer, number: int) -> None:
    assert writer.replay is not None
    writer.replay.add(batch(4 * number, 4))
    writer.replay.update_priorities(np.array([4 * number]), np.array([number + 1.0]))


def restored(found: Path, *, capacity: int = 12) -> Writer:
    writer: Any = Writer(replay=ReplayBuffer(ReplaySettings(capacity=capacity, priority_exponent=0.5)))
    checkpoint.restore(writer, found)
    return writer


def assert_as_grown(found: Path, iteration: int) -> None:
    """The checkpoint holds exactly what a run had after that many iterations."""
    writer, expected = restored(found), grown(iteration)
    assert writer.iteration == iteration
    assert writer.replay is not None
    assert expected.replay is not None
    assert len(writer.replay) == len(expected.replay)
    if len(expected.replay):
        for seed in range(3):
            draws = [one.sample(5, np.random.default_rng(seed)) for one in (writer.replay, expected.replay)]
            assert draws[0].equals(draws[1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing and finding --------------------------------------------------------------------------------------------


def test_the_newest_is_found_and_verifies(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None
    save(9, tmp_path)
    written = save(10, tmp_path)
    assert checkpoint.newest(tmp_path) == written
    checkpoint.verify(written)
    assert (written / "state.json").read_text() == '{"iteration": 10}'


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 10, 11):
        save(iteration, tmp_path, keep=2)
    assert names(tmp_path) == ["00000010", "00000011"]


def test_an_interrupted_write_leaves_the_one_before(tmp_path: Path) -> None:
    good = save(1, tmp_path)
    with pytest.raises(OSError, match="unplugged"):
        save(2, tmp_path, fails=OSError("unplugged"))
    assert checkpoint.newest(tmp_path) == good
    again = save(2, tmp_path)
    checkpoint.verify(again)
    assert checkpoint.newest(tmp_path) == again


def test_a_checkpoint_without_manifest_does_not_count(tmp_path: Path) -> None:
    good = save(1, tmp_path)
    (save(2, tmp_path) / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) == good


def test_the_same_iteration_may_be_written_again(tmp_path: Path) -> None:
    save(2, tmp_path)
    (save(3, tmp_path) / "learner" / "weights.bin").write_bytes(b"old")
    for _ in range(12):
        again = save(3, tmp_path)
    checkpoint.verify(again)
    assert checkpoint.newest(tmp_path) == again
    assert len(names(tmp_path)) == 2
    assert (again / "learner" / "weights.bin").read_bytes() != b"old"
    save(4, tmp_path)
    assert names(tmp_path) == [again.name, "00000004"]


def test_a_run_that_goes_on_from_an_earlier_one_removes_what_is_later(tmp_path: Path) -> None:
    for iteration in (5, 6, 7):
        save(iteration, tmp_path, keep=3)
    (tmp_path / "00000007" / "state.json").write_text("torn")
    save(6, tmp_path, keep=3)
    assert names(tmp_path) == ["00000005", "00000006-1"]


# ---- replay buffers -------------------------------------------------------------------------------------------------


def test_replay_comes_back_and_is_written_once(tmp_path: Path) -> None:
    writer, before = grown(0, capacity=100), dict[str, int]()
    for iteration in range(1, 6):
        advance(writer, iteration - 1)
        writer.iteration = iteration
        found = write(writer, tmp_path)
        segments = sorted((tmp_path / "replay" / "operators").glob("*.arrow"))
        assert len(segments) == iteration
        written = {path.name: path.stat().st_ino for path in segments}
        assert before.items() < written.items()
        before = written
    assert len(list((tmp_path / "replay" / "operators").glob("*.npy"))) == 2, "one for each checkpoint that is kept"
    back = restored(found, capacity=100)
    assert back.replay is not None
    assert writer.replay is not None
    draws = [one.sample(400, np.random.default_rng(0)) for one in (back.replay, writer.replay)]
    assert draws[0].equals(draws[1])
    assert set(draws[0].column("row").to_pylist()) == set(range(20))


def test_segments_go_when_no_checkpoint_names_them(tmp_path: Path) -> None:
    writer = grown(0, capacity=8)
    for iteration in range(1, 7):
        advance(writer, iteration - 1)
        writer.iteration = iteration
        write(writer, tmp_path, keep=2)
        segments = names(tmp_path / "replay" / "operators")
        assert len([name for name in segments if name.endswith(".arrow")]) == min(iteration, 3)
    for found in (tmp_path / "00000005", tmp_path / "00000006"):
        checkpoint.verify(found)


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("victim", ["weights.bin", "replay.json", "manifest.json", "*.arrow", "*.npy"])
def test_damage_is_one_sentence_and_the_one_before_is_found(tmp_path: Path, damage: str, victim: str) -> None:
    writer = grown(2)
    good = write(writer, tmp_path)
    shared = set(tmp_path.rglob("*"))
    advance(writer, 2)
    writer.iteration = 3
    bad = write(writer, tmp_path)
    (path,) = (path for path in tmp_path.rglob(victim) if path not in shared)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    else:
        path.unlink()
    found, passed_over = checkpoint.newest_usable(tmp_path)
    assert found == good
    if (damage, victim) == ("missing", "manifest.json"):
        assert passed_over == [], "without its manifest it is no checkpoint"
        return
    with pytest.raises(InputError) as error:
        checkpoint.verify(bad)
    assert passed_over == [str(error.value)]
    assert path.name in passed_over[0]
    assert str(bad) in passed_over[0]
    assert "\n" not in passed_over[0]
    assert_as_grown(good, 2)


def test_damage_below_a_folder_names_its_path(tmp_path: Path) -> None:
    written = save(4, tmp_path)
    os.truncate(written / "learner" / "weights.bin", 100)
    with pytest.raises(
        InputError, match=r"is damaged: learner/weights\.bin has 100 bytes instead of 1024; the run goes on"
    ):
        checkpoint.verify(written)


def test_where_nothing_is_usable_every_one_is_named(tmp_path: Path) -> None:
    for iteration in (1, 2):
        (save(iteration, tmp_path) / "state.json").unlink()
    found, passed_over = checkpoint.newest_usable(tmp_path)
    assert found is None
    assert ["00000002" in passed_over[0], "00000001" in passed_over[1], len(passed_over)] == [True, True, 2]
    assert checkpoint.newest_usable(tmp_path / "absent") == (None, [])


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    written = save(1, tmp_path)
    (written / checkpoint.REPLAY_STATES).unlink()
    with pytest.raises(InputError, match=r"has no replay\.json: it was written by another version"):
        restored(written)


# ---- no space left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_one_sentence_and_keeps_what_is_there(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match="there is none before it, so the run starts again when it is resumed"):
        save(1, tmp_path, fails=OSError(number, os.strerror(number)))
    save(2, tmp_path)
    good = save(3, tmp_path)
    with pytest.raises(InputError) as error:
        save(4, tmp_path, fails=OSError(number, os.strerror(number)))
    assert str(error.value) == (
        f"The checkpoint of iteration 4 could not be written to {tmp_path}: {os.strerror(number).lower()}; "
        "the run goes on from the checkpoint of iteration 3 when it is resumed."
    )
    assert names(tmp_path) == ["00000002", "00000003"]
    checkpoint.verify(good)


def test_no_space_for_segments_leaves_no_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = grown(2)
    write(writer, tmp_path)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    advance(writer, 2)
    writer.iteration = 3

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            InputError, match=r"iteration 3 could not be written .* no space left on device; .* iteration 2"
        ):
            write(writer, tmp_path)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before
    assert_as_grown(write(writer, tmp_path), 3)


# ---- killed at any moment -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a save where nothing catches it."""


def dies_at(moment: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Makes the n-th change to the disk from now on the last that is not made; returns the names of those that were."""
    made: list[str] = []

    def watched(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(made) >= moment:
                raise Killed
            made.append(name)
            return change(*arguments, **options)

        return call

    for owner, name in [
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "open"),
        *((pathlib.Path, name) for name in ("rename", "replace", "mkdir", "write_text", "write_bytes", "unlink")),
    ]:
        patch.setattr(owner, name, watched(name, getattr(owner, name)))
    return made


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path: Path, again: bool) -> None:
    template, moment, over = tmp_path / "template", 0, False
    for iteration in (4, 5):
        write(grown(iteration), template)
    while not over:
        folder = tmp_path / str(moment)
        shutil.copytree(template, folder)
        writer = restored(folder / "00000005")
        if not again:
            advance(writer, 5)
            writer.iteration = 6
        with pytest.MonkeyPatch.context() as patch:
            made = dies_at(moment, patch)
            try:
                write(writer, folder)
                over = True
            except Killed:
                over = False
        found, passed_over = checkpoint.newest_usable(folder)
        assert passed_over == [], f"killed after {made}"
        assert found is not None
        assert_as_grown(found, 5 if again or found.name == "00000005" else 6)
        resumed = restored(found)
        resumed.iteration += 1
        advance(resumed, resumed.iteration - 1)
        final = write(resumed, folder)
        assert_as_grown(final, resumed.iteration)
        assert len([name for name in names(folder) if name != "replay"]) == 2, "nothing of the killed one is left"
        states = [json.loads((path / "replay.json").read_text()) for path in folder.glob("0*")]
        named = {entry["file"] for state in states for entry in state["operators"]["segments"]}
        assert {path.name for path in (folder / "replay" / "operators").glob("*.arrow")} == named
        moment += 1
    assert moment > 25


def save_on_and_on(folder: Path) -> None:
    """What the child process does until it is killed; it never returns into the test."""
    try:
        writer = grown(0)
        for iteration in range(1, 100_000):
            advance(writer, iteration - 1)
            writer.iteration = iteration
            write(writer, folder)
    finally:
        os._exit(1)


def test_a_killed_process_leaves_complete_checkpoints(tmp_path: Path) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:
            save_on_and_on(folder)
        try:
            while checkpoint.newest(folder) is None:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child failed"
                time.sleep(0.001)
            time.sleep(0.013 * attempt)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found, passed_over = checkpoint.newest_usable(folder)
        assert passed_over == []
        assert found is not None
        assert_as_grown(found, int(found.name))
