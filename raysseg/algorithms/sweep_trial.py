"""One trial of a sweep in a Ray Tune worker: a variant's run, reported stage by stage, and what PBT copies.

Tune's own state knows less than the run folders do (it forgets the scheduler when it restores), so the folders are the
truth: a trial goes on from the newest checkpoint in its folder, and a member of a population from the snapshot of a stage,
its own or the one that it took over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from raysseg.algorithms.recipes import Recipe
from raysseg.algorithms.sweep_points import fold
from raysseg.core import checkpoint
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.config import SegmentationConfig
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.run import run_variant
from raysseg.core.settings import MethodSettings
from raysseg.errors import ActorsLostError, InputError, LearnerLostError, NonFiniteError

FAILURE_FILE = "failure.json"
TRACEBACK_FILE = "error.txt"
LINEAGE_FILE = "lineage.json"
SNAPSHOTS = "snapshots"
SNAPSHOTS_KEPT = 2
ORIGIN_FILE = "origin.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a member of a population starts from.

    Args:
        member: whose snapshot; empty for the beginning of the run.
        stage: of the snapshot; 0 for the beginning.
    """

    member: str = ""
    stage: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """Everything that a worker needs to run one trial.

    Args:
        name: of the trial in the sweep.
        folder: where everything of it is written; absolute.
        recipe: its only variant is the trial's.
        label: of that variant.
        seed: of the run.
        store_uri: the Arrow store.
        pretrained: folder of the segmenter that it starts from.
        pretraining: whether this is a pre-training.
        values: swept key to its value.
        origin: of a member of a population.
    """

    name: str
    folder: Path
    recipe: Recipe
    label: str
    seed: int
    store_uri: str
    pretrained: Path | None = None
    pretraining: bool = False
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Origin = Origin()

    def settings(self, values: Mapping[str, Any] | None = None) -> MethodSettings:
        """Returns the settings of the run, with other values of the swept keys where PBT changed them."""
        if self.pretraining:
            return self.recipe.pretraining(self.seed)
        recipe = fold(self.recipe, self.label, values, self.label) if values else self.recipe
        return recipe.settings(self.label, self.seed, pretrained=self.pretrained)

    def config(self, settings: MethodSettings) -> SegmentationConfig:
        """Returns the configuration of a run with these settings in this folder."""
        return self.recipe.method.config().apply(settings, run_dir=str(self.folder), store_uri=self.store_uri)


def train_trial(
    config: Mapping[str, Any],
    *,
    plans: Mapping[str, TrialPlan],
    metric: str,
    interval: int | None,
    workplace: Path,
) -> None:
    """Runs one trial to its end; the function that Ray Tune calls.

    An error ends the trial and is written to its folder; Tune starts a trial again only where its process died.

    Args:
        config: the trial's `job` and, in a population, its values of the swept keys.
        plans: of all trials, by name.
        metric: what is reported beside the stage.
        interval: stages between two exchanges of a population, or None.
        workplace: the command's working directory; relative paths of the recipe start there, on every node that has it.
    """
    if workplace.is_dir():
        os.chdir(workplace)
    # A member that took over another one's configuration still has its own name.
    plan = plans[str(tune.get_context().get_trial_name())]
    plan.folder.mkdir(parents=True, exist_ok=True)
    for name in (FAILURE_FILE, TRACEBACK_FILE):
        (plan.folder / name).unlink(missing_ok=True)
    try:
        if interval is None:
            _run(plan, plan.settings(), metric)
        else:
            values = {key: config[key] for key in plan.values}
            _run_member(plan, values, plans, metric, interval)
    except Exception as error:
        (plan.folder / TRACEBACK_FILE).write_text(traceback.format_exc())
        write_atomically(plan.folder / FAILURE_FILE, json.dumps({"reason": reason_of(error)}))
        tune.report({"failed": True, "done": True})


def reason_of(error: BaseException) -> str:
    """Returns why a trial failed, in one sentence."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error
    text = " ".join(str(cause).split())
    if isinstance(cause, (InputError, NonFiniteError, ActorsLostError, LearnerLostError)):
        return text
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the scores of a run so far, one row per stage; a line that was cut off by a kill ends them."""
    path, rows = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["phase"] == "evaluate":
                rows[int(row["stage"])] = row
    return [rows[stage] for stage in sorted(rows)]


