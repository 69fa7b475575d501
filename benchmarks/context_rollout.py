"""What the reinforcement learning of CiSS-Net costs: its share of an update, and the bytes of a rollout on the wire.

    OMP_NUM_THREADS=1 python benchmarks/context_rollout.py --only update
    python benchmarks/context_rollout.py --only update --set cissnet.network.width=128 --batch 4
    OMP_NUM_THREADS=1 python benchmarks/context_rollout.py --only wire

**update.** Real updates (`CiSSNetLearner.update`, settings of a recipe, episodes that its actor played on scenes) take turns with
the same updates without what reinforcement learning adds, on the same episodes, crops and draws of dropout. Counted as the
networks' are X, one forward pass of Base, Bias and Context Net over all steps with the maps of contexts that it needs, the
cross-entropy of all predictions at the image's resolution, and the backward pass through all of them; for the backward pass of
the Context Net's trunk and heads, its losses are replaced by plain sums of what it says. Crops and optimiser are in both as well.
What is left out, and so counted as reinforcement learning: unpacking the maps of the episodes, labels of positions, rewards with
their box means, log-probabilities, entropies, returns or V-trace, the losses of policy, value and entropy, and the backward pass
through these. That there is a Context Net at all, and that p-maps and contexts of T steps exist, is not counted: playing
them is an actor's work. Its share is the median over turns of the difference of a pair, over the time without. That is a small
difference of two large times, so the same work is also timed by itself: the calls that are left out, and the backward pass of their
losses into the heads' outputs.
Episodes with the probabilities of their actions (asynchronous: V-trace) and without (synchronous: GAE) are two cases. Weights are
random and learning rates tiny, so that no weight moves; nothing is read ahead.

**wire.** A small S-Net and Context Net are trained for a moment on crops of scenes of 713 × 713, and then play whole ones: 90 × 90
positions, T = 8. Printed are the bytes of every column of an episode (`rollout.wire_bytes` is the whole message), and what
they would be at worst: p-maps and actions without any pattern, and probabilities of which every bit is random. Rewards per
position do not travel, as they are a function of p-maps, actions and labels; what they would take is printed, rounded to int8
and as they are. Against it stand the dense states in half precision, by arithmetic. Sizes hardly depend on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from rollout import REST, Stopwatch
from scenes import write_scenes

from raysseg.algorithms.cissnet import learner as learner_module
from raysseg.algorithms.cissnet.algorithm import CiSSNet
from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.env_runner import CiSSNetEnvRunner
from raysseg.algorithms.cissnet.learner import CiSSNetLearner
from raysseg.algorithms.cissnet.module import CONTEXT, Played
from raysseg.algorithms.cissnet.steps import EpisodeMaps, episode_records, read_maps
from raysseg.algorithms.recipes import load_recipe
from raysseg.core import rollout
from raysseg.core.seeding import draw_seeds
from raysseg.core.work import LearnerWork
from raysseg.data import Store, synthetic_samples, write_store
from raysseg.data.synthetic import SyntheticSettings, synthetic_info
from raysseg.functional.context_reward import context_rewards

PASSES = ("X", "maps of contexts", "networks' forward pass", "cross-entropy", "backward pass")
SIDE, CELLS, STEPS, BUDGET = 713, (90, 90), 8, 256_000


def settings_of(recipe: str, overrides: Sequence[str]) -> CiSSNetSettings:
    """Returns the settings of a recipe's CiSS-Net on generated scenes, with random weights and everything in this process."""
    common = ["data.train_split=train", "data.val_split=train", "segmenter.weights=none", "engine.prefetch=0"]
    settings = load_recipe(recipe, [*common, *overrides]).settings("cissnet", seed=0)
    assert isinstance(settings, CiSSNetSettings)
    return settings


def play(runner: CiSSNetEnvRunner, rows: np.ndarray, *, probabilities: bool) -> pa.RecordBatch:
    """Plays an episode on each row."""
    steps = runner.settings.cissnet.episode_steps
    context = {"segmenter_version": 0, "policy_version": 0, "steps": steps, "probabilities": probabilities}
    return runner.sample(records=rollout.order(rows, draw_seeds(0, "benchmark", count=len(rows))), context=context)


