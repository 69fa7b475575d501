"""Sweeps that run: trials side by side, one that fails, ASHA that stops, PBT that copies, and what is left at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES, changed

from raysseg.algorithms.recipes import load_recipe, train_recipe
from raysseg.algorithms.sweep_results import SweepOutcome
from raysseg.algorithms.sweep_settings import load_sweep
from raysseg.algorithms.sweeps import run_sweep
from raysseg.errors import InputError
from raysseg.visualization import load_variant_runs

Run = Callable[..., SweepOutcome]


class Recorder:
    """Keeps what a sweep says about its progress."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def update(self, completed: float, total: float, **fields: str | float | int) -> None:
        """Keeps one update."""
        self.updates.append({"completed": completed, "total": total, **fields})

    def note(self, message: str) -> None:
        """Keeps one sentence."""
        self.notes.append(message)


@pytest.fixture
def run(tmp_path: Path, ray_session: None, store_uri: str) -> Run:
    """Runs a sweep over the small recipe in `tmp_path/sweep`; `recipe` changes the recipe, the rest the sweep file."""

    def sweep(
        *,
        recipe: dict[str, Any] | None = None,
        resume: bool = False,
        listener: Recorder | None = None,
        **values: Any,
    ) -> SweepOutcome:
        base = {"data": {"source": "store", "path": store_uri}, "eil.exploration.updates_per_stage": 1}
        variants = {"eil": {}, "none": {"policy": "none"}}
        text = {**changed(VALUES, {**base, **(recipe or {})}), "seeds": [0], "variants": variants}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(text))
        file = {"recipe": "small.yaml", "variant": "eil", "resources": {"cpu": 0.5}, **values}
        (tmp_path / "file.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
        return run_sweep(load_sweep(tmp_path / "file.yaml"), tmp_path / "sweep", resume=resume, listener=listener)

    return sweep


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a trial."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_failed_trial_says_why_and_the_best_trains_to_the_same_number(run: Run, tmp_path: Path) -> None:
    # A learning rate like this one ends in a loss that is not finite.
    space = {"training.refine_learning_rate": [0.003, 1.0e30], "eil.gamma": [0.0, 0.9]}
    listener = Recorder()
    outcome = run(space=space, concurrent=2, listener=listener)
    folder = tmp_path / "sweep"
    assert [(trial.job.label, trial.state) for trial in outcome.trials] == [
        ("refine_learning_rate=0.003_gamma=0", "finished"),
        ("refine_learning_rate=0.003_gamma=0.9", "finished"),
        ("refine_learning_rate=1e+30_gamma=0", "failed"),
        ("refine_learning_rate=1e+30_gamma=0.9", "failed"),
    ]
    for trial in outcome.failed:
        assert trial.reason.startswith("The segmenter's loss at update")
        assert "NonFiniteError" in (trial.folder / "error.txt").read_text()
    assert [row.notes[0].startswith("seed 0 failed: The segmenter's loss") for row in outcome.rows[2:]] == [True, True]
    assert len([note for note in listener.notes if "failed: The segmenter's loss" in note]) == 2
    assert listener.updates[-1] == listener.updates[-1] | {"completed": 4, "total": 4, "done": 2, "failed": 2}

    # One pre-training for all four, and Tune's own files are gone.
    assert [path.name for path in (folder / "pretrain").iterdir()] == ["seed-0"]
    assert not (folder / "tune").exists()
    assert {"table.md", "sweep.json", "best.yaml", "gamma.png", "refine_learning_rate.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(run.variant for run in load_variant_runs([folder]) if run.finished) == [
        "refine_learning_rate=0.003_gamma=0",
        "refine_learning_rate=0.003_gamma=0.9",
    ]
    record = json.loads((folder / "sweep.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["finished", "finished", "failed", "failed"]

    assert outcome.best_row is not None
    (summary,) = train_recipe(load_recipe(str(folder / "best.yaml")), tmp_path / "best")
    assert summary["miou"] == outcome.best_row.scores[0]
    best = next(trial for trial in outcome.trials if trial.job.label == outcome.best_row.label)
    assert rows(tmp_path / "best" / "variants" / "best" / "seed-0") == rows(best.folder)

    # Resumed, the finished trials are as they were, and the failed ones are tried again.
    before = (best.folder / "timings.jsonl").read_text()
    listener = Recorder()
    again = run(space=space, concurrent=1, resume=True, listener=listener)
    assert (best.folder / "timings.jsonl").read_text() == before
    assert len(again.failed) == 2
    assert len(listener.notes) == 2


@pytest.mark.slow
def test_a_trial_with_actors_keeps_to_its_placement_group(run: Run, pretrained: str) -> None:
    # The session has four CPUs: the trial's three and its actor's one are all, so an actor outside would wait forever.
    recipe = {
        "training.pretrained": pretrained,
        "engine.num_env_runners": 1,
        "engine.num_cpus_per_env_runner": 1.0,
        "eil.stages": 1,
    }
    outcome = run(recipe=recipe, space={"eil.gamma": [0.5]}, resources={"cpu": 3.0})
    assert [trial.state for trial in outcome.trials] == ["finished"], outcome.trials


def test_more_than_the_cluster_has_is_refused(run: Run, pretrained: str, tmp_path: Path) -> None:
    given = {"training.pretrained": pretrained}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"resources": {"cpu": 64}}, r"asks for 64 CPUs \(cpus of the sweep's resources.*, but the cluster has 4 CPUs"),
        ({"resources": {"gpu": 1.0}}, r"asks for 1 GPUs \(gpus of the sweep's resources.*, but the cluster has 0 GPUs"),
        (
            {"resources": {"cpu": 3}, "concurrent": 2},
            r"asks for 6 CPUs \(concurrent × cpus of the sweep's resources.*, but the cluster has 4 CPUs",
        ),
        (
            {"recipe": {**given, "engine.num_env_runners": 6}},
            r"asks for 6.5 CPUs \(.*engine.num_env_runners × .*\), but the cluster has 4 CPUs",
        ),
    ]
    for changes, expected in cases:
        with pytest.raises(InputError, match=expected):
            run(**{"recipe": given, "space": {"eil.gamma": [0.0, 0.9]}, **changes})
        assert not (tmp_path / "sweep").exists() or not any((tmp_path / "sweep").iterdir())


