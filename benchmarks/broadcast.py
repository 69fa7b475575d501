"""Weights from the learner to an actor on the same node, against memory bandwidth.

    python benchmarks/broadcast.py                        # ResNet-34 operators of the paper's sizes
    python benchmarks/broadcast.py --backbone resnet18 --turns 20

The way of the weights:
1. publish: the learner's parameters and buffers as contiguous arrays (`publish_weights`); nothing is copied on a CPU;
2. store: Ray copies the arrays into the node's object store, once, however many actors there are; another node would
   receive them over the network once;
3. get: an actor sees them in shared memory; nothing is copied;
4. load: an actor copies them into its networks (`load_weights`); each actor does so for itself.

Against them stands one NumPy copy of as many bytes between two arrays that are in memory already, timed in turns with
the others. `times` is a step's time over that copy's. The learner's publish and store run in a process of its own, as an
update's answer, and the actor is another process; the driver only sees references. The store's own part is measured
beside it by putting arrays of the same size from this process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from scenes import write_scenes

from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.learner import EILLearner
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.algorithms.recipes import load_recipe
from raysseg.core.weights import load_weights, weights_bytes


def make_config(backbone: str, folder: Path) -> EILConfig:
    """Returns EIL on the paper's 21 classes with random weights."""
    settings = load_recipe(
        "eil-voc",
        [
            "data.train_split=train",
            "segmenter.weights=none",
            "eil.operators.weights=none",
            f"eil.operators.backbone={backbone}",
            "engine.num_gpus_per_learner=0",
            "engine.num_env_runners=0",
            "engine.num_learners=0",
            "engine.torch_threads=1",
        ],
    ).settings("ps+pa", seed=0)
    assert isinstance(settings, EILSettings)
    store = write_scenes(folder / "data", 2, 64, 64, 21)
    config = EILConfig().apply(settings, run_dir=str(folder), store_uri=store.uri)
    assert isinstance(config, EILConfig)
    return config


@ray.remote(num_cpus=1)
class Publisher:
    """A learner in a process of its own."""

    def __init__(self, config: EILConfig) -> None:
        torch.set_num_threads(1)
        self.learner = EILLearner(config=config, module_spec=config.get_multi_rl_module_spec())
        self.learner.build()

    def ready(self) -> None:
        """Answers when the learner is built."""

    def publish(self, name: str) -> tuple[float, Any]:
        """Returns the seconds that publishing took, and the weights, as two answers."""
        start = time.perf_counter()
        packed = self.learner.publish_weights((name,))
        return time.perf_counter() - start, packed


@ray.remote(num_cpus=1)
class Actor:
    """An actor's networks in a process of their own."""

    def __init__(self, config: EILConfig) -> None:
        torch.set_num_threads(1)
        self.module = config.get_multi_rl_module_spec(inference_only=True).build()

    def ready(self) -> None:
        """Answers when the networks are built."""

    def load(self, wrapped: list[ray.ObjectRef]) -> tuple[float, float]:
        """Returns the seconds that getting and loading took."""
        start = time.perf_counter()
        packed = ray.get(wrapped[0])
        got = time.perf_counter()
        load_weights(self.module, packed)
        return got - start, time.perf_counter() - got


def seconds(function: Callable[[], Any]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(config: EILConfig, name: str, turns: int) -> tuple[int, dict[str, list[float]]]:
    """Sends weights again and again; returns their bytes and the seconds of every step in every turn."""
    publisher, actor = Publisher.remote(config), Actor.remote(config)
    ray.get([publisher.ready.remote(), actor.ready.remote()])
    size = weights_bytes(ray.get(publisher.publish.options(num_returns=2).remote(name)[1]))
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    steps = ("copy", "publish", "publish and store", "store alone", "get", "load", "from publish to loaded")
    found: dict[str, list[float]] = {step: [] for step in steps}
    # The first turns fill the store's memory for the first time and are not counted.
    for turn in range(turns + 3):
        once: dict[str, float] = {"copy": seconds(lambda: np.copyto(target, source))}
        start = time.perf_counter()
        spent, weights = publisher.publish.options(num_returns=2).remote(name)
        once["publish"] = ray.get(spent)
        ray.wait([weights], fetch_local=False)
        once["publish and store"] = time.perf_counter() - start
        once["get"], once["load"] = ray.get(actor.load.remote([weights]))
        once["from publish to loaded"] = time.perf_counter() - start
        del weights
        once["store alone"] = seconds(lambda: ray.put(source))
        if turn >= 3:
            for step, value in once.items():
                found[step].append(value)
    return size, found


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the weights' way from the learner to an actor.")
    parser.add_argument("--backbone", choices=("resnet18", "resnet34"), default="resnet34", help="default: resnet34")
    parser.add_argument("--turns", type=int, default=15, help="counted turns (default: 15)")
    parser.add_argument("--touched", action="store_true", help="let Ray touch all of the store's memory when it starts")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, ray {ray.__version__}, NumPy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**30,
            _system_config={"preallocate_plasma_memory": True} if options.touched else None,
        )
        size, found = measure(make_config(options.backbone, Path(folder)), OPERATORS, options.turns)
        ray.shutdown()
    copy = statistics.median(found["copy"])
    print(f"operators on {options.backbone}: {size / 1e6:.1f} MB; a NumPy copy of it takes {1e3 * copy:.2f} ms")
    for step, values in found.items():
        middle = statistics.median(values)
        print(f"  {step:24s} {1e3 * middle:8.2f} ms  {middle / copy:6.2f} times (smallest {min(values) / copy:.2f})")


if __name__ == "__main__":
    main()
