"""Times one actor's rollouts: the networks' own passes against everything around them.

    python benchmarks/rollout.py                      # OMP_NUM_THREADS sets the threads
    python benchmarks/rollout.py --case paper --device cuda --batch 8

The networks' own passes are the segmenter's encoder and decoder, the virtual step (forward, loss, backward and the
forward pass under the new weights), the searcher and the assessor. Everything else is around them: images from the
cache, crops, probabilities at the image's resolution, label inference, rewards, the operators' planes, compression and
Arrow. Weights are random; no pass depends on their values.

Both are timed in the same rollouts, so a busy machine slows both. On a CPU the share of the process's CPU time is
printed beside that of wall time: with one thread it does not count the time that other processes take.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from scenes import write_scenes

from raysseg.algorithms.eil import env as env_module
from raysseg.algorithms.eil import env_runner as runner_module
from raysseg.algorithms.eil import state as state_module
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.env_runner import EILEnvRunner
from raysseg.algorithms.recipes import load_recipe
from raysseg.core import rollout
from raysseg.core.seeding import draw_seeds

NETWORKS = ("encoder", "decoder", "virtual step", "searcher", "assessor")
REST = "the rest"


class Case(NamedTuple):
    """A recipe's variant on scenes of a size: (H, W) of images and crops, classes, images per batch."""

    recipe: str
    variant: str
    overrides: tuple[str, ...]
    size: tuple[int, int]
    crop: tuple[int, int]
    classes: int
    batch: int


CASES = {
    "paper": Case("eil-voc", "ps+pa", (), (512, 512), (512, 512), 21, 2),
    "camvid": Case("eil-camvid", "ps+pa", (), (180, 240), (180, 240), 11, 8),
    "camvid-frozen": Case("eil-camvid", "ps+pa", ("eil.virtual_steps=0",), (180, 240), (180, 240), 11, 8),
    "camvid-crop": Case("eil-camvid", "ps+pa", (), (180, 240), (96, 128), 11, 8),
    "camvid-crop-frozen": Case("eil-camvid", "ps+pa", ("eil.virtual_steps=0",), (180, 240), (96, 128), 11, 8),
}


