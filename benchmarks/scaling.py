"""Weak scaling: two actors against one, and one learner with up to 64 actors that replay recorded rollouts.

Real actors: rollouts per second of two actors and of one, one thread each, on the same orders; of EIL windows, of RALIS
(`--only labelling`) whole played episodes, of CiSS-Net (`--only contexts`) crops of eight steps.
Simulated actors: recorded rollouts come back after the time that keeps the learner just supplied, from actors that do
nothing else, so that the machine's cores belong to the learner and the driver. Printed for each number of actors: the
learner's time per update, its idle share, and the driver's CPU time over wall time.
Loops (`--only contexts`): images per second that CiSS-Net learns from in its synchronous loop with one actor and with two, and in
its asynchronous loop with two; same plan, crops per update and weights, the learner in a process of its own. Both an actor and
the learner make X of every crop; then an actor passes T steps without gradient, and the learner T + 1 with a backward pass, so
an update hardly takes less than its rollout. What asynchrony can win is the time in which one waits for the other: on two
cores, with an actor's seconds a and the learner's l for the same images, at most 1 + a / l where a ≤ l. Where X takes most of
the time, as with the paper's encoder (ResNet-101 at stride 8) under small networks on X, a is near l, and the only actor is
what the synchronous learner waits for: the case 'deep encoder'. 'recipe' is `cissnet-camvid` as it is, whose learner is the
bottleneck. a / l is measured and printed, with what it allows. No delay is simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from scenes import write_scenes

from raysseg.algorithms.cissnet.algorithm import CiSSNet
from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.module import CONTEXT
from raysseg.algorithms.cissnet.plan import ContextPlan
from raysseg.algorithms.eil.algorithm import EIL
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.algorithms.eil.plan import ExplorationPlan
from raysseg.algorithms.ralis.algorithm import RALIS
from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.module import QUERY, START
from raysseg.algorithms.ralis.plan import PlayPlan
from raysseg.algorithms.recipes import load_recipe
from raysseg.core.actor_pool import ActorPool
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.asynchronous import AsynchronousLoop
from raysseg.core.modules import SEGMENTER
from raysseg.data import Store

SIMULATED_PER_PROCESS = 32
CONTEXT_CASES: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "deep encoder": ("segmenter.encoder=resnet101", "segmenter.encoder_depth=5"),
}
LOOPS = {
    "synchronous, 1 actor": (1, "synchronous"),
    "synchronous, 2 actors": (2, "synchronous"),
    "asynchronous, 2 actors": (2, "asynchronous"),
}
AHEAD = 4
"""Updates after the timed ones that the asynchronous loop still has orders for: as many as rollouts wait at most."""


@ray.remote(num_cpus=0)
class Simulator:
    """Many simulated actors in one process: each answers an order with a recorded rollout after a fixed time."""

    def __init__(self, rollout: pa.RecordBatch, seconds: float, count: int) -> None:
        self.rollout, self.seconds = rollout, seconds
        self.turns = [asyncio.Lock() for _ in range(count)]

    async def play(self, number: int, order: Any) -> tuple[pa.RecordBatch, None]:
        """Waits its turn as an actor would, then for the rollout's time, and answers."""
        async with self.turns[number]:
            await asyncio.sleep(self.seconds)
        version = order.arguments["context"]["policy_version"]
        column = self.rollout.schema.get_field_index("policy_version")
        versions = pa.array([version] * self.rollout.num_rows, type=pa.int32())
        return self.rollout.set_column(column, self.rollout.schema.field(column), versions), None


class _Call:
    def __init__(self, simulator: Any, number: int) -> None:
        self._simulator, self._number = simulator, number

    def remote(self, order: Any) -> ray.ObjectRef:
        """Sends an order."""
        return self._simulator.play.remote(self._number, order)


class SimulatedHandle:
    """One simulated actor under the name that an actor's handle has."""

    def __init__(self, simulator: Any, number: int) -> None:
        self.apply = _Call(simulator, number)


