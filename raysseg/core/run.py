"""Runs one variant from wherever it stands to its summary: iterations, metrics, checkpoints, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import RayActorError

from raysseg.core import checkpoint
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.capacity import check_resources, requested_resources
from raysseg.core.cluster import check_storage, check_versions, start_ray
from raysseg.core.config import SegmentationConfig
from raysseg.core.interruption import StopRequest
from raysseg.core.learner_client import lost_process
from raysseg.core.metrics_writer import MetricsWriter, write_atomically
from raysseg.core.progress import ProgressListener, Silent
from raysseg.core.settings import MethodSettings
from raysseg.core.telemetry import progress_fields
from raysseg.errors import InputError, LearnerLostError, Stopped

PACKAGES = (
    "raysseg",
    "ray",
    "torch",
    "torchvision",
    "segmentation-models-pytorch",
    "timm",
    "pyarrow",
    "gymnasium",
    "numpy",
)
DATASET_FILE = "dataset.json"
"""Beside a variant's settings: the classes it tells apart and where its data was."""


def package_versions() -> dict[str, str]:
    """Returns the versions of Python, the platform and everything that results depend on."""
    versions = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def run_variant(
    config: SegmentationConfig,
    folder: Path,
    *,
    resume: bool = False,
    listener: ProgressListener | None = None,
    after_iteration: Callable[[SegmentationAlgorithm], None] | None = None,
) -> dict[str, Any]:
    """Trains one variant to its end and returns its summary.

    Args:
        config: with settings applied; its `run_dir` must be `folder`.
        folder: where everything of the variant is written.
        resume: continue from the newest checkpoint, or return the summary of a finished variant.
        listener: is told the progress.
        after_iteration: called after every iteration, before its checkpoint.

    Raises:
        InputError: the folder holds a run already and `resume` is off, or there is no space left.
        NonFiniteError: a loss or a reward is not finite.
        LearnerLostError: learners or replay shards died more often than `engine.max_learner_restarts`.
        Stopped: a signal asked for it; a checkpoint was written, or the variant was finished.
    """
    settings, listener = config.settings, listener or Silent()
    assert settings is not None
    summary_path = folder / "summary.json"
    summary: dict[str, Any]
    if summary_path.exists() and resume:
        summary = json.loads(summary_path.read_text())
        return summary
    if (folder / "metrics.jsonl").exists() and not resume:
        raise InputError(
            f"The folder {folder} holds a run already; add --resume to continue it, or choose another --run-dir."
        )
    config.segmenter_spec().build()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    start_ray()
    config.see_cluster()
    check_resources(requested_resources(settings.engine, learner_gpus=config.num_gpus_per_learner), tell=listener.note)
    check_versions()
    check_storage(folder, config.store_uri)
    deaths = 0
    with StopRequest() as stop:
        while True:
            try:
                summary = _attempt(config, folder, stop, resume or deaths > 0, listener, after_iteration)
                break
            except (LearnerLostError, RayActorError) as error:
                # Ray's own error where the process was missed in a checkpoint or by the replay buffer, not in an update.
                lost = error if isinstance(error, LearnerLostError) else lost_process(error)
                deaths += 1
                if deaths > settings.engine.max_learner_restarts:
                    raise lost from None
                listener.note(
                    f"{lost} The run goes on from its newest checkpoint ({deaths} of "
                    f"{settings.engine.max_learner_restarts} times)."
                )
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise InputError(
                    f"There is no space left to write {error.filename or folder}; make room and continue with --resume."
                ) from error
    if stop.signal_number is not None:
        # Whoever asked meant the whole command, and more variants may follow.
        raise Stopped(
            f"Stopped by {signal.Signals(stop.signal_number).name} when {folder} was finished; continue with --resume.",
            stop.signal_number,
        )
    return summary


