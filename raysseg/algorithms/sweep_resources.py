"""What one trial of a sweep reserves, and whether the cluster has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ray

from raysseg.algorithms.sweep_settings import Sweep
from raysseg.core.capacity import ResourceRequest, check_resources, requested_resources
from raysseg.core.settings import EngineSettings

Bundle = dict[str, float]
"""Resources of one process, by Ray's names."""


def trial_gpus(sweep: Sweep, engine: EngineSettings) -> float:
    """Returns the GPUs of a trial's main process: what the file says, or by itself one GPU, shared by concurrent trials.
    Where a learner of its own has the GPU, the main process needs none.
    """
    wanted = sweep.settings.resources.gpu
    if wanted != "auto":
        return float(wanted)
    existing = float(ray.cluster_resources().get("GPU", 0.0))
    if existing == 0 or engine.num_learners > 0:
        return 0.0
    return min(1.0, existing / (sweep.settings.concurrent or 1))


def trial_requests(sweep: Sweep, engine: EngineSettings) -> list[ResourceRequest]:
    """Returns what a trial asks for: its main process first, then its actors and its learners."""
    learner_gpus = engine.num_gpus_per_learner
    if learner_gpus == "auto":
        learner_gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) > 0 else 0.0
    main = ResourceRequest(
        count=1,
        cpus=sweep.settings.resources.cpu,
        gpus=trial_gpus(sweep, engine),
        keys="{} of the sweep's resources",
    )
    return [main, *requested_resources(engine, learner_gpus=learner_gpus)]


def bundles_of(requests: Sequence[ResourceRequest]) -> list[Bundle]:
    """Returns the bundles of a trial's placement group, one per process that reserves something."""
    return [request.bundle for request in requests for _ in range(request.count) if request.bundle]


def check_sweep(sweep: Sweep, trials: Sequence[Sequence[ResourceRequest]], *, tell: Callable[[str], None]) -> None:
    """Checks that every trial fits on the cluster, together with as many others as run at the same time.

    Args:
        sweep: with `concurrent`.
        trials: what each asks for.
        tell: is given one sentence where the sweep has to wait for other jobs or for new nodes.

    Raises:
        InputError: naming what is asked for, by which keys, and what exists.
    """
    count = min(sweep.settings.concurrent or 1, len(trials))
    prefix = "concurrent × " if count > 1 else ""
    seen: list[Sequence[ResourceRequest]] = []
    for requests in trials:
        if requests in seen:
            continue
        seen.append(requests)
        together = [
            dataclasses.replace(request, count=count * request.count, keys=f"{prefix}{request.keys}")
            for request in requests
        ]
        check_resources(together, tell=tell)