def overrides_of(actors: int, learners: int, **engine: Any) -> list[str]:
    """Returns what both recipes are changed by: random weights, one thread for every process."""
    return [
        "segmenter.weights=none",
        "data.train_split=train",
        "engine.precision=fp32",
        "engine.torch_threads=1",
        f"engine.num_env_runners={actors}",
        f"engine.num_learners={learners}",
        "engine.num_gpus_per_learner=0",
        "engine.num_cpus_per_env_runner=0.5",
        *(f"engine.{name}={value}" for name, value in engine.items()),
    ]


def make_settings(actors: int, learners: int, **engine: Any) -> EILSettings:
    """Returns the ACDC recipe's networks and sizes."""
    overrides = ["eil.operators.weights=none", *overrides_of(actors, learners, **engine)]
    settings = load_recipe("eil-acdc", overrides).settings("ps+pa", seed=0)
    assert isinstance(settings, EILSettings)
    return settings


def build(settings: EILSettings, folder: Path, store: Store) -> EIL:
    """Builds the algorithm with its actors and learners."""
    algorithm = EILConfig().apply(settings, run_dir=str(folder), store_uri=store.uri).build_algo()
    assert isinstance(algorithm, EIL)
    return algorithm


class Alone:
    """Orders that an actor performs one after the other in a single call: no driver, no messages in between."""

    def __init__(self, orders: Sequence[Mapping[str, Any]], weights: Any) -> None:
        self.orders, self.weights = orders, weights

    def __call__(self, runner: Any) -> None:
        """Plays all orders."""
        runner.pull_weights(self.weights)
        for order in self.orders:
            runner.sample(**order)


def exploring_actors(folder: Path, store: Store, rollouts: int) -> None:
    """Compares one actor of EIL with two."""
    algorithm = build(make_settings(2, 0), folder / "real", store)
    algorithm.publish(SEGMENTER, OPERATORS)
    plan = ExplorationPlan(algorithm, 1)
    compare_actors("EIL", algorithm, [plan.rollout_order(number, 0) for number in range(rollouts)], turns=5)


def labelling_actors(folder: Path, episodes: int) -> None:
    """Compares one actor of RALIS with two: whole episodes of the CamVid recipe, of three steps each."""
    store = write_scenes(folder / "labelling-data", 200, 180, 240, 11)
    overrides = ["ralis.learning.budget=72", "ralis.budgets=[24]", *overrides_of(2, 0, stall_seconds=600)]
    settings = load_recipe("ralis-camvid", overrides).settings("query", seed=0)
    assert isinstance(settings, RALISSettings)
    algorithm = RALISConfig().apply(settings, run_dir=str(folder / "labelling"), store_uri=store.uri).build_algo()
    assert isinstance(algorithm, RALIS)
    algorithm.publish(START, QUERY)
    plan = PlayPlan(algorithm)
    compare_actors("RALIS", algorithm, [plan.rollout_order(number, 0) for number in range(episodes)], turns=3)


def build_contexts(case: str, actors: int, mode: str, folder: Path, store: Store, updates: int) -> CiSSNet:
    """Builds CiSS-Net in the layout of a loop, with the learner in a process of its own."""
    overrides = overrides_of(actors, 1, mode=mode, stall_seconds=600)
    # The recipe's precision is part of what is compared.
    overrides.remove("engine.precision=fp32")
    overrides += [f"cissnet.learning.updates={updates}", *CONTEXT_CASES[case]]
    settings = load_recipe("cissnet-camvid", overrides).settings("cissnet", seed=0)
    assert isinstance(settings, CiSSNetSettings)
    algorithm = CiSSNetConfig().apply(settings, run_dir=str(folder), store_uri=store.uri).build_algo()
    assert isinstance(algorithm, CiSSNet)
    algorithm.publish(SEGMENTER, CONTEXT)
    return algorithm


def context_plan(algorithm: CiSSNet) -> ContextPlan:
    """Returns the plan of updates with contexts."""
    return ContextPlan(algorithm, steps=algorithm.settings.cissnet.episode_steps, first=0)


