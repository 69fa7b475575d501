"""A driver that is killed loses nothing that counts: resumed, it ends with the labels and the score of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import start
from end_to_end.conftest import label_tables, metrics, summary, variant

PHASES = ("pretrain", "explore", "infer", "refine", "evaluate")
LONGEST = 600.0


def finish(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Waits for the end of a command that must succeed."""
    assert process.wait(LONGEST) == 0, run_dir.with_suffix(".log").read_text()[-3000:]


def rows_of(run_dir: Path, phase: str) -> int:
    """Counts the rows of a phase that have been written so far, in both folders of the run."""
    folder = run_dir / "pretrain" / "seed-0" if phase == "pretrain" else variant(run_dir)
    path = folder / "metrics.jsonl"
    return path.read_text().count(f'"phase": "{phase}"') if path.exists() else 0


def kill_in(process: subprocess.Popen[bytes], run_dir: Path, phase: str, *, after: int) -> None:
    """Kills the driver as soon as a phase has written one more row than `after`."""
    deadline = time.monotonic() + LONGEST
    while rows_of(run_dir, phase) <= after:
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{phase} has not come"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.slow
def test_a_driver_killed_in_every_phase_ends_where_it_would_have(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        engine__updates_per_iteration=1,
        engine__checkpoint_interval=2,
        eil__exploration__updates_per_stage=4,
        training__pretrain_epochs=4,
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    reference = start("train", recipe, undisturbed)
    finish(reference, undisturbed)

    for number, phase in enumerate(PHASES):
        before = rows_of(killed, phase)
        process = start("train", recipe, killed, *(["--resume"] if number else []))
        kill_in(process, killed, phase, after=before)
        assert not (variant(killed) / "summary.json").exists(), f"the run was over before it was killed in {phase}"
    finish(start("train", recipe, killed, "--resume"), killed)

    assert label_tables(killed) == label_tables(undisturbed)
    assert summary(killed) == summary(undisturbed)
    assert metrics(killed) == metrics(undisturbed)
    assert not (variant(killed) / "checkpoints").exists()


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over_in_one_sentence(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(engine__checkpoint_interval=1, engine__updates_per_iteration=1), tmp_path / "run"
    process = start("train", recipe, run_dir)
    kill_in(process, run_dir, "explore", after=0)
    newest = sorted((variant(run_dir) / "checkpoints").glob("[0-9]*"))[-1]
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    log = run_dir.with_suffix(".log")
    written = len(log.read_text())
    finish(start("train", recipe, run_dir, "--resume"), run_dir)
    said = log.read_text()[written:]
    about = [line for line in said.splitlines() if "is damaged" in line]
    assert len(about) == 1
    assert victim.name in about[0]
    assert newest.name in about[0]
    assert "Traceback" not in said