class Stopwatch:
    """Gives every moment of a rollout to the innermost part that is running, in wall and CPU seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets everything."""
        self.spent: dict[str, np.ndarray] = {}
        self._running = [REST]
        self._mark = self._now()

    def _now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    def turn(self) -> None:
        """Gives the time since the last turn to the part that is running."""
        now = self._now()
        part = self._running[-1]
        self.spent[part] = self.spent.get(part, np.zeros(2)) + now - self._mark
        self._mark = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time given to `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self._running.pop()

        return run


@contextlib.contextmanager
def watched(runner: EILEnvRunner, watch: Stopwatch) -> Iterator[None]:
    """Puts the stopwatch around every part of a rollout."""
    segmenter, operators, builder = runner.segmenter.online, runner.operators, runner.env.builder
    parts: list[tuple[Any, str, str]] = [
        (segmenter, "encode", "encoder"),
        (segmenter, "decode", "decoder"),
        (state_module, "virtual_step", "virtual step"),
        (operators.searcher, "forward", "searcher"),
        (operators.assessor, "forward", "assessor"),
        (runner.workspace.train, "images", "images and maps from the cache"),
        (runner.workspace.train, "labels", "images and maps from the cache"),
        (state_module, "draw_geometry", "crops"),
        (state_module, "_cut", "crops"),
        (builder, "_state", "probabilities at full resolution"),
        (state_module, "candidates", "candidates"),
        (state_module, "cell_counts", "label pixels per cell"),
        (builder, "infer", "label inference"),
        (state_module, "_plain", "copies for the virtual step"),
        (state_module, "operator_planes", "operator planes"),
        (runner_module, "_encode", "compression of maps"),
        (rollout, "transitions", "Arrow"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        rewards = {name: watch.timed("reward", function) for name, function in env_module.REWARDS.items()}
        stack.enter_context(mock.patch.dict(env_module.REWARDS, rewards))
        yield


def make_settings(case: Case, options: argparse.Namespace) -> EILSettings:
    """Returns the recipe's settings with everything in this process and random weights."""
    batch = options.batch or case.batch
    overrides = [
        "data.train_split=train",
        "segmenter.weights=none",
        "eil.operators.weights=none",
        f"training.augmentation.crop={list(case.crop)}",
        f"eil.exploration.rollout_batch_size={batch}",
        "engine.num_env_runners=0",
        "engine.num_learners=0",
        f"engine.num_gpus_per_learner={int(options.device == 'cuda')}",
        *case.overrides,
    ]
    if options.precision:
        overrides.append(f"engine.precision={options.precision}")
    settings = load_recipe(case.recipe, overrides).settings(case.variant, seed=0)
    assert isinstance(settings, EILSettings)
    return settings


def measure(case: Case, options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, np.ndarray]], EILSettings]:
    """Rolls out batches; returns the seconds (wall, CPU) of every part for each of them."""
    settings = make_settings(case, options)
    batch = settings.eil.exploration.rollout_batch_size
    store = write_scenes(folder / "data", batch, *case.size, case.classes)
    config = EILConfig().apply(settings, run_dir=str(folder), store_uri=store.uri)
    runner = EILEnvRunner(config=config, worker_index=0)
    module = config.get_multi_rl_module_spec(inference_only=True).build()
    for network in module.values():
        network.to(runner.device)
    runner.share_module(module)
    if runner.device.type != options.device:
        raise SystemExit(f"the actor is on {runner.device.type}, not on {options.device}")
    context = {"stage": 1, "label_version": 0, "segmenter_version": 0, "policy_version": 0, "uniform_share": 0.0}
    context["noise_std"] = settings.eil.exploration.noise_std
    watch, rounds = Stopwatch(runner.device), []
    with watched(runner, watch):
        for number in range(options.repeats + 1):
            orders = rollout.order(np.arange(batch), draw_seeds(0, "benchmark", number, count=batch))
            watch.restart()
            runner.sample(records=orders, context=context)
            watch.turn()
            # The first round fills caches and is not counted.
            if number:
                rounds.append(watch.spent)
    return rounds, settings


def share(rounds: list[dict[str, np.ndarray]], clock: int, parts: tuple[str, ...]) -> float:
    """Median over rounds of the share of some parts in percent, by a clock (0 wall, 1 CPU)."""
    shares = []
    for spent in rounds:
        total = sum(value[clock] for value in spent.values())
        shares.append(100 * sum(spent[part][clock] for part in parts if part in spent) / total)
    return statistics.median(shares)


def report(name: str, rounds: list[dict[str, np.ndarray]], settings: EILSettings, device: str) -> None:
    """Prints a table of the parts, and the share of everything that is no network."""
    options, segmenter = settings.eil, settings.segmenter
    total = 1e3 * statistics.median(float(sum(value[0] for value in spent.values())) for spent in rounds)
    print(
        f"\n{name}: {segmenter.architecture} {segmenter.encoder}, operators {options.operators.backbone}, crop "
        f"{settings.training.augmentation.crop}, {options.virtual_steps} virtual steps, {settings.engine.precision}, "
        f"{options.exploration.rollout_batch_size} images; median of {len(rounds)} rollouts: {total:.0f} ms"
    )
    parts = {part for spent in rounds for part in spent}
    for part in sorted(parts, key=lambda one: (one not in NETWORKS, -share(rounds, 0, (one,)))):
        milliseconds = 1e3 * statistics.median(float(spent[part][0]) for spent in rounds)
        network = "network" if part in NETWORKS else ""
        print(f"  {part:34s} {milliseconds:10.2f} ms {share(rounds, 0, (part,)):6.1f} % {network}")
    around = tuple(sorted(parts - set(NETWORKS)))
    text = f"  beyond the networks' own passes: {share(rounds, 0, around):.1f} % of wall time"
    print(text + (f", {share(rounds, 1, around):.1f} % of CPU time" if device == "cpu" else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the parts of one actor's rollouts.")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="which setting (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--batch", type=int, help="images per rollout (default: 2 for paper, 8 for the others)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of the recipe's")
    parser.add_argument("--repeats", type=int, default=7, help="timed rollouts (default: 7)")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rounds, settings = measure(CASES[name], options, Path(folder))
        report(name, rounds, settings, options.device)


if __name__ == "__main__":
    main()
