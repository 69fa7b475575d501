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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator

from raysseg.algorithms.recipes import set_value
from raysseg.algorithms.sweep_points import Axis, Job, plan_jobs, pretraining_digest
from raysseg.algorithms.sweep_progress import SweepProgress, SweepWatcher, failure_of
from raysseg.algorithms.sweep_resources import Bundle, bundles_of, check_sweep, trial_gpus, trial_requests
from raysseg.algorithms.sweep_results import STOPPED_FILE, SweepOutcome, collect, write_results
from raysseg.algorithms.sweep_schedulers import Population, StageHalving, plain_scheduler
from raysseg.algorithms.sweep_settings import Sweep
from raysseg.algorithms.sweep_trial import SNAPSHOTS, Origin, TrialPlan, evaluations, train_trial
from raysseg.core.cluster import check_storage, check_versions, start_ray
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
    plans = {
        job.name: TrialPlan(
            name=job.name,
            folder=folder / "variants" / job.label / f"seed-{job.seed}",
            recipe=job.recipe,
            label=job.label,
            seed=job.seed,
            store_uri=stores[_data_of(job)],
            pretrained=_given_segmenter(job),
            values=job.values,
        )
        for job in jobs
    }
    requests = {name: trial_requests(sweep, plan.settings().engine) for name, plan in plans.items()}
    check_sweep(sweep, list(requests.values()), tell=listener.note)
    _check_weights(plans.values())
    check_versions()
    folder.mkdir(parents=True, exist_ok=True)
    for uri in stores.values():
        check_storage(folder, uri)
    bundles = {name: bundles_of(asked) for name, asked in requests.items()}
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
    # Data that were built before something else was refused are no sweep.
    if folder.is_dir() and any(path.name != "data" for path in folder.iterdir()) and not resume:
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


def _given_segmenter(job: Job) -> Path | None:
    """The pre-trained segmenter that a recipe names, with `{seed}` filled in."""
    given = job.settings().training.pretrained
    return None if given is None else Path(given.replace("{seed}", str(job.seed)))


def _check_weights(plans: Iterable[TrialPlan]) -> None:
    """Builds every distinct segmenter once, so that weights that are missing are noticed before a trial starts."""
    seen = []
    for plan in plans:
        settings = plan.settings()
        network = (settings.segmenter, settings.training.pretrained)
        if network not in seen:
            seen.append(network)
            plan.config(settings).segmenter_spec().build()


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
    digests = {
        job.name: pretraining_digest(job)
        for job in jobs
        if plans[job.name].pretrained is None and job.settings().training.pretrain_epochs > 0
    }
    several = len(set(digests.values())) > len({job.seed for job in jobs})
    for job in jobs:
        digest = digests.get(job.name)
        if digest is None:
            continue
        where = folder / "pretrain" / (f"{digest}/seed-{job.seed}" if several else f"seed-{job.seed}")
        name = f"pretrain/{digest}/seed-{job.seed}"
        plan = dataclasses.replace(plans[job.name], name=name, folder=where, pretraining=True, values={})
        shared.setdefault(name, plan)
        users.setdefault(name, []).append(job.name)
        plans[job.name] = dataclasses.replace(plans[job.name], pretrained=where / SEGMENTER)
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
    trainable = functools.partial(
        train_trial, plans=dict(plans), metric=settings.metric, interval=interval, workplace=Path.cwd()
    )
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
    watch = SweepProgress(sweep, plans, listener, phase=phase, finished=finished)
    with SweepWatcher.watching(watch):
        grid = tuner.fit()
    shutil.rmtree(storage, ignore_errors=True)
    died = {trial_name(result): result.error for result in grid if result.error is not None}
    return {name: reason for name, plan in plans.items() if (reason := failure_of(plan.folder, died.get(name)))}


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