def context_loops(folder: Path, rollouts: int, updates: int, cases: Sequence[str]) -> None:
    """Compares one actor of CiSS-Net with two, and its loops."""
    store = write_scenes(folder / "context-data", 64, 180, 240, 11)
    for case in cases:
        place = folder / f"contexts-{case.replace(' ', '-')}"
        algorithm = build_contexts(case, 2, "synchronous", place / "actors", store, 1)
        plan = context_plan(algorithm)
        orders = [plan.rollout_order(number, 0) for number in range(rollouts)]
        compare_actors(f"CiSS-Net, {case}", algorithm, orders, turns=3)
        rates: dict[str, float] = {}
        for name, (actors, mode) in LOOPS.items():
            algorithm = build_contexts(case, actors, mode, place / name.replace(" ", "-"), store, updates + 2 + AHEAD)
            rates[name], text = time_loop(algorithm, updates)
            print(f"  {case}, {name}: {rates[name]:.2f} images/s, {text}", flush=True)
        first, second, third = rates.values()
        print(
            f"{case}: asynchronous with 2 actors is {third / first:.2f} times synchronous with 1, {third / second:.2f} times 2",
            flush=True,
        )


def time_loop(algorithm: CiSSNet, updates: int) -> tuple[float, str]:
    """Returns the images per second of a loop in its stride, and what its learner did meanwhile."""
    settings, telemetry = algorithm.settings, algorithm.telemetry
    loop = algorithm.enter_loop(
        lambda: context_plan(algorithm), updates=settings.cissnet.learning.updates, done=0, modules=(CONTEXT,)
    )
    loop.run(2)
    telemetry.snapshot()
    start = time.perf_counter()
    loop.run(updates)
    wall = time.perf_counter() - start
    numbers = telemetry.snapshot()
    busy = numbers["learner_busy_share"]
    text = f"an update every {wall / updates:.3f} s, the learner busy {100 * busy:.0f} % of it"
    if settings.engine.mode == "synchronous" and settings.engine.num_env_runners == 1:
        ratio = (1 - busy) / busy
        text += f": a / l {ratio:.2f}, which allows {1 + ratio if ratio < 1 else 2:.2f} times on two cores"
    else:
        text += f", lag {numbers.get('policy_lag_mean', 0):.1f}"
    algorithm.leave_loop(over=True)
    algorithm.stop()
    return settings.cissnet.learning.batch_size * updates / wall, text


def compare_actors(name: str, algorithm: SegmentationAlgorithm, orders: Sequence[Any], *, turns: int) -> None:
    """Prints rollouts per second of one and of two actors, in turns, and what two processes reach without a driver."""
    assert algorithm.pool is not None
    rollouts = len(orders)
    handles = dict(algorithm.pool._handles)
    chosen = {count: dict(list(handles.items())[:count]) for count in (1, 2)}
    pools = {count: ActorPool(chosen[count], stall_seconds=600) for count in (1, 2)}
    rates: dict[tuple[str, int], list[float]] = {}
    for turn in range(turns):
        for count in (1, 2):
            start = time.perf_counter()
            pools[count].map("sample", orders, algorithm.weights)
            middle = time.perf_counter()
            shares = [Alone(orders[first::count], algorithm.weights) for first in range(count)]
            ray.get([one.apply.remote(share) for one, share in zip(chosen[count].values(), shares, strict=True)])
            if turn:
                rates.setdefault(("pool", count), []).append(rollouts / (middle - start))
                rates.setdefault(("alone", count), []).append(rollouts / (time.perf_counter() - middle))
    algorithm.stop()
    found = {key: statistics.median(values) for key, values in rates.items()}
    for kind, text in (("pool", "ordered by the driver"), ("alone", "all orders in one call, no driver")):
        one, two = found[kind, 1], found[kind, 2]
        print(
            f"real actors of {name}, {text}: 1 gives {one:.3f} rollouts/s, 2 give {two:.3f}: {two / one:.2f} times",
            flush=True,
        )