def _attempt(
    config: SegmentationConfig,
    folder: Path,
    stop: StopRequest,
    resume: bool,
    listener: ProgressListener,
    after_iteration: Callable[[SegmentationAlgorithm], None] | None,
) -> dict[str, Any]:
    """Builds actors and learners and trains from the newest whole checkpoint, or from the start, to the end."""
    found, passed_over = checkpoint.newest_usable(folder / "checkpoints") if resume else (None, [])
    for sentence in passed_over:
        listener.note(sentence)
    algorithm: SegmentationAlgorithm = config.build_algo()
    try:
        if found is not None:
            checkpoint.restore(algorithm, found)
            listener.note(f"resumed at iteration {algorithm.iteration} ({algorithm.position.phase})")
        else:
            algorithm.label_store.remove_after(0)
        algorithm.should_stop = lambda: stop.requested
        algorithm.note = listener.note
        writer = MetricsWriter(folder, algorithm.iteration)
        try:
            _iterate(algorithm, folder, writer, listener, stop, after_iteration)
            return _finish(algorithm, folder, writer)
        finally:
            writer.close()
    finally:
        algorithm.stop()


def _iterate(
    algorithm: SegmentationAlgorithm,
    folder: Path,
    writer: MetricsWriter,
    listener: ProgressListener,
    stop: StopRequest,
    after_iteration: Callable[[SegmentationAlgorithm], None] | None,
) -> None:
    engine, miou = algorithm.settings.engine, None
    settings = algorithm.settings
    tags = {"run": settings.recipe, "variant": settings.variant, "seed": str(settings.seed)}
    while not algorithm.done:
        start = time.perf_counter()
        algorithm.train()
        record = algorithm.record
        seconds = time.perf_counter() - start
        telemetry = algorithm.telemetry.snapshot()
        algorithm.telemetry.export(tags)
        writer.write(record, {"seconds": seconds, "images_per_second": algorithm.images_per_second, **telemetry})
        miou = record.get("miou", miou)
        fields = {"phase": record["phase"], "stage": record["stage"], "images_per_second": algorithm.images_per_second}
        fields |= {name: record[name] for name in ("loss", "reward") if record.get(name) is not None}
        if miou is not None:
            fields["miou"] = miou
        fields |= progress_fields(telemetry)
        listener.update(algorithm.iteration, algorithm.iteration + algorithm.iterations_left(), **fields)
        if after_iteration is not None:
            after_iteration(algorithm)
        due = record["phase_over"] or algorithm.iteration % engine.checkpoint_interval == 0
        # Looked at once: a signal that comes while this iteration is put away stops the run after the next one.
        number = stop.signal_number
        if due or number is not None:
            checkpoint.save(algorithm, folder / "checkpoints", keep=engine.checkpoints_kept)
        if number is not None and not algorithm.done:
            raise Stopped(
                f"Stopped by {signal.Signals(number).name} at iteration {algorithm.iteration} "
                f"({record['phase']}); a checkpoint was written, continue with --resume.",
                number,
            )


def _finish(algorithm: SegmentationAlgorithm, folder: Path, writer: MetricsWriter) -> dict[str, Any]:
    """Exports the networks, draws the pictures and writes the summary, in this order: a summary means that all is
    there.
    """
    settings = algorithm.settings
    module = algorithm.export(folder)
    dataset = {"store": algorithm.store.uri, "info": dataclasses.asdict(algorithm.store.info)}
    write_atomically(folder / DATASET_FILE, json.dumps(dataset, indent=1))
    stages = [row for row in writer.records() if row["phase"] == "evaluate"]
    last = stages[-1] if stages else {}
    if stages:
        algorithm.draw_pictures(module, folder / "pictures")
    info = algorithm.store.info
    summary = {
        "method": settings.method,
        "recipe": settings.recipe,
        "variant": settings.variant,
        "seed": settings.seed,
        "class_names": list(info.class_names),
        **{name: last.get(name) for name in algorithm.summary_numbers},
        "wall_seconds": algorithm.elapsed,
        "stages": stages,
        "complete": True,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return summary


def read_settings(folder: Path, model: type[MethodSettings]) -> MethodSettings:
    """Reads the settings that a variant was trained with.

    Raises:
        InputError: the folder is not a variant's.
    """
    from raysseg.configuration import load_settings

    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a trained variant: it has no config.yaml.")
    return load_settings(model, yaml.safe_load(path.read_text()), where=str(path))


def command_line() -> str:
    """Returns the command that this process runs, without the folders of the machine."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
