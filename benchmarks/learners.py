"""Learners in parallel: two against one with the same minibatches, and what an update costs beside its networks.

    python benchmarks/learners.py                         # one thread for every learner
    python benchmarks/learners.py --case acdc-crop --updates 4

Two against one: both groups are RLlib's, with their learners in processes of their own, and start from the same weights.
They take turns on the same work, so that a busy machine slows both; an update is over when all its learners have
answered. Reading ahead is off, as it would give one learner a second core. Printed are the ratios of updates per second of
the segmenter's and of the operators' update, and how far the losses of both are apart: in the first update, which has
the same weights, in the second, which has the first one's gradients in them, and at most in all. Untrained networks at
a recipe's learning rate make more of rounding with every update: how much more says one learner against itself with
the images of every minibatch in another order, where the losses should be the same.

Beside the networks: every moment of an operator update, from drawing the transitions (`ReplayBuffer.sample`) to the
answer, is given to one of three groups, in this process and with nothing read ahead.
- sampler and rebuild: drawing, decoding label maps, images and crops, probabilities at the image's resolution, the
  window's counts, the operators' planes;
- networks: passes of segmenter, virtual step, searcher, assessor and targets, backward passes, optimisers;
- the rest: moving averages, numbers, bookkeeping.
What the learner still waits for where the next transitions are announced is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import ray
import rollout as rollouts
import torch
from ray.rllib.core.learner.learner_group import LearnerGroup
from rollout import Case, Stopwatch
from scenes import write_scenes

from raysseg.algorithms.eil import learner as learner_module
from raysseg.algorithms.eil import state as state_module
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.env_runner import EILEnvRunner
from raysseg.algorithms.eil.learner import EILLearner
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.algorithms.recipes import load_recipe
from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.seeding import draw_seeds, generator
from raysseg.core.settings import ReplaySettings
from raysseg.core.work import LearnerWork

IMAGES, TRANSITIONS, SCHEDULE = 16, 32, 1_000_000
SAMPLER, NETWORKS, OTHER = "sampler and rebuild", "networks", "the rest"
CASES = {
    "acdc-crop": Case("eil-acdc", "ps+pa", (), (144, 144), (112, 112), 4, 8),
    "camvid-crop": rollouts.CASES["camvid-crop"],
    "camvid": rollouts.CASES["camvid"],
    "paper": rollouts.CASES["paper"],
}


class Bench(NamedTuple):
    """A case's settings and store, and transitions that an actor played on it."""

    settings: EILSettings
    store_uri: str
    folder: Path
    records: pa.RecordBatch

    def config(self, learners: int) -> EILConfig:
        """Returns RLlib's configuration with so many learners; 0 is one in this process."""
        engine = self.settings.engine.model_copy(
            update={"num_learners": learners, "num_env_runners": min(1, learners), "prefetch": 0}
        )
        settings = self.settings.model_copy(update={"engine": engine})
        config = EILConfig().apply(settings, run_dir=str(self.folder), store_uri=self.store_uri)
        assert isinstance(config, EILConfig)
        return config


def make_bench(case: Case, precision: str, folder: Path) -> Bench:
    """Writes scenes and plays transitions on them."""
    settings = load_recipe(
        case.recipe,
        [
            "data.train_split=train",
            "segmenter.weights=none",
            "eil.operators.weights=none",
            f"training.augmentation.crop={list(case.crop)}",
            f"training.batch_size={case.batch}",
            f"eil.exploration.batch_size={case.batch}",
            f"eil.exploration.rollout_batch_size={case.batch}",
            f"engine.precision={precision}",
            "engine.torch_threads=1",
            "engine.num_gpus_per_learner=0",
            *case.overrides,
        ],
    ).settings(case.variant, seed=0)
    assert isinstance(settings, EILSettings)
    store = write_scenes(folder / "data", IMAGES, *case.size, case.classes)
    bench = Bench(settings, store.uri, folder, rollout.order(np.arange(0), np.arange(0)))
    config = bench.config(0)
    runner = EILEnvRunner(config=config, worker_index=0)
    runner.share_module(config.get_multi_rl_module_spec().build())
    context: dict[str, Any] = {"stage": 1, "label_version": 0, "segmenter_version": 0, "policy_version": 0}
    context |= {"noise_std": settings.eil.exploration.noise_std, "uniform_share": 0.0}
    count = min(TRANSITIONS, 4 * case.batch)
    batches = [
        runner.sample(
            records=rollout.order(
                np.arange(first, first + case.batch) % IMAGES, draw_seeds(0, "benchmark", first, count=case.batch)
            ),
            context=context,
        )
        for first in range(0, count, case.batch)
    ]
    return bench._replace(records=pa.Table.from_batches(batches).combine_chunks().to_batches()[0])


