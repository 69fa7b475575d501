"""Sweeps: every point of a space with every seed, side by side under Ray Tune, from shared pre-trained segmenters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import random
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator

from raysseg.algorithms.recipes import set_value
from raysseg.algorithms.sweep_points import Axis, Job, plan_jobs, pretraining_digest, stages_of
from raysseg.algorithms.sweep_resources import Bundle, check_cluster, trial_bundles, trial_gpus
from raysseg.algorithms.sweep_results import STOPPED_FILE, SweepOutcome, collect, write_results
from raysseg.algorithms.sweep_schedulers import Population, StageHalving, SweepWatcher, plain_scheduler
from raysseg.algorithms.sweep_settings import Sweep
from raysseg.algorithms.sweep_trial import (
    FAILURE_FILE,
    SNAPSHOTS,
    Origin,
    TrialPlan,
    evaluations,
    reason_of,
    train_trial,
)
from raysseg.core.cluster import start_ray
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.modules import SEGMENTER
from raysseg.core.progress import ProgressListener, Silent
from raysseg.core.run import package_versions
from raysseg.data import open_dataset
from raysseg.errors import InputError

PROCESS_RETRIES = 2
"""Times that a trial is started again after its process or node died."""

POPULATION_FILE = "population.json"

TUNE_ENVIRONMENT = {
    # Relative paths in a recipe mean the same in a trial as in `raysseg train`.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The run folders have everything that Tune's own loggers would write.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Only the older of Tune's two displays can be switched off.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial that is stopped first stops its actors; then its process takes the next trial.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


def run_sweep(
    sweep: Sweep, folder: Path, *, resume: bool = False, listener: ProgressListener | None = None
) -> SweepOutcome:
    """Runs all trials of a sweep and writes its results.

    Args:
        sweep: what to run.
        folder: where everything is written: `variants/<point>/seed-<n>` as in a run directory, and the results.
        resume: go on with a sweep that was interrupted; what is finished is kept, what failed is tried again.
        listener: is told the progress.

    Returns:
        What every trial came to.

    Raises:
        InputError: before any trial starts, for a point, data, weights, resources or a folder that do not fit.
    """
    folder, listener = folder.resolve(), listener or Silent()
    _check_folder(sweep, folder, resume=resume)
    axes, jobs = plan_jobs(sweep)
    stores = _open_stores(jobs, folder / "data")
    start_ray()
    cpu = sweep.settings.resources.cpu
    jobs = [_laid_out(job, cpu, trial_gpus(sweep, job.settings().engine)) for job in jobs]
    bundles = {
        job.name: trial_bundles(cpu, trial_gpus(sweep, job.settings().engine), job.settings().engine) for job in jobs
    }
    check_cluster(sweep, bundles)
    plans = {
        job.name: TrialPlan(
            name=job.name,
            folder=folder / "variants" / job.label / f"seed-{job.seed}",
            recipe=job.recipe,
            label=job.label,
            seed=job.seed,
            store_uri=stores[_data_of(job)],
            values=job.values,
        )
        for job in jobs
    }
    _check_weights(plans.values())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", sweep.dump())
    write_atomically(folder / "versions.json", json.dumps(package_versions(), indent=1))
    with _tune_environment():
        failed = _pretrain(sweep, folder, jobs, plans, bundles, listener)
        runnable = {name: plan for name, plan in plans.items() if name not in failed}
        failed |= _train(sweep, folder, axes, jobs, runnable, bundles, listener)
    outcome = collect(sweep, jobs, {name: plan.folder for name, plan in plans.items()}, failed)
    write_results(sweep, axes, outcome, folder)
    _clean(folder, outcome)
    return outcome


def _check_folder(sweep: Sweep, folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The run directory {folder} is a file; choose another --run-dir.")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise InputError(
            f"The run directory {folder} is not empty; add --resume to continue it, or choose another --run-dir."
        )
    config = folder / "config.yaml"
    if config.exists() and config.read_text() != sweep.dump():
        raise InputError(
            f"The run directory {folder} was made with another sweep; resume it with the same file and --set options."
        )


def _data_of(job: Job) -> str:
    return json.dumps(job.settings().data.model_dump(mode="json"), sort_keys=True)


def _open_stores(jobs: Sequence[Job], cache: Path) -> dict[str, str]:
    """Builds or opens the store of every distinct data section, once; returns its URI by that section."""
    stores: dict[str, str] = {}
    for job in jobs:
        if _data_of(job) not in stores:
            data = job.settings().data
            store = open_dataset(data, cache)
            for split in (data.train_split, data.val_split):
                store.keys(split)
            stores[_data_of(job)] = store.uri
    return stores


def _laid_out(job: Job, cpu: float, gpu: float) -> Job:
    """Returns the job with the threads and the GPU of its process in its recipe, so that the best one trains the same."""
    engine, values = job.settings().engine, job.recipe.values
    plain: dict[str, Any] = dict(values) | {"engine": dict(values.get("engine") or {})}
    if engine.torch_threads is None:
        set_value(plain, "engine.torch_threads", max(1, int(cpu)))
    if engine.num_learners == 0:
        set_value(plain, "engine.num_gpus_per_learner", gpu)
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, values=plain))


def _check_weights(plans: Any) -> None:
    """Builds every distinct segmenter once, so that weights that are missing are noticed here."""
    seen = set()
    for plan in plans:
        settings = plan.settings()
        if settings.segmenter not in seen:
            seen.add(settings.segmenter)
            config = plan.recipe.method.config().apply(settings, run_dir=str(plan.folder), store_uri=plan.store_uri)
            config.segmenter_spec().build()


# ---- pre-training -----------------------------------------------------------------------------------------------------


def _pretrain(
    sweep: Sweep,
    folder: Path,
    jobs: Sequence[Job],
    plans: dict[str, TrialPlan],
    bundles: Mapping[str, Sequence[Bundle]],
    listener: ProgressListener,
) -> dict[str, str]:
    """Trains one segmenter for all jobs that can share it and fills it into their plans; returns the jobs that stay
    without one, with the reason.
    """
    shared: dict[str, TrialPlan] = {}
    users: dict[str, list[str]] = {}
    given = {job.name: job.settings().training for job in jobs}
    digests = {job.name: pretraining_digest(job) for job in jobs if given[job.name].pretrained is None}
    several = len({digests[job.name] for job in jobs if job.name in digests}) > len({job.seed for job in jobs})
    for job in jobs:
        plan, training = plans[job.name], given[job.name]
        if training.pretrained is not None:
            plans[job.name] = dataclasses.replace(
                plan, pretrained=Path(training.pretrained.replace("{seed}", str(job.seed)))
            )
        elif training.pretrain_epochs > 0:
            digest = digests[job.name]
            where = folder / "pretrain" / (f"{digest}/seed-{job.seed}" if several else f"seed-{job.seed}")
            name = f"pretrain/{digest}/seed-{job.seed}"
            shared.setdefault(name, dataclasses.replace(plan, name=name, folder=where, pretraining=True, values={}))
            users.setdefault(name, []).append(job.name)
            plans[job.name] = dataclasses.replace(plan, pretrained=where / SEGMENTER)
    open_plans = {name: plan for name, plan in shared.items() if not (plan.folder / "summary.json").exists()}
    sizes = {name: bundles[users[name][0]] for name in open_plans}
    failures = _run_tune(sweep, folder, open_plans, sizes, plain_scheduler(), listener, phase="pre-training")
    return {job: f"Its pre-training failed: {reason}" for name, reason in failures.items() for job in users[name]}


# ---- trials -----------------------------------------------------------------------------------------------------------


def _train(
    sweep: Sweep,
    folder: Path,
    axes: Sequence[Axis],
    jobs: Sequence[Job],
    plans: dict[str, TrialPlan],
    bundles: Mapping[str, Sequence[Bundle]],
    listener: ProgressListener,
) -> dict[str, str]:
    """Runs what is not finished yet; returns the reasons of what failed."""
    settings = sweep.settings
    points = {job.name for job in jobs if not job.baseline}
    done = {
        name
        for name, plan in plans.items()
        if (plan.folder / "summary.json").exists() or (plan.folder / STOPPED_FILE).exists()
    }
    todo = {name: plan for name, plan in plans.items() if name not in done}
    lines = {name: plan for name, plan in todo.items() if name not in points}
    if settings.scheduler.name == "none":
        return _run_tune(sweep, folder, todo, bundles, plain_scheduler(), listener, finished=len(done))
    failures = _run_tune(sweep, folder, lines, bundles, plain_scheduler(), listener, phase="baselines")
    trials = {name: plan for name, plan in todo.items() if name in points}
    if settings.scheduler.name == "asha":
        scheduler: Any = StageHalving(settings.scheduler.asha, settings.metric)
        for name in points & set(plans):
            scheduler.recall(name, evaluations(plans[name].folder))
        interval = None
    else:
        trials, start = _resumed_population(folder, trials)
        scheduler = Population(
            settings.scheduler.pbt, settings.metric, axes, start=start, record=folder / POPULATION_FILE
        )
        interval = settings.scheduler.pbt.interval_stages
    return failures | _run_tune(
        sweep, folder, trials, bundles, scheduler, listener, interval=interval, finished=len(points & done)
    )


def _resumed_population(folder: Path, trials: Mapping[str, TrialPlan]) -> tuple[dict[str, TrialPlan], int]:
    """Returns the members with the values and the start of the last exchange, and its stage."""
    path = folder / POPULATION_FILE
    if not path.exists():
        return dict(trials), 0
    record = json.loads(path.read_text())
    resumed = {}
    for name, plan in trials.items():
        found = record["members"].get(name)
        if found is not None:
            origin = Origin(member=found["member"], stage=found["stage"])
            plan = dataclasses.replace(plan, values=found["values"], origin=origin)
        resumed[name] = plan
    return resumed, int(record["stage"])


def trial_name(trial: Any) -> str:
    """Returns the name of a Tune trial: that of its job."""
    return str(trial.config["job"])


def trial_folder(trial: Any) -> str:
    """Returns the name of the folder in which Tune keeps what it needs while a trial runs."""
    return trial_name(trial).replace("/", "_")


def _run_tune(
    sweep: Sweep,
    folder: Path,
    plans: Mapping[str, TrialPlan],
    bundles: Mapping[str, Sequence[Bundle]],
    scheduler: Any,
    listener: ProgressListener,
    *,
    phase: str = "trials",
    interval: int | None = None,
    finished: int = 0,
) -> dict[str, str]:
    """Runs plans under Ray Tune and returns the reasons of those that failed."""
    if not plans:
        return {}
    settings, session, storage = sweep.settings, uuid.uuid4().hex[:8], folder / "tune"
    trainable = functools.partial(train_trial, plans=dict(plans), metric=settings.metric, interval=interval)
    factories = {name: tune.PlacementGroupFactory([dict(part) for part in bundles[name]]) for name in plans}
    presets = [{"job": name, **(plan.values if interval else {})} for name, plan in plans.items()]
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda config: factories[config["job"]]),
        param_space={key: tune.choice([preset[key] for preset in presets]) for key in presets[0]},
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(
                points_to_evaluate=presets, max_concurrent=settings.concurrent or 0, random_state=settings.sample_seed
            ),
            num_samples=len(presets),
            scheduler=scheduler,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_folder,
        ),
        run_config=tune.RunConfig(
            name=session,
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=PROCESS_RETRIES),
            callbacks=[SweepWatcher()],
            verbose=0,
        ),
    )
    # PBT draws from Python's own source.
    random.seed(settings.sample_seed)
    watch = _Watch(sweep, plans, listener, phase=phase, finished=finished)
    with SweepWatcher.watching(watch):
        grid = tuner.fit()
    shutil.rmtree(storage, ignore_errors=True)
    died = {trial_name(result): result.error for result in grid if result.error is not None}
    return {name: reason for name, plan in plans.items() if (reason := _reason(plan.folder, died.get(name)))}


def _reason(folder: Path, error: BaseException | None = None) -> str | None:
    """The reason that a trial wrote down, or what Tune says where its process died; None where it did not fail."""
    path = folder / FAILURE_FILE
    if path.exists():
        return str(json.loads(path.read_text())["reason"])
    return reason_of(error) if error is not None else None


class _Watch:
    """Turns Tune's events into progress, and notes which trials the scheduler stopped."""

    def __init__(
        self, sweep: Sweep, plans: Mapping[str, TrialPlan], listener: ProgressListener, *, phase: str, finished: int
    ) -> None:
        self._sweep, self._plans, self._listener, self._phase = sweep, plans, listener, phase
        self._finished = finished
        self._shares: dict[str, float] = dict.fromkeys(plans, 0.0)
        self._states: dict[str, str] = {}
        self._best: tuple[float, str] | None = None
        self._show()

    def __call__(self, event: str, name: str, result: Mapping[str, Any]) -> None:
        """Takes one event of a trial."""
        plan = self._plans[name]
        if event == "start":
            self._states[name] = "running"
        elif event in ("complete", "error"):
            self._shares[name] = 1.0
            self._states[name] = self._end(plan, event, result)
        elif "stage" in result:
            stages = stages_of(plan.settings()) or 0
            self._shares[name] = min(1.0, int(result["stage"]) / stages) if stages else 0.0
            score = result.get(self._sweep.settings.metric)
            if score is not None and result["stage"] and (self._best is None or score > self._best[0]):
                self._best = (float(score), name)
        self._show()

    def _end(self, plan: TrialPlan, event: str, result: Mapping[str, Any]) -> str:
        reason = _reason(plan.folder) if event == "complete" else "its process died"
        if reason is not None:
            self._listener.note(f"{plan.name} failed: {reason}")
            return "failed"
        if plan.pretraining or (plan.folder / "summary.json").exists():
            return "done"
        write_atomically(plan.folder / STOPPED_FILE, json.dumps({"stage": result.get("stage")}))
        return "stopped"

    def _show(self) -> None:
        states = list(self._states.values())
        fields: dict[str, str | int] = {
            "phase": self._phase,
            "running": states.count("running"),
            "done": states.count("done") + self._finished,
        }
        fields |= {state: states.count(state) for state in ("stopped", "failed") if state in states}
        if self._best is not None:
            fields["best"] = f"{100 * self._best[0]:.1f} % ({self._best[1]})"
        total = len(self._plans) + self._finished
        self._listener.update(sum(self._shares.values()) + self._finished, total, **fields)


# ---- around it --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tune_environment() -> Iterator[None]:
    """Sets Tune's switches and silences its log for as long as trials run: what failed is told once, at the end."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(TUNE_ENVIRONMENT)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _clean(folder: Path, outcome: SweepOutcome) -> None:
    """Removes what only an unfinished sweep needs."""
    for trial in outcome.trials:
        if trial.state == "stopped":
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
    if all(trial.state in ("finished", "stopped") for trial in outcome.trials):
        for trial in outcome.trials:
            shutil.rmtree(trial.folder / SNAPSHOTS, ignore_errors=True)
