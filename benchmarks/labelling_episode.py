"""Times the parts of RALIS' played episodes: the segmenter's own passes against everything around them.

    OMP_NUM_THREADS=1 python benchmarks/labelling_episode.py
    python benchmarks/labelling_episode.py --case decoder --device cuda

The segmenter's own passes are encoder and decoder (on D_S, on the candidates' images, on D_R, and in the training pass) and
the backward pass. Everything else is around them: pixels' classes and entropies out of the logits, descriptions of regions,
divergences, the query network, pools, the oracle, augmentation, the optimiser and Arrow. Weights are random; no pass
depends on their values.

Both are timed in the same episodes, so a busy machine slows both. On a CPU the share of the process's CPU time is printed
beside that of wall time: with one thread it does not count the time that other processes take.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rollout import Stopwatch, share
from scenes import write_scenes

from raysseg.algorithms.ralis import env_runner as runner_module
from raysseg.algorithms.ralis import episode as episode_module
from raysseg.algorithms.ralis import policies as policies_module
from raysseg.algorithms.ralis import rewards as rewards_module
from raysseg.algorithms.ralis import state as state_module
from raysseg.algorithms.ralis import training as training_module
from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.env_runner import RALISEnvRunner
from raysseg.algorithms.ralis.sets import RegionSets
from raysseg.algorithms.ralis.variant_sets import SETS_FILE
from raysseg.configuration import load_settings
from raysseg.core import rollout
from raysseg.core.seeding import draw_seeds

SEGMENTER = ("encoder", "decoder", "backward pass")
SIZE, CLASSES = (180, 240), 11
STATE, REWARD, PLAY = 10, 80, 100
CASES = {
    "all": {"scope": "all"},
    "decoder": {"scope": "decoder", "augmentation": {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": None}},
}


@contextlib.contextmanager
def watched(runner: RALISEnvRunner, watch: Stopwatch) -> Iterator[None]:
    """Puts the stopwatch around every part of an episode."""
    segmenter = runner.episode.segmenter
    parts: list[tuple[Any, str, str]] = [
        (segmenter, "encode", "encoder"),
        (segmenter, "decode", "decoder"),
        (torch.Tensor, "backward", "backward pass"),
        (runner.workspace.train, "images", "images and labels from the cache"),
        (runner.workspace.train, "labels", "images and labels from the cache"),
        (training_module.RegionTrainer, "_augmented", "augmentation"),
        (training_module, "_summed_loss", "loss"),
        (training_module.nn.utils, "clip_grad_norm_", "optimiser"),
        (torch.optim.SGD, "step", "optimiser"),
        (rewards_module, "upsample_logits", "logits to pixels, D_R"),
        (rewards_module, "confusion_matrix", "confusion matrix"),
        (state_module, "upsample_logits", "logits to pixels, D_S and candidates"),
        (state_module, "entropy_map_of_logits", "entropy of pixels"),
        (state_module, "pooled_entropies", "pooled entropies"),
        (state_module, "class_shares", "class shares"),
        (state_module, "divergence_histograms", "divergences"),
        (episode_module, "draw_pools", "pools"),
        (episode_module, "region_labels", "oracle"),
        (policies_module, "choose_by_query", "query network"),
        (runner_module, "step_records", "Arrow"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        query = policies_module.POLICIES["query"]
        timed = type(query)(wanted=query.wanted, choose=policies_module.choose_by_query)
        stack.enter_context(mock.patch.dict(policies_module.POLICIES, {"query": timed}))
        yield


def make_settings(case: str, options: argparse.Namespace) -> RALISSettings:
    """Returns settings at CamVid's sizes with everything in this process and random weights."""
    values = {
        "data": {"scribbles": "none"},
        "segmenter": {
            "architecture": "DeepLabV3Plus",
            "encoder": "resnet18",
            "encoder_depth": 4,
            "decoder_channels": 64,
            "weights": "none",
        },
        "ralis": {
            "sets": {"state": STATE, "reward": REWARD, "play": PLAY + 1, "start": 1},
            "regions": {"rows": 4, "columns": 6},
            "per_step": 24,
            "budgets": [24],
            "episode": CASES[case],
            "learning": {"budget": 24 * options.steps, "pool_size": 20},
        },
        "engine": {"num_gpus_per_learner": int(options.device == "cuda"), "precision": options.precision},
    }
    return load_settings(RALISSettings, values, where="the benchmark")


