"""What one trial of a sweep reserves, and whether the cluster has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from raysseg.algorithms.sweep_settings import Sweep
from raysseg.core.settings import EngineSettings
from raysseg.errors import InputError

Bundle = dict[str, float]
"""Resources that must lie on one node."""


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


def trial_bundles(cpu: float, gpu: float, engine: EngineSettings) -> list[Bundle]:
    """Returns what a trial reserves: the main process first, then its actors and its learners."""
    learner_gpus = engine.num_gpus_per_learner
    if learner_gpus == "auto":
        learner_gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) else 0.0
    bundles = [{"CPU": cpu, "GPU": gpu}]
    bundles += [{"CPU": engine.num_cpus_per_env_runner, "GPU": engine.num_gpus_per_env_runner}] * engine.num_env_runners
    bundles += [{"CPU": engine.num_cpus_per_learner, "GPU": float(learner_gpus)}] * engine.num_learners
    return [kept for bundle in bundles if (kept := {name: amount for name, amount in bundle.items() if amount})]


def check_cluster(sweep: Sweep, trials: Mapping[str, Sequence[Bundle]]) -> None:
    """Compares what trials reserve with what the cluster has.

    Args:
        sweep: whose `concurrent` trials must fit together.
        trials: name to bundles.

    Raises:
        InputError: one trial, a part of it that must lie on one node, or all concurrent ones need more than there is.
    """
    total = {name: float(ray.cluster_resources().get(name, 0.0)) for name in ("CPU", "GPU")}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, bundles in trials.items():
        wanted = _sum(bundles)
        if any(wanted[kind] > total[kind] for kind in total):
            raise InputError(
                f"One trial of {sweep.where} ({name}) asks for {_words(wanted)} in {len(bundles)} processes, "
                f"but the cluster has {_words(total)}."
            )
        for bundle in bundles:
            if not any(all(node.get(kind, 0.0) >= amount for kind, amount in bundle.items()) for node in nodes):
                largest = {kind: max(float(node.get(kind, 0.0)) for node in nodes) for kind in total}
                raise InputError(
                    f"One process of a trial of {sweep.where} ({name}) asks for {_words(bundle)}, "
                    f"but the largest of {len(nodes)} nodes has {_words(largest)}."
                )
        count = min(sweep.settings.concurrent or 1, len(trials))
        if any(count * wanted[kind] > total[kind] for kind in total):
            raise InputError(
                f"{count} concurrent trials of {sweep.where} ask for "
                f"{_words({kind: count * amount for kind, amount in wanted.items()})}, "
                f"but the cluster has {_words(total)}."
            )


def _sum(bundles: Sequence[Bundle]) -> Bundle:
    return {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}


def _words(amounts: Mapping[str, float]) -> str:
    return " and ".join(
        f"{amounts.get(kind, 0.0):g} {kind}{'' if amounts.get(kind) == 1 else 's'}" for kind in ("CPU", "GPU")
    )