# ---- the share of an update -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(watch: Stopwatch, learner: CiSSNetLearner) -> Iterator[None]:
    """Puts the stopwatch around every part of an update."""
    parts: list[tuple[Any, str, str]] = [
        (learner_module, "read_crops", "crops"),
        (learner_module, "domain_features", "X"),
        (learner_module, "context_map", "maps of contexts"),
        (learner.networks[CONTEXT], "forward", "networks' forward pass"),
        (learner, "_segmentation", "cross-entropy"),
        (torch.Tensor, "backward", "backward pass"),
        (learner.get_optimizer(CONTEXT, CONTEXT), "step", "optimiser"),
        (torch.nn.utils, "clip_grad_norm_", "optimiser"),
        (learner_module, "read_maps", "maps of episodes unpacked"),
        (learner_module, "labels_of_positions", "labels of positions"),
        (learner_module, "context_rewards", "rewards"),
        (learner_module, "action_log_probabilities", "log-probabilities, entropies"),
        (learner_module, "action_entropy", "log-probabilities, entropies"),
        (learner_module, "generalised_advantages", "returns"),
        (learner_module, "v_trace", "returns"),
        (learner_module, "actor_critic_losses", "losses of policy, value, entropy"),
        (learner, "_actor_critic", "around these"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield


@contextlib.contextmanager
def without_rl(learner: CiSSNetLearner, maps: EpisodeMaps, labels: torch.Tensor) -> Iterator[None]:
    """Leaves out of updates what reinforcement learning adds: maps and labels of positions are there, losses are plain sums."""

    def sums(played: Played, *_: Any) -> tuple[torch.Tensor, ...]:
        assert played.action_logits is not None
        assert played.values is not None
        return played.action_logits.sum(), played.values.sum(), torch.zeros(())

    found = dataclasses.replace(maps, probabilities=None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(learner_module, "read_maps", return_value=found))
        stack.enter_context(mock.patch.object(learner_module, "labels_of_positions", return_value=labels))
        stack.enter_context(mock.patch.object(learner, "_actor_critic", sums))
        yield


def measure_updates(options: argparse.Namespace, folder: Path) -> None:
    """Prints the parts of an update with and without reinforcement learning, and its share."""
    overrides = [
        "cissnet.learning.optimiser.learning_rate=1e-9",
        "engine.num_env_runners=0",
        "engine.num_learners=0",
        f"engine.num_gpus_per_learner={int(options.device == 'cuda')}",
        *([f"cissnet.learning.batch_size={options.batch}"] if options.batch else []),
        *([f"engine.precision={options.precision}"] if options.precision else []),
        *options.set,
    ]
    settings = settings_of(options.recipe, overrides)
    count, network = settings.cissnet.learning.batch_size, settings.cissnet.network
    store = write_scenes(folder / "data", count, 180, 240, 11)
    config = CiSSNetConfig().apply(settings, run_dir=str(folder), store_uri=store.uri)
    learner = CiSSNetLearner(config=config, module_spec=config.get_multi_rl_module_spec())
    learner.build()
    if learner._device.type != options.device:
        raise SystemExit(f"the learner is on {learner._device.type}, not on {options.device}")
    runner = CiSSNetEnvRunner(config=config, worker_index=0)
    runner.share_module(learner.module)
    print(
        f"\n{options.recipe}: {settings.segmenter.architecture} {settings.segmenter.encoder}, crop "
        f"{list(settings.crops.augmentation.crop or ())}, maps {list(runner.env.cells)}, width {network.width}, T "
        f"{settings.cissnet.learning.steps}, {settings.engine.precision}, {count} images; medians of {options.repeats} turns"
    )
    for name, asynchronous in (("synchronous, GAE", False), ("asynchronous, V-trace", True)):
        records = play(runner, np.arange(count), probabilities=asynchronous)
        pairs = time_pairs(learner, records, runner.env.labels, options.repeats)
        report_updates(name, pairs, time_alone(learner, records, 3 * options.repeats), options.device)
    learner.shutdown()


Spent = dict[str, np.ndarray]


def work_on(records: pa.RecordBatch) -> LearnerWork:
    """Returns an update on these episodes."""
    context = {"update": 0, "policy_version": 0, "seed": 0}
    return LearnerWork(kind="context", records=records, context=context, minibatches=(records.num_rows,))


def time_pairs(
    learner: CiSSNetLearner, records: pa.RecordBatch, labels: torch.Tensor, repeats: int
) -> list[tuple[Spent, Spent]]:
    """Returns the seconds (wall, CPU) of the parts of updates with and without reinforcement learning, in pairs."""
    work = work_on(records)
    maps = read_maps(records)
    watch, pairs = Stopwatch(learner._device), []
    for turn in range(repeats + 1):
        pair: list[Spent] = [{}, {}]
        for place in (0, 1) if turn % 2 else (1, 0):
            with contextlib.ExitStack() as stack:
                if place:
                    stack.enter_context(without_rl(learner, maps, labels))
                stack.enter_context(watched(watch, learner))
                watch.restart()
                learner.update(training_data=work)
                watch.turn()
            pair[place] = watch.spent
        # The first turn fills caches and is not counted.
        if turn:
            pairs.append((pair[0], pair[1]))
    return pairs


def time_alone(learner: CiSSNetLearner, records: pa.RecordBatch, repeats: int) -> np.ndarray:
    """Returns the seconds (wall, CPU) of what reinforcement learning adds to an update, called without the rest of it."""
    with mock.patch.object(learner, "_actor_critic", wraps=learner._actor_critic) as called:
        learner.update(training_data=work_on(records))
    played, batch, labels, rows = called.call_args.args
    size = (int(labels.shape[-2]), int(labels.shape[-1]))
    watch, found = Stopwatch(learner._device), []
    for _ in range(repeats):
        said = [one.detach().requires_grad_() for one in (played.action_logits, played.values)]
        watch.restart()
        read_maps(records)
        learner_module.labels_of_positions(batch.labels, size, learner._stride)
        torch.stack(learner._actor_critic(Played(played.logits, *said), batch, labels, rows)).sum().backward()
        watch.turn()
        found.append(watch.spent[REST])
    return np.median(found, axis=0)


def report_updates(name: str, pairs: list[tuple[Spent, Spent]], alone: np.ndarray, device: str) -> None:
    """Prints a table of the parts, and the shares."""

    def seconds(spent: Spent, clock: int, parts: Sequence[str]) -> float:
        return sum(float(spent[part][clock]) for part in parts if part in spent)

    every = sorted({part for pair in pairs for spent in pair for part in spent}, key=lambda one: (one == REST, one))
    print(f"  {name:36s} {'with, ms':>10s} {'without, ms':>12s}")
    for part in sorted(every, key=lambda one: PASSES.index(one) if one in PASSES else len(PASSES)):
        both = [1e3 * statistics.median(seconds(pair[place], 0, (part,)) for pair in pairs) for place in (0, 1)]
        print(f"    {part:34s} {both[0]:10.2f} {both[1]:12.2f} {'networks' if part in PASSES else ''}")
    totals = [1e3 * statistics.median(seconds(pair[place], 0, every) for pair in pairs) for place in (0, 1)]
    print(f"    {'an update':34s} {totals[0]:10.2f} {totals[1]:12.2f}")
    print(f"    {'reinforcement learning by itself':34s} {1e3 * alone[0]:10.2f}")
    for text, base in (("an update without it", every), ("the networks' own passes in it", PASSES)):
        shares = []
        for clock in (0, 1) if device == "cpu" else (0,):
            bases = [seconds(other, clock, base) for _, other in pairs]
            more = [seconds(one, clock, every) - seconds(other, clock, every) for one, other in pairs]
            share = 100 * statistics.median(each / whole for each, whole in zip(more, bases, strict=True))
            own = 100 * float(alone[clock]) / statistics.median(bases)
            shares.append(f"{share:.1f} % by difference and {own:.1f} % by itself of {('wall', 'CPU')[clock]} time")
        print(f"    over {text}: {'; '.join(shares)}")


# ---- bytes on the wire ------------------------------------------------------------------------------------------------


def write_large_scenes(folder: Path, count: int) -> Store:
    """Writes scenes of 713 × 713 with many objects of four classes on a ground, which a small network can learn."""
    made = SyntheticSettings(train_images=count, height=SIDE, width=SIDE, objects=30)
    return write_store(str(folder), synthetic_samples(made, splits=("train",)), synthetic_info(), image_encoding="raw")


def trained_runner(options: argparse.Namespace, folder: Path, store: Store) -> tuple[CiSSNetEnvRunner, CiSSNet]:
    """Trains small networks on crops of the scenes; returns an actor that plays whole ones with them."""
    epochs = max(1, options.updates * 8 // options.images)
    overrides = [
        f"training.pretrain_epochs={epochs}",
        "training.augmentation={scale: [0.75, 1.5], flip: 0.5, rotation: 0.0, crop: [144, 144]}",
        f"cissnet.learning.updates={options.updates}",
        f"cissnet.learning.steps={STEPS}",
        "evaluation.every_stage=false",
        *options.set,
    ]
    algorithm = (
        CiSSNetConfig()
        .apply(settings_of("cissnet-synthetic", overrides), run_dir=str(folder / "run"), store_uri=store.uri)
        .build_algo()
    )
    assert isinstance(algorithm, CiSSNet)
    while algorithm.position.stage == 0 or algorithm.position.phase != "evaluate":
        algorithm.train()
    whole = settings_of(
        "cissnet-synthetic",
        [
            *overrides,
            f"training.augmentation={{scale: [1.0, 1.0], flip: 0.0, rotation: 0.0, crop: [{SIDE}, {SIDE}]}}",
            "cissnet.learning.batch_size=1",
        ],
    )
    runner = CiSSNetEnvRunner(
        config=CiSSNetConfig().apply(whole, run_dir=str(folder / "run"), store_uri=store.uri), worker_index=0
    )
    runner.share_module(algorithm.env_runner.module)
    return runner, algorithm


def bytes_of(records: pa.RecordBatch) -> dict[str, int]:
    """Returns the bytes of what one episode carries, and of its whole message."""
    own = ("predictions", "actions", "probabilities")
    sizes = {name: sum(len(one.as_py() or b"") for one in records.column(name)) for name in own}
    total = rollout.wire_bytes(records)
    return {**sizes, "the rest of the message": total - sum(sizes.values()), "an episode": total}


def worst_case(classes: int, *, probabilities: bool) -> dict[str, int]:
    """Returns the bytes of an episode whose maps have no pattern at all."""
    source = np.random.default_rng(0)
    maps = EpisodeMaps(
        predictions=source.integers(0, classes, (STEPS + 1, 1, *CELLS), dtype=np.uint8),
        actions=source.random((STEPS, 1, *CELLS)) < 0.5,
        probabilities=source.integers(0, 2**16, (STEPS, 1, *CELLS), dtype=np.uint16).view(np.float16)
        if probabilities
        else None,
    )
    columns: dict[str, Any] = {name: [0] for name in ("row", "seed", "segmenter_version", "policy_version")}
    columns |= {name: [[0.0] * STEPS] for name in ("reward", "context_share", "context_right")}
    columns |= {"key": ["a key of twenty bytes"], "accuracy": [[0.0] * (STEPS + 1)]}
    return bytes_of(episode_records(columns, maps))


def rewards_of(runner: CiSSNetEnvRunner, records: pa.RecordBatch) -> tuple[int, int]:
    """Returns the bytes of an episode's rewards if they travelled: as int8, and as float32; both under zstd."""
    maps, options = read_maps(records), runner.settings.cissnet.reward
    rewards = context_rewards(
        torch.tensor(maps.predictions),
        torch.tensor(maps.actions),
        runner.env.labels.cpu(),
        box=runner.env.box,
        correct_weight=options.correct_weight,
        uncertain_weight=options.uncertain_weight,
    ).numpy()
    codec, largest = pa.Codec("zstd", 3), 1.0 + max(options.correct_weight, options.uncertain_weight)
    rounded = np.rint(rewards * (127 / largest)).astype(np.int8)
    return len(codec.compress(rounded.tobytes())), len(codec.compress(rewards.tobytes()))


def print_sizes(name: str, episodes: Sequence[dict[str, int]]) -> None:
    """Prints mean and largest bytes of some episodes, by column."""
    print(f"  {name}")
    for column in episodes[0]:
        values = [one[column] for one in episodes]
        largest = f", largest {max(values):9,d}" if len(values) > 1 else ""
        print(f"    {column:26s} {statistics.mean(values):11,.0f} bytes{largest}")
    most = max(one["an episode"] for one in episodes)
    print(f"    {'under 256 KB' if most < BUDGET else 'not under 256 KB'}: {100 * most / BUDGET:.0f} % of it")


def measure_wire(options: argparse.Namespace, folder: Path) -> None:
    """Prints what episodes at 713 × 713 take on the wire, and what their dense states would."""
    store = write_large_scenes(folder / "data", options.images)
    runner, algorithm = trained_runner(options, folder, store)
    if runner.env.cells != CELLS:
        raise SystemExit(f"the maps are {list(runner.env.cells)}, not {list(CELLS)}")
    kinds: dict[bool, list[dict[str, int]]] = {True: [], False: []}
    rewards, right, shares = [], [], []
    for row in range(options.images):
        for probabilities, found in kinds.items():
            records = play(runner, np.array([row]), probabilities=probabilities)
            found.append(bytes_of(records))
        rewards.append(rewards_of(runner, records))
        right.append(records.column("accuracy")[0].as_py()[-1])
        shares.append(statistics.mean(records.column("context_share")[0].as_py()))
    algorithm.stop()
    print(
        f"\nepisodes at {SIDE} × {SIDE}, {CELLS[0]} × {CELLS[1]} positions, T {STEPS}, {options.images} scenes of 5 classes, "
        f"networks of {options.updates} updates: {100 * statistics.mean(right):.0f} % of the last p-maps right, "
        f"{100 * statistics.mean(shares):.0f} % made context"
    )
    print_sizes("with probabilities (asynchronous)", kinds[True])
    print_sizes("without (synchronous)", kinds[False])
    small, plain = (statistics.mean(values) for values in zip(*rewards, strict=True))
    mean = statistics.mean(one["an episode"] for one in kinds[True])
    print(
        f"  rewards do not travel; they would take {small:,.0f} bytes rounded to int8, {plain:,.0f} as float32 (both zstd): with "
        f"int8 {mean + small:,.0f} an episode with probabilities"
    )
    for classes, probabilities in ((19, True), (19, False), (150, True)):
        worst = worst_case(classes, probabilities=probabilities)
        text = "with" if probabilities else "without"
        print_sizes(f"at worst: {classes} classes drawn at every position, {text} probabilities", [worst])
        print(
            f"    with rewards as int8, too, of no pattern either: {worst['an episode'] + STEPS * CELLS[0] * CELLS[1]:,d}"
        )
    cells = 2 * CELLS[0] * CELLS[1]
    encoded = 19 + 4 * 256
    dense = {
        "X of 4096 channels, once": 4096,
        "X once, and one-hot p-maps of T + 1 states": 4096 + (STEPS + 1) * 19,
        "X once, and encoded p-maps of T + 1 states": 4096 + (STEPS + 1) * encoded,
        "T + 1 whole states, X and encoded p-map": (STEPS + 1) * (4096 + encoded),
    }
    print("  dense states of the paper's networks with 19 classes, half precision (arithmetic)")
    for text, planes in dense.items():
        print(f"    {text:44s} {planes * cells:13,d} bytes, {planes * cells / mean:8,.0f} episodes with probabilities")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what CiSS-Net's reinforcement learning costs.")
    parser.add_argument("--only", choices=("update", "wire"), help="one of the two parts")
    parser.add_argument("--recipe", default="cissnet-camvid", help="whose updates are timed (default: cissnet-camvid)")
    parser.add_argument("--batch", type=int, help="images of an update, instead of the recipe's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of the recipe's")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of updates (default: cpu)")
    parser.add_argument("--repeats", type=int, default=11, help="timed pairs of updates (default: 11)")
    parser.add_argument("--updates", type=int, default=150, help="that the networks of `wire` learn (default: 150)")
    parser.add_argument("--images", type=int, default=8, help="episodes of `wire` (default: 8)")
    parser.add_argument("--set", action="append", default=[], help="a setting in place of the recipe's, e.g. a.b=c")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    if options.only in (None, "update"):
        with tempfile.TemporaryDirectory() as name:
            measure_updates(options, Path(name))
    if options.only in (None, "wire"):
        with tempfile.TemporaryDirectory() as name:
            measure_wire(options, Path(name))


if __name__ == "__main__":
    main()