def measure(case: str, options: argparse.Namespace, folder: Path) -> list[dict[str, np.ndarray]]:
    """Plays episodes; returns the seconds (wall, CPU) of every part for each of them."""
    settings = make_settings(case, options)
    count = STATE + REWARD + PLAY + 1
    store = write_scenes(folder / "data", count, *SIZE, CLASSES)
    rows: np.ndarray = np.arange(count)
    state, reward, play, start, pool = np.split(rows, np.cumsum([STATE, REWARD, PLAY, 1]))
    sets = RegionSets(state=state, reward=reward, play=play, start=start, pool=pool)
    sets.save(folder / SETS_FILE, store.keys("train"))
    config = RALISConfig().apply(settings, run_dir=str(folder), store_uri=store.uri)
    runner = RALISEnvRunner(config=config, worker_index=0)
    module = config.get_multi_rl_module_spec(inference_only=True).build()
    for network in module.values():
        network.to(runner.device)
    runner.share_module(module)
    if runner.device.type != options.device:
        raise SystemExit(f"the actor is on {runner.device.type}, not on {options.device}")
    watch, rounds = Stopwatch(runner.device), []
    with watched(runner, watch):
        for number in range(options.repeats + 1):
            order = rollout.order(np.array([number]), draw_seeds(0, "benchmark", number, count=1))
            context = {"episode": number, "first_step": 0, "segmenter_version": 0, "policy_version": 0}
            watch.restart()
            runner.sample(records=order, context=context)
            watch.turn()
            # The first episode fills caches and is not counted.
            if number:
                rounds.append(watch.spent)
    return rounds


def report(case: str, rounds: list[dict[str, np.ndarray]], options: argparse.Namespace) -> None:
    """Prints a table of the parts, and the share of the segmenter's own passes."""
    totals = [float(sum(value[0] for value in spent.values())) for spent in rounds]
    print(
        f"\nscope {case}: DeepLabV3Plus resnet18 (depth 4, decoder 64) at {SIZE[1]}x{SIZE[0]}, grid 6x4, K 24, N 20, "
        f"|D_S| {STATE}, |D_R| {REWARD}, {options.precision}; median of {len(rounds)} episodes of {options.steps} steps: "
        f"{1e3 * statistics.median(totals) / options.steps:.0f} ms per step"
    )
    parts = {part for spent in rounds for part in spent}
    for part in sorted(parts, key=lambda one: (one not in SEGMENTER, -share(rounds, 0, (one,)))):
        each = [float(spent[part][0]) if part in spent else 0.0 for spent in rounds]
        own = "segmenter" if part in SEGMENTER else ""
        milliseconds = 1e3 * statistics.median(each) / options.steps
        print(f"  {part:38s} {milliseconds:10.2f} ms {share(rounds, 0, (part,)):6.1f} % {own}")
    text = f"  the segmenter's own passes: {share(rounds, 0, SEGMENTER):.1f} % of wall time"
    print(text + (f", {share(rounds, 1, SEGMENTER):.1f} % of CPU time" if options.device == "cpu" else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the parts of RALIS' played episodes.")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="what is trained (default: both)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="default: fp32")
    parser.add_argument("--steps", type=int, default=5, help="steps of an episode (default: 5)")
    parser.add_argument("--repeats", type=int, default=3, help="timed episodes (default: 3)")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rounds = measure(case, options, Path(folder))
        report(case, rounds, options)


if __name__ == "__main__":
    main()
