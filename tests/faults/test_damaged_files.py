"""A full disk, torn checkpoints and damaged data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.conftest import Laboratory, Script

from raysseg.core import checkpoint
from raysseg.core.metrics_writer import MetricsWriter
from raysseg.data import Store, write_store
from raysseg.data.label_store import LabelStore
from raysseg.errors import InputError

pytestmark = pytest.mark.slow

Make = Callable[..., Laboratory]

STEPS = {"eil__exploration__updates_per_stage": 4, "engine__checkpoint_interval": 1}


class Crash(Exception):
    """Ends a run in the middle."""


def crash_after(updates: int) -> Script:
    """Ends exploring after so many updates and their checkpoints."""
    algorithm = yield
    while algorithm.record["phase"] != "explore" or algorithm.record["update"] <= updates:
        algorithm = yield
    raise Crash


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store_uri: str, ray_session: None) -> Laboratory:
    """The same run without a fault."""
    lab = Laboratory(tmp_path_factory.mktemp("undisturbed"), store_uri)
    lab.run(**STEPS)
    return lab


# ---- a full disk ----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system in memory that is as large as it is told to be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("size=2g")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system of a known size needs the right to mount one: {done.stderr.strip()}")

    def fill(self) -> None:
        """Takes all free space away."""
        found = os.statvfs(self.folder)
        self._mount(f"remount,size={(found.f_blocks - found.f_bfree) * found.f_frsize}")

    def make_room(self) -> None:
        """Gives it back."""
        self._mount("remount,size=2g")

    def remove(self) -> None:
        """Unmounts it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Two GiB that can become full."""
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.remove()


@pytest.mark.parametrize(
    ("owner", "function", "named"),
    [(checkpoint, "save", "checkpoints"), (MetricsWriter, "write", "metrics.jsonl"), (LabelStore, "write", "labels")],
    ids=["a checkpoint", "metrics", "a label version"],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    owner: Any,
    function: str,
    named: str,
    disk: SmallDisk,
    undisturbed: Laboratory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = Laboratory(disk.folder, undisturbed.store_uri)
    original, calls = getattr(owner, function), []

    def on_a_full_disk(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        # A checkpoint or a row of exploring, and the only label version.
        if len(calls) == (1 if owner is LabelStore else 4):
            disk.fill()
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="space") as failure:
        patch.setattr(owner, function, on_a_full_disk)
        lab.run(**STEPS)
    assert named in str(failure.value)
    assert "\n" not in str(failure.value)
    left = sorted((lab.folder / "checkpoints").glob("[0-9]*"))
    assert left
    for one in left:
        checkpoint.verify(one)
    assert LabelStore(str(lab.folder / "labels")).versions() == []

    disk.make_room()
    lab.run(resume=True, **STEPS)
    assert f"resumed at iteration {int(left[-1].name)} " in lab.notes.sentences[-1]
    assert lab.metrics() == undisturbed.metrics()
    assert lab.labels() == undisturbed.labels()
    assert lab.played() == undisturbed.played()


# ---- torn checkpoints -----------------------------------------------------------------------------------------------


def tear(one: Path) -> str:
    """Cuts the largest file of a checkpoint in half and returns its name."""
    victim = max((path for path in one.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    return victim.name


@pytest.mark.parametrize("torn", [1, 2], ids=["the newest", "all"])
def test_a_torn_checkpoint_is_passed_over(torn: int, make_laboratory: Make, undisturbed: Laboratory) -> None:
    lab = make_laboratory()
    with pytest.raises(Crash):
        lab.run(crash_after(2), **STEPS)
    older, newest = sorted((lab.folder / "checkpoints").glob("[0-9]*"))
    names = [tear(one) for one in (newest, older)[:torn]]
    lab.notes.sentences.clear()
    lab.run(resume=True, **STEPS)
    said = lab.notes.sentences
    for one, name in zip((newest, older), names, strict=False):
        about = [sentence for sentence in said if one.name in sentence]
        assert len(about) == 1
        assert name in about[0]
        assert "\n" not in about[0]
    assert any(f"resumed at iteration {int(older.name)} " in sentence for sentence in said) is (torn == 1)
    assert lab.metrics() == undisturbed.metrics()
    assert lab.labels() == undisturbed.labels()


# ---- damaged data ---------------------------------------------------------------------------------------------------