def _score(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    if row.get(metric) is None:
        raise InputError(f"The metric '{metric}' was not measured at stage {row['stage']}.")
    return {"stage": int(row["stage"]), metric: float(row[metric])}


def _run(plan: TrialPlan, settings: MethodSettings, metric: str, interval: int | None = None) -> None:
    """Runs the variant from wherever its folder stands and reports every stage; the last one only when all is written,
    because a scheduler may stop whatever reports.
    """

    def report(algorithm: SegmentationAlgorithm) -> None:
        if algorithm.record["phase"] != "evaluate" or algorithm.done or plan.pretraining:
            return
        score = _score(algorithm.record, metric)
        if interval is None or score["stage"] == 0 or score["stage"] % interval:
            tune.report(score)
            return
        checkpoint.save(algorithm, plan.folder / "checkpoints", keep=settings.engine.checkpoints_kept)
        take_snapshot(plan.folder, score["stage"])
        _report_snapshot(plan, score)

    summary = run_variant(plan.config(settings), plan.folder, resume=True, after_iteration=report)
    last = (summary["stages"] or [{"stage": 0, metric: summary[metric]}])[-1]
    tune.report({**({"stage": 0} if plan.pretraining else _score(last, metric)), "done": True})


def _report_snapshot(plan: TrialPlan, score: dict[str, Any]) -> None:
    """Reports a score with a checkpoint that names the snapshot; the snapshot itself stays in the member's folder."""
    with tempfile.TemporaryDirectory() as folder:
        origin = Origin(member=plan.name, stage=score["stage"])
        (Path(folder) / ORIGIN_FILE).write_text(json.dumps(dataclasses.asdict(origin)))
        tune.report(score, checkpoint=tune.Checkpoint.from_directory(folder))


# ---- members of a population ------------------------------------------------------------------------------------------


def _run_member(
    plan: TrialPlan, values: Mapping[str, Any], plans: Mapping[str, TrialPlan], metric: str, interval: int
) -> None:
    """Brings the folder to where the member starts from, and runs it."""
    origin = plan.origin
    found = tune.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            origin = Origin(**json.loads((Path(folder) / ORIGIN_FILE).read_text()))
    settings = plan.settings(values)
    rows = {int(row["stage"]): row for row in evaluations(plan.folder)}
    reached = max(rows, default=0) // interval * interval
    if not (plan.folder / "summary.json").exists():
        if not _goes_on(plan, origin, values):
            adopt(plan.folder, plans[origin.member].folder if origin.member else None, origin.stage)
            history = read_lineage(plan.folder)
            entry = {"values": dict(values), **dataclasses.asdict(origin)}
            write_atomically(plan.folder / LINEAGE_FILE, json.dumps([*history, entry], indent=1))
        elif reached > origin.stage and _snapshot(plan.folder, reached).is_dir():
            # It had reached the next exchange before the sweep was killed; what it has to say is written already.
            _report_snapshot(plan, _score(rows[reached], metric))
    _run(plan, settings, metric, interval)


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """Returns what a member did so far: from whose snapshot of which stage it went on, with which values."""
    path = folder / LINEAGE_FILE
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def _goes_on(plan: TrialPlan, origin: Origin, values: Mapping[str, Any]) -> bool:
    """Whether what the folder holds came from this origin with these values."""
    history = read_lineage(plan.folder)
    if not history or history[-1]["values"] != dict(values):
        return False
    return origin.member == plan.name or (history[-1]["member"], history[-1]["stage"]) == (origin.member, origin.stage)


def _snapshot(folder: Path, stage: int) -> Path:
    return folder / SNAPSHOTS / f"stage-{stage:03d}"


def take_snapshot(folder: Path, stage: int) -> None:
    """Keeps what a run needs to go on from this stage, beside the run: links to files that never change, copies of the
    growing ones. The newest two snapshots stay, because a donor is at most one exchange ahead.
    """
    target = _snapshot(folder, stage)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    newest = checkpoint.newest(folder / "checkpoints")
    skipped = {SNAPSHOTS, LINEAGE_FILE, FAILURE_FILE, TRACEBACK_FILE, "tensorboard", "pictures"}

    def ignore(where: str, names: list[str]) -> set[str]:
        if Path(where) == folder:
            return skipped & set(names)
        if Path(where) == folder / "checkpoints":
            return {name for name in names if newest is None or (name[0] in ".0123456789" and name != newest.name)}
        return set()

    shutil.copytree(folder, temporary, ignore=ignore, copy_function=_link)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted((folder / SNAPSHOTS).glob("stage-*"))[:-SNAPSHOTS_KEPT]:
        shutil.rmtree(old)


def _link(source: str, target: str) -> None:
    if source.endswith(".jsonl"):
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def adopt(folder: Path, donor: Path | None, stage: int) -> None:
    """Makes a member's folder what the donor's was at a stage, checkpoint, labels and metrics, or empty without a donor.
    Its own snapshots and its lineage stay.

    Raises:
        InputError: the donor's snapshot is gone.
    """
    if donor is not None and not _snapshot(donor, stage).is_dir():
        raise InputError(f"The snapshot {_snapshot(donor, stage)} is gone, from which {folder} was to go on.")
    incoming = folder / ".incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    if donor is not None:
        shutil.copytree(_snapshot(donor, stage), incoming, dirs_exist_ok=True)
    for path in folder.iterdir():
        if path.name in (SNAPSHOTS, LINEAGE_FILE, incoming.name):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list(incoming.iterdir()):
        path.rename(folder / path.name)
    incoming.rmdir()