# ---- two learners against one -----------------------------------------------------------------------------------------


def segmenter_work(bench: Bench, number: int) -> LearnerWork:
    """Returns one minibatch of the segmenter's update."""
    size = bench.settings.training.batch_size
    return LearnerWork(
        kind="segmenter",
        records=rollout.order((number * size + np.arange(size)) % IMAGES, draw_seeds(0, "work", number, count=size)),
        minibatches=(size,),
        context={
            "version": 0,
            "first_update": number,
            "total_updates": SCHEDULE,
            "learning_rate": bench.settings.training.optimiser.learning_rate,
            "epoch_ends": [],
            "seed": 0,
        },
    )


def operator_work(bench: Bench, number: int) -> LearnerWork:
    """Returns one minibatch of the operators' update."""
    size = bench.settings.eil.exploration.batch_size
    rows = (number * size + np.arange(size)) % bench.records.num_rows
    context = {"update": number, "total_updates": SCHEDULE, "seed": 0}
    return LearnerWork(kind="operators", records=bench.records.take(pa.array(rows)), context=context)


def difference(found: dict[str, float], expected: dict[str, float], losses: tuple[str, ...]) -> float:
    """Returns the largest relative difference between losses."""
    if not all(math.isfinite(expected[loss]) for loss in losses):
        raise SystemExit(f"a loss is not finite: {expected}")
    return max(abs(found[loss] - expected[loss]) / abs(expected[loss]) for loss in losses)


def turned(work: LearnerWork) -> LearnerWork:
    """Returns the same work with its records in the opposite order."""
    assert work.records is not None
    backwards = work.records.take(pa.array(np.arange(work.records.num_rows)[::-1].copy()))
    return dataclasses.replace(work, records=backwards)


def compare(bench: Bench, kind: str, updates: int) -> None:
    """Prints the ratio of updates per second, and how far the losses of both are apart."""
    make, losses = KINDS[kind]
    groups: list[LearnerGroup] = []
    for learners in (1, 2, 1):
        config = bench.config(learners)
        groups.append(config.build_learner_group(rl_module_spec=config.get_multi_rl_module_spec()))
    seconds: list[list[float]] = [[], [], []]
    apart: list[list[float]] = [[], []]
    # The first turn warms caches up and is not timed.
    for turn in range(updates + 1):
        found = []
        for group, spent in zip(groups, seconds, strict=True):
            work = make(bench, turn)
            start = time.perf_counter()
            found.append(group.update(training_data=turned(work) if group is groups[2] else work)[0])
            spent.append(time.perf_counter() - start)
        for other, values in zip(found[1:], apart, strict=True):
            values.append(difference(other, found[0], losses))
    single, double, _ = (statistics.median(spent[1:]) for spent in seconds)
    print(
        f"  {kind}: {1e3 * single:.0f} ms with one learner, {1e3 * double:.0f} ms with two; "
        f"updates/s two : one {single / double:.2f}"
    )
    for name, values in zip(("two learners", "one, images in another order"), apart, strict=True):
        print(
            f"    losses of {name}: apart by {values[0]:.1e} in the first update, {values[1]:.1e} in the second, "
            f"at most {max(values):.1e} in {updates + 1} (relative)"
        )
    for group in groups:
        group.shutdown()


KINDS: dict[str, tuple[Callable[[Bench, int], LearnerWork], tuple[str, ...]]] = {
    "operators": (operator_work, ("assessor_loss", "searcher_loss")),
    "segmenter": (segmenter_work, ("loss",)),
}


# ---- beside the networks ----------------------------------------------------------------------------------------------


