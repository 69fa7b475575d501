"""A full disk, torn checkpoints and damaged data."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

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
    [(checkpoint, "save", "checkpoints"), (MetricsWriter, "write", "metrics.jsonl"), (LabelStore, "write", "run")],
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
            if owner is MetricsWriter:
                # More than what is left in the last block of the file.
                arguments[1]["wide"] = "w" * 10_000
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, on_a_full_disk)
        with pytest.raises(InputError, match="space") as failure:
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


def overwrite(shard: Path) -> bytes:
    """Overwrites all but the ends of a file in place, where it is mapped into memory, and returns what it held."""
    content = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(len(content) - 2048))
    return content


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_a_damaged_shard_stops_the_run_in_one_sentence(
    encoding: Literal["png", "raw"], make_laboratory: Make, undisturbed: Laboratory, tmp_path: Path
) -> None:
    whole = Store.open(undisturbed.store_uri)
    samples = [whole.sample(key) for split in whole.splits for key in whole.keys(split)]
    write_store(tmp_path / "store", samples, whole.info, image_encoding=encoding)
    shard = tmp_path / "store" / "train-00000.arrow"
    lab = make_laboratory(store_uri=str(tmp_path / "store"))
    remote = {**STEPS, "engine__num_env_runners": 1, "engine__cache_mib": 0}
    content: list[bytes] = []

    def script() -> Script:
        algorithm = yield
        while algorithm.record["phase"] != "explore" or algorithm.record["update"] < 2:
            algorithm = yield
        content.append(overwrite(shard))
        yield

    with pytest.raises(InputError) as failure:
        lab.run(script(), **remote)
    sentence = str(failure.value)
    assert shard.name in sentence
    assert any(f"'{key}'" in sentence for key in whole.keys("train"))
    assert "\n" not in sentence
    assert [row["update"] for row in lab.metrics() if row["phase"] == "explore"] == [1, 2]
    assert len(lab.log("sample")) <= 4, "what cannot be read is not tried again and again"

    shard.write_bytes(content[0])
    lab.run(resume=True, **STEPS)
    assert lab.metrics() == undisturbed.metrics()
    assert lab.labels() == undisturbed.labels()
