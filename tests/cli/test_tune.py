"""`raysseg tune` as a user runs it: refusals, and a sweep whose driver is killed and resumed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES, changed
from commands import start

import raysseg.algorithms.sweeps

LONGEST = 600.0
Refused = Callable[..., str]


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """A sweep over two values of gamma on the small recipe, one trial at a time, an update per iteration."""
    changes = {"engine.updates_per_iteration": 1, "engine.checkpoint_interval": 1, "training.pretrain_epochs": 1}
    text = {**changed(VALUES, changes), "seeds": [0], "variants": {"eil": {}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(text))
    path = tmp_path / "gamma.yaml"
    path.write_text(yaml.safe_dump({"recipe": "small.yaml", "space": {"eil.gamma": [0.0, 0.9]}, "concurrent": 1}))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--resume",), "--resume needs --run-dir: the directory of the sweep to continue."),
        (("--seeds", "x"), "--seeds takes numbers from 0 separated by commas, not 'x'."),
        (("--set", "eil.gamma=0.1"), "The sweep gamma sweeps 'eil.gamma', so 'eil.gamma' cannot be set as well."),
        (("--set", "eil.gama=0.1"), "Unknown key 'eil.gama' in the recipe small, variant eil; did you mean 'gamma'?"),
        (("--set", "eil.window=4"), "*window must be an odd number of pixels or 'image', not 4*"),
        (("--set", "segmenter.weights=absent.pth"), "*absent.pth*"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_trial(
    words: tuple[str, ...],
    expected: str,
    sweep_file: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the bad input was not noticed before trials were started")

    monkeypatch.setattr(raysseg.algorithms.sweeps, "_run_tune", fail)
    where = () if "--resume" in words else ("--run-dir", tmp_path / "run")
    said = refused("tune", sweep_file, *where, *words)
    assert expected.strip("*") in said
    assert expected.startswith("*") or said == expected


def test_another_sweeps_folder_is_refused(sweep_file: Path, refused: Refused, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("recipe: other\n")
    assert "is not empty; add --resume" in refused("tune", sweep_file, "--run-dir", run_dir)
    assert "was made with another sweep" in refused("tune", sweep_file, "--run-dir", run_dir, "--resume")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a trial's metrics."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


@pytest.mark.slow
def test_a_killed_sweep_keeps_what_is_finished_and_goes_on_where_it_was(sweep_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = run_dir.with_suffix(".log")
    first, second = (run_dir / "variants" / f"gamma={value}" / "seed-0" for value in ("0", "0.9"))
    process, deadline = start("tune", sweep_file, run_dir), time.monotonic() + LONGEST
    # In the middle of the second trial: its first stage is scored, its end is not written.
    while not any(row["phase"] == "evaluate" and row["stage"] == 1 for row in metrics(second)):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (second / "summary.json").exists(), "the sweep was over before it was killed"
    timings = {folder: (folder / "timings.jsonl").read_text() for folder in (first, second)}
    scored = next(row["iteration"] for row in metrics(second) if row["phase"] == "evaluate" and row["stage"] == 0)

    # Resumed from a parent folder that has another name.
    moved = tmp_path / "moved"
    run_dir.rename(moved)
    resumed = start("tune", sweep_file, moved, "--resume")
    assert resumed.wait(LONGEST) == 0, moved.with_suffix(".log").read_text()[-3000:]
    first, second = (moved / folder.relative_to(run_dir) for folder in (first, second))
    assert (first / "timings.jsonl").read_text() == timings[run_dir / first.relative_to(moved)]
    before = timings[run_dir / second.relative_to(moved)].splitlines()
    after = (second / "timings.jsonl").read_text().splitlines()
    assert after[:scored] == before[:scored], "it began again instead of going on"
    record = json.loads((moved / "sweep.json").read_text())
    assert [(trial["trial"], trial["state"], len(trial["scores"])) for trial in record["trials"]] == [
        ("gamma=0/seed-0", "finished", 3),
        ("gamma=0.9/seed-0", "finished", 3),
    ]
    iterations = [row["iteration"] for row in metrics(second)]
    assert iterations == list(range(1, len(iterations) + 1))
    said = moved.with_suffix(".log").read_text()
    assert "│ 0.9   │ 0     │" in said
    assert f"raysseg train {moved / 'best.yaml'}" in said