class UpdateWatch(Stopwatch):
    """A stopwatch that gives all of the virtual step, and all of a backward pass, to the networks."""

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time given to `part`, or to the networks where it runs inside one."""
        outer = super().timed(part, function)

        def run(*args: Any, **kwargs: Any) -> Any:
            return (function if self._running[-1] == NETWORKS else outer)(*args, **kwargs)

        return run


@contextlib.contextmanager
def watched(watch: UpdateWatch, learner: EILLearner) -> Iterator[None]:
    """Puts the stopwatch around every part of an operator update."""
    segmenter, operators = learner._segmenter_module().online, learner._operators()
    parts: list[tuple[Any, str, str]] = [
        (ReplayBuffer, "sample", SAMPLER),
        (EILLearner, "prepare_operators", SAMPLER),
        (EILLearner, "_rebuild", SAMPLER),
        (state_module, "operator_planes", SAMPLER),
        (segmenter, "encode", NETWORKS),
        (segmenter, "decode", NETWORKS),
        (state_module, "virtual_step", NETWORKS),
        (torch.Tensor, "backward", NETWORKS),
        (learner_module, "soft_update", OTHER),
    ]
    for name in ("searcher", "assessor"):
        parts.append((getattr(operators, name), "forward", NETWORKS))
        parts.append((getattr(operators, f"target_{name}"), "forward", NETWORKS))
        parts.append((learner.get_optimizer(OPERATORS, name), "step", NETWORKS))
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield


def beside(bench: Bench, updates: int) -> None:
    """Prints the share of an operator update that sampler and rebuild take, and what is waited for with announcements."""
    config = bench.config(0)
    learner = EILLearner(config=config, module_spec=config.get_multi_rl_module_spec())
    learner.build()
    replay = ReplayBuffer(ReplaySettings(capacity=TRANSITIONS))
    replay.add(bench.records)
    size = bench.settings.eil.exploration.batch_size
    watch, rounds = UpdateWatch(torch.device("cpu")), []
    with watched(watch, learner):
        for turn in range(updates + 1):
            watch.restart()
            drawn = replay.sample(size, generator(0, "replay", turn))
            context = {"update": turn, "total_updates": SCHEDULE, "seed": 0}
            learner.update(training_data=LearnerWork(kind="operators", records=drawn, context=context))
            watch.turn()
            if turn:
                rounds.append(watch.spent)
    text = []
    for group in (SAMPLER, NETWORKS, rollouts.REST):
        parts = (group, OTHER) if group == rollouts.REST else (group,)
        wall, cpu = (rollouts.share(rounds, clock, parts) for clock in (0, 1))
        text.append(f"{group} {wall:.1f} / {cpu:.1f} %")
    total = 1e3 * statistics.median(float(sum(value[0] for value in spent.values())) for spent in rounds)
    print(f"  operator update in one process, {total:.0f} ms; wall / CPU time: {', '.join(text)}")
    learner.shutdown()


def ahead(bench: Bench, updates: int) -> None:
    """Prints what the learner waits for where the next transitions are announced."""
    config = bench.config(0)
    engine = config.settings.engine.model_copy(update={"prefetch": 1})
    config.settings = config.settings.model_copy(update={"engine": engine})
    learner = EILLearner(config=config, module_spec=config.get_multi_rl_module_spec())
    learner.build()
    shares, works = [], [operator_work(bench, turn) for turn in range(updates + 2)]
    for work, following in itertools.pairwise(works):
        work.upcoming = following.records
        timing = learner.update(training_data=work)["timing"]
        shares.append(100 * timing["prepare_seconds"] / timing["busy_seconds"])
    print(
        f"  with the next transitions announced, waiting for them is {statistics.median(shares[1:]):.2f} % of an update"
    )
    learner.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="Two learners against one; an update beside its networks.")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="default: acdc-crop and camvid-crop")
    parser.add_argument("--updates", type=int, default=5, help="timed updates of each kind (default: 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--batch", type=int, help="images of a minibatch, instead of the case's")
    parser.add_argument(
        "--only", action="append", choices=(*KINDS, "beside"), help="what to measure of this (default: all three)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, ray {ray.__version__}, CPU, one thread for every learner, {options.precision}")
    for name in options.case or ("acdc-crop", "camvid-crop"):
        case = CASES[name]._replace(**({"batch": options.batch} if options.batch else {}))
        wanted = options.only or (*KINDS, "beside")
        print(f"\n{name}: {case.recipe}, crop {list(case.crop)}, {case.classes} classes, minibatches of {case.batch}")
        with tempfile.TemporaryDirectory() as folder:
            bench = make_bench(case, options.precision, Path(folder))
            if "beside" in wanted:
                beside(bench, options.updates)
                ahead(bench, options.updates)
            for kind in KINDS:
                if kind in wanted:
                    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=300 * 2**20)
                    compare(bench, kind, options.updates)
                    ray.shutdown()


if __name__ == "__main__":
    main()