@pytest.mark.slow
def test_asha_stops_what_lags_behind(run: Run, pretrained: str, tmp_path: Path) -> None:
    # One after the other. Scored on the images it is trained on, the segmenter learns with the first learning rate; the others
    # destroy it.
    space = {"training.refine_learning_rate": [0.003, 0.3, 1.0]}
    recipe = {
        "data.val_split": "train",
        "training.pretrained": pretrained,
        "training.stage_epochs": 20,
        "eil.policy": "none",
    }
    outcome = run(recipe=recipe, space=space, scheduler="asha", concurrent=1)
    states = {trial.job.values["training.refine_learning_rate"]: trial for trial in outcome.trials}
    assert states[0.003].state == "finished"
    stopped = [trial for trial in outcome.trials if trial.state == "stopped"]
    assert stopped, outcome.trials
    for trial in stopped:
        assert len(trial.scores) == 2, "the first stage is the last one that it was given"
        assert trial.scores[1] < states[0.003].scores[1]
        assert not (trial.folder / "checkpoints").exists()
    assert outcome.best_row is not None
    assert outcome.best_row.values == {"training.refine_learning_rate": 0.003}
    assert "stopped after stage 1 at" in (tmp_path / "sweep" / "table.md").read_text()


@pytest.mark.slow
def test_pbt_copies_the_better_member_and_goes_on_after_an_interruption(
    run: Run, pretrained: str, tmp_path: Path
) -> None:
    population: dict[str, Any] = {
        "recipe": {"training.pretrained": pretrained, "eil.stages": 3, "eil.policy": "none"},
        "space": {"training.refine_learning_rate": {"loguniform": [1.0e-6, 1.0]}},
        "samples": 2,
        "sample_seed": 3,
        # Of the session's four: both members take turns in one process.
        "resources": {"cpu": 4},
        "scheduler": {"name": "pbt", "pbt": {"quantile_fraction": 0.5}},
    }

    class Interrupting(Recorder):
        """Fails as soon as one member waits for the other one at the second exchange."""

        def update(self, completed: float, total: float, **fields: str | float | int) -> None:
            """Looks for the snapshot of the second stage."""
            if any((tmp_path / "sweep").glob("variants/*/seed-0/snapshots/stage-002")):
                raise RuntimeError("interrupted")

    with pytest.raises(Exception, match="interrupted"):
        run(**population, listener=Interrupting())
    (waiting,) = (tmp_path / "sweep").glob("variants/*/seed-0/snapshots/stage-002/timings.jsonl")
    assert json.loads((tmp_path / "sweep" / "population.json").read_text())["stage"] == 1
    seen = {waiting.read_text()}

    class Watching(Recorder):
        """Keeps every version of the snapshot's timings."""

        def update(self, completed: float, total: float, **fields: str | float | int) -> None:
            """Reads them."""
            if waiting.exists():
                seen.add(waiting.read_text())

    outcome = run(**population, resume=True, listener=Watching())
    assert len(seen) == 1, "the member that waited was trained again"
    assert [trial.state for trial in outcome.trials] == ["finished", "finished"]
    by_name = {trial.job.name: trial for trial in outcome.trials}
    taken = [(trial, entry) for trial in outcome.trials for entry in trial.history if entry["member"]]
    assert len(taken) == 2, "one member is replaced at each of the two exchanges"
    for trial, entry in taken:
        assert entry["member"] != trial.job.name
        assert by_name[entry["member"]].folder != trial.folder
    # Whoever copied last has the donor's history up to that stage, and its own learning rate after it.
    trial, entry = taken[-1]
    donor = by_name[entry["member"]]
    mine, theirs = rows(trial.folder), rows(donor.folder)
    until = next(row["iteration"] for row in theirs if row["phase"] == "evaluate" and row["stage"] == entry["stage"])
    assert entry["stage"] == 2
    assert mine[:until] == theirs[:until]
    rates = [next(r["learning_rate"] for r in part if r["iteration"] == until + 1) for part in (mine, theirs)]
    assert rates[0] != rates[1]
    (rate,) = entry["values"].values()
    assert 1.0e-6 <= rate <= 1.0
    # The schedule's factor is the same for both, so the rates are in the ratio of the values.
    assert rates[0] / rates[1] == pytest.approx(rate / donor.values["training.refine_learning_rate"], rel=1e-4)
    config = yaml.safe_load((trial.folder / "config.yaml").read_text())
    assert config["training"]["refine_learning_rate"] == rate
    assert not (trial.folder / "snapshots").exists()
    exchange = json.loads((tmp_path / "sweep" / "population.json").read_text())
    assert exchange["stage"] == 2
    assert "its last values; they changed within the run" in (tmp_path / "sweep" / "best.yaml").read_text()