def simulated_actors(folder: Path, store: Store, counts: list[int], updates: int, interval: int) -> None:
    """Prints the learner's time per update, its idle share and the driver's CPU share for each number of actors."""
    settings = make_settings(1, 1, mode="asynchronous")
    algorithm = build(settings, folder / "simulated", store)
    assert algorithm.pool is not None
    algorithm.publish(SEGMENTER, OPERATORS)
    recorded = algorithm.pool.map("sample", [ExplorationPlan(algorithm, 1).rollout_order(0, 0)], algorithm.weights)[0]
    algorithm.replay.add(recorded)
    work = ExplorationPlan(algorithm, 1).work(0)
    for _ in range(3):
        start = time.perf_counter()
        algorithm.learn(work)
        seconds = time.perf_counter() - start
    print(
        f"simulated actors: an update takes {seconds:.3f} s, a rollout of {recorded.num_rows} transitions 0.8 of it; "
        f"weights are published every {interval} updates"
    )
    first = None
    for count in counts:
        processes = -(-count // SIMULATED_PER_PROCESS)
        options = {"max_concurrency": 4 * SIMULATED_PER_PROCESS}
        simulators = [
            Simulator.options(**options).remote(recorded, 0.8 * seconds, SIMULATED_PER_PROCESS)
            for _ in range(processes)
        ]
        handles = {
            number: SimulatedHandle(simulators[number % processes], number // processes) for number in range(count)
        }
        pool = ActorPool(handles, stall_seconds=600)  # type: ignore[arg-type]
        changes = {"rollouts_per_update": float(count), "num_env_runners": count, "broadcast_interval": interval}
        engine = settings.engine.model_copy(update=changes)
        algorithm.replay.drop_older(segmenter_version=1 << 30, policy_version=0)
        loop = AsynchronousLoop(
            pool=pool,
            learner=algorithm.learner,
            plan=ExplorationPlan(algorithm, 1),
            engine=engine,
            telemetry=algorithm.telemetry,
            updates=updates + 5,
            policy_version=algorithm.policy_version,
            modules=(OPERATORS,),
        )
        loop.run(5)
        algorithm.telemetry.snapshot()
        wall, cpu = time.perf_counter(), time.process_time()
        loop.run(updates)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        numbers = algorithm.telemetry.snapshot()
        loop.close()
        busy = numbers["learner_busy_share"] * wall / updates
        first = first or busy
        print(
            f"  {count:3d} actors: learner {1e3 * busy:7.1f} ms per update ({busy / first:.2f} of 1 actor's), idle "
            f"{100 * numbers['learner_idle_share']:4.1f} %, driver {cpu / wall:.2f} cores, "
            f"{numbers['rollouts_per_second']:.1f} rollouts/s, lag {numbers.get('policy_lag_mean', 0):.1f}",
            flush=True,
        )
        for simulator in simulators:
            ray.kill(simulator)
    algorithm.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times actors and learner as their number grows.")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of simulated actors")
    parser.add_argument("--updates", type=int, default=20, help="timed updates for each (default: 20)")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts in a turn of real actors (default: 8)")
    parser.add_argument("--broadcast-interval", type=int, default=1, help="updates between publications (default: 1)")
    parser.add_argument("--only", choices=("real", "labelling", "contexts", "simulated"), help="one of the four parts")
    parser.add_argument("--case", action="append", choices=tuple(CONTEXT_CASES), help="of contexts (default: both)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    print(f"torch {torch.__version__}, Ray {ray.__version__}, {os.cpu_count()} cores, one thread for every process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_scenes(folder / "data", 64, 144, 144, 4)
        if options.only in (None, "real"):
            exploring_actors(folder, store, options.rollouts)
        if options.only in (None, "labelling"):
            labelling_actors(folder, options.rollouts)
        if options.only in (None, "contexts"):
            context_loops(folder, options.rollouts, options.updates, options.case or tuple(CONTEXT_CASES))
        if options.only in (None, "simulated"):
            simulated_actors(folder, store, options.actors, options.updates, options.broadcast_interval)
    ray.shutdown()


if __name__ == "__main__":
    main()
