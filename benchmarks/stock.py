"""Times an update of EIL's operators from replay to its end: raysseg's records against RLlib's stock episodes.

    python benchmarks/stock.py                            # OMP_NUM_THREADS sets the threads
    python benchmarks/stock.py --case paper --repeats 2
    python benchmarks/stock.py --remote                   # the learners in processes of their own

Both sides start from one actor's transitions and train the same networks from the same weights with the same losses,
batch size and precision. The stock side (`stock_learner.py`) keeps what the actor observed, s and s' as float32 planes,
in RLlib's episodes; ours keeps decisions and rebuilds the planes beside the loss, the segmenter's passes and the virtual
step included. Before anything is timed both do an update on the same transitions, and their losses must agree.

Every moment of an update in this process is given to one of four groups:
- plumbing: from the replay buffer to tensors on the device (stock: sampling, connectors; ours: sampling, decoding,
  images and crops, probabilities, planes);
- segmenter: its passes and virtual steps, ours alone;
- networks: the passes of searcher, assessor and targets, backward passes and optimisers, the same on both sides;
- update flow: moving averages, checks of the gradients, metrics, everything else.
The two sides take turns, so that a busy machine slows both; the process's CPU time does not count what others take.
Ratios are of transitions per second, ours over stock: above 1 ours is the faster one. No plumbing can do better than
its networks alone, so that bound is printed as well.
With remote learners only the whole can be timed, the way through Ray included.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import ray
import rollout as rollouts
import stock_learner
import torch
from ray.rllib.connectors.common.batch_individual_items import BatchIndividualItems
from ray.rllib.connectors.common.numpy_to_tensor import NumpyToTensor
from ray.rllib.connectors.learner.learner_connector_pipeline import LearnerConnectorPipeline
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from rollout import Case, Stopwatch, make_settings
from scenes import write_scenes

from raysseg.algorithms.eil import learner as learner_module
from raysseg.algorithms.eil import state as state_module
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.env_runner import EILEnvRunner
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.seeding import draw_seeds, generator
from raysseg.core.settings import ReplaySettings
from raysseg.core.work import LearnerWork

PLUMBING, SEGMENTER, NETWORKS, FLOW = "plumbing", "segmenter", "networks", "update flow"
GROUPS = (PLUMBING, SEGMENTER, NETWORKS, FLOW)
VIRTUAL = "virtual step"
PARTS = {
    "sampling from replay": PLUMBING,
    "connectors' bookkeeping": PLUMBING,
    "copying the observations together": PLUMBING,
    "to tensors on the device": PLUMBING,
    "decoding records": PLUMBING,
    "images, maps and crops": PLUMBING,
    "probabilities at full resolution": PLUMBING,
    "operator planes": PLUMBING,
    "encoder and decoder": SEGMENTER,
    VIRTUAL: SEGMENTER,
    "searcher, assessor, targets": NETWORKS,
    "backward passes": NETWORKS,
    "optimisers": NETWORKS,
    "moving averages": FLOW,
    "checks of the gradients": FLOW,
    rollouts.REST: FLOW,
}
CASES = {
    "paper": rollouts.CASES["paper"],
    "camvid-crop": rollouts.CASES["camvid-crop"],
    "camvid-crop-frozen": rollouts.CASES["camvid-crop-frozen"],
    "acdc-crop": Case("eil-acdc", "ps+pa", (), (144, 144), (112, 112), 4, 8),
}
TRANSITIONS = {"paper": 8}
"""Transitions in replay; 128 where nothing is said."""
SCHEDULE = 1_000_000
"""Updates of the learning rates' schedules, so long that they stay where RLlib's are."""


class LearnerWatch(Stopwatch):
    """A stopwatch that looks no deeper into the virtual step, which has backward passes of its own."""

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time given to `part`, or to the virtual step that it is called from."""
        outer = super().timed(part, function)

        def run(*args: Any, **kwargs: Any) -> Any:
            return (function if self._running[-1] == VIRTUAL else outer)(*args, **kwargs)

        return run


class Played(NamedTuple):
    """What one actor played, as records and as RLlib's episodes, in the same order."""

    records: pa.RecordBatch
    episodes: list[SingleAgentEpisode]


def play(config: EILConfig, settings: EILSettings, count: int, images: int) -> Played:
    """Lets one actor play `count` transitions on `images` scenes and keeps what it sends and what it observed."""
    runner = EILEnvRunner(config=config, worker_index=0)
    module = config.get_multi_rl_module_spec().build()
    for network in module.values():
        network.to(runner.device)
    runner.share_module(module)
    batch = settings.eil.exploration.rollout_batch_size
    context: dict[str, Any] = {"stage": 1, "label_version": 0, "segmenter_version": 0, "policy_version": 0}
    context |= {"noise_std": settings.eil.exploration.noise_std, "uniform_share": 0.0}
    seen: list[np.ndarray] = []

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            seen.append(result[0].float().cpu().numpy())
            return result

        return run

    env, batches, episodes = runner.env, [], []
    with mock.patch.object(env, "reset", keep(env.reset)), mock.patch.object(env, "step", keep(env.step)):
        for number in range(-(-count // batch)):
            seen.clear()
            seeds = draw_seeds(0, "benchmark", number, count=batch)
            orders = rollout.order(np.arange(number * batch, (number + 1) * batch) % images, seeds)
            batches.append(runner.sample(records=orders, context=dict(context)))
            actions = [np.frombuffer(one, np.float32) for one in batches[-1].column("action").to_pylist()]
            rewards, ends = (batches[-1].column(name).to_pylist() for name in ("reward", "terminated"))
            before, after = seen
            # Copies, so that no episode holds the whole batch's array.
            episodes += [
                stock_learner.episode(before[row].copy(), actions[row], rewards[row], after[row].copy(), ends[row], env)
                for row in range(batch)
            ]
    return Played(pa.Table.from_batches(batches).combine_chunks().to_batches()[0], episodes)


@contextlib.contextmanager
def watched(watch: LearnerWatch, learner: Any, stock: Any) -> Iterator[None]:
    """Puts the stopwatch around every part of both sides' updates."""
    networks = "searcher, assessor, targets"
    segmenter, data = learner.module["segmenter"].unwrapped().online, learner.workspace.train
    parts: list[tuple[Any, str, str]] = [
        (ReplayBuffer, "sample", "sampling from replay"),
        (EpisodeReplayBuffer, "sample", "sampling from replay"),
        (LearnerConnectorPipeline, "__call__", "connectors' bookkeeping"),
        (BatchIndividualItems, "__call__", "copying the observations together"),
        (NumpyToTensor, "__call__", "to tensors on the device"),
        (learner_module, "decode_map", "decoding records"),
        (learner_module, "unpack_actions", "decoding records"),
        (data, "images", "images, maps and crops"),
        (data, "labels", "images, maps and crops"),
        (state_module, "crop_and_flip", "images, maps and crops"),
        (segmenter, "encode", "encoder and decoder"),
        (segmenter, "decode", "encoder and decoder"),
        (state_module, "virtual_step", VIRTUAL),
        (state_module.StateBuilder, "_state", "probabilities at full resolution"),
        (state_module, "operator_planes", "operator planes"),
        (torch.Tensor, "backward", "backward passes"),
        (torch.autograd, "grad", "backward passes"),
        (stock_learner.StockLearner, "apply_gradients", "checks of the gradients"),
        (learner_module, "soft_update", "moving averages"),
        (stock_learner, "update_target_network", "moving averages"),
    ]
    for side, module_id in ((learner, OPERATORS), (stock, stock_learner.DEFAULT_MODULE_ID)):
        module = side.module[module_id].unwrapped()
        for name in stock_learner.NETWORKS:
            parts.append((getattr(module, name), "forward", networks))
            parts.append((getattr(module, f"target_{name}"), "forward", networks))
            parts.append((side.get_optimizer(module_id, name), "step", "optimisers"))
    with contextlib.ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield


class Sides(NamedTuple):
    """Both replay buffers, both learners and the constants of an update."""

    replay: ReplayBuffer
    group: LearnerGroup
    stock_replay: EpisodeReplayBuffer
    stock_group: LearnerGroup
    settings: EILSettings

    def learn(self, records: pa.RecordBatch, number: int) -> dict[str, Any]:
        """Does our update number `number` on transitions."""
        context = {"update": number, "total_updates": SCHEDULE, "seed": 0}
        return self.group.update(training_data=LearnerWork(kind="operators", records=records, context=context))[0]

    def ours(self, number: int) -> None:
        """Draws from our replay buffer and updates."""
        count = self.settings.eil.exploration.batch_size
        self.learn(self.replay.sample(count, generator(0, "replay", number)), number)

    def stock(self, number: int) -> None:
        """Draws from RLlib's replay buffer and updates."""
        count = self.settings.eil.exploration.batch_size
        drawn = stock_learner.sample(self.stock_replay, count, self.settings.eil.gamma)
        stock_learner.update(self.stock_group, drawn, number * count)


def check(sides: Sides, played: Played) -> None:
    """Does the first update of both sides on the same transitions; ends the run where their losses disagree."""
    count = sides.settings.eil.exploration.batch_size
    ours = sides.learn(played.records.slice(0, count), 0)["assessor_loss"]
    theirs = float(stock_learner.update(sides.stock_group, played.episodes[:count], 0)["assessor_loss"].peek())
    if not math.isclose(ours, theirs, rel_tol=0.02):
        raise SystemExit(f"the assessor's losses on the same transitions disagree: ours {ours}, stock {theirs}")
    print(f"  assessor's loss on the same transitions: ours {ours:.6g}, stock {theirs:.6g}")


def make_sides(config: EILConfig, settings: EILSettings, played: Played, classes: int) -> Sides:
    """Fills both replay buffers and builds both learners."""
    count, size = len(played.episodes), settings.eil.exploration.rollout_batch_size
    replay, stock_replay = ReplayBuffer(ReplaySettings(capacity=count)), EpisodeReplayBuffer(capacity=count)
    for start in range(0, count, size):
        replay.add(played.records.slice(start, size))
    stock_replay.add(played.episodes)
    stock_replay.rng = np.random.default_rng(0)
    specification = config.get_multi_rl_module_spec()
    channels = specification.rl_module_specs[OPERATORS].model_config["feature_channels"]
    return Sides(
        replay=replay,
        group=config.build_learner_group(rl_module_spec=specification),
        stock_replay=stock_replay,
        stock_group=stock_learner.build_stock(settings, num_classes=classes, feature_channels=channels),
        settings=settings,
    )


def measure(sides: Sides, repeats: int, device: torch.device) -> dict[str, list[dict[str, np.ndarray]]]:
    """Updates both sides in turns; returns for each side the seconds (wall, CPU) of every part in every counted
    update.
    """
    watch = LearnerWatch(device)
    found: dict[str, list[dict[str, np.ndarray]]] = {"ours": [], "stock": []}
    local = sides.group.is_local
    watching = watched(watch, sides.group._learner, sides.stock_group._learner) if local else contextlib.nullcontext()
    with watching:
        # The first turn warms caches up and is not counted.
        for turn in range(repeats + 1):
            for name, update in (("ours", sides.ours), ("stock", sides.stock)):
                watch.restart()
                update(turn + 1)
                watch.turn()
                if turn:
                    found[name].append(watch.spent)
    return found


def run(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Makes the data of a case, checks both sides against each other, times them and prints what was found."""
    case = CASES[name]
    batch, count = options.batch or case.batch, options.transitions or TRANSITIONS.get(name, 128)
    # Networks with random weights diverge at the recipes' learning rates; no time depends on the rate.
    rates = [f"eil.exploration.{name}_optimiser.learning_rate=1e-9" for name in stock_learner.NETWORKS]
    overrides = [f"eil.exploration.batch_size={batch}", *rates]
    if options.remote:
        overrides += ["engine.num_env_runners=1", "engine.num_gpus_per_env_runner=0"]
        overrides += ["engine.num_learners=1", "engine.torch_threads=1"]
    settings = make_settings(case._replace(overrides=(*case.overrides, *overrides)), options)
    images = min(count, 64)
    store = write_scenes(folder / "data", images, *case.size, case.classes)
    config = EILConfig().apply(settings, run_dir=str(folder), store_uri=store.uri)
    played = play(config, settings, count, images)
    sides = make_sides(config, settings, played, case.classes)
    shape = list(played.episodes[0].get_observations(0).shape)
    print(
        f"  {settings.segmenter.architecture} {settings.segmenter.encoder}, crop {settings.training.augmentation.crop}, "
        f"{settings.eil.virtual_steps} virtual steps; operators {settings.eil.operators.backbone} on planes {shape}; "
        f"{settings.engine.precision}, batch {batch}, {len(sides.replay)} transitions; medians of {options.repeats} updates"
    )
    check(sides, played)
    found = measure(sides, options.repeats, torch.device(options.device))
    report(found, batch, cpu=options.device == "cpu" and not options.remote)
    own, theirs = sides.replay.nbytes / len(sides.replay), stock_learner.nbytes(played.episodes) / len(played.episodes)
    print(f"  bytes per transition in replay: ours {own:.0f}, stock {theirs:.0f}, {theirs / own:.0f} times as much")
    for group in (sides.group, sides.stock_group):
        group.shutdown()


def median(rounds: list[dict[str, np.ndarray]], parts: list[str], clock: int = 0) -> float:
    """Median over updates of the milliseconds in some parts, by a clock (0 wall, 1 CPU)."""
    return 1e3 * statistics.median(
        float(sum(spent[part][clock] for part in parts if part in spent)) for spent in rounds
    )


def report(found: dict[str, list[dict[str, np.ndarray]]], batch: int, *, cpu: bool) -> None:
    """Prints the parts of both sides, their groups, and the ratios."""
    ours, stock = found["ours"], found["stock"]

    def line(text: str, first: float, second: float, group: str = "") -> None:
        print(f"  {text:42s} {first:10.2f} {second:10.2f}  {group}")

    def ratio(text: str, parts: list[str]) -> None:
        first, second = median(ours, parts), median(stock, parts)
        print(
            f"  {text:42s} {1e3 * batch / first:10.1f} {1e3 * batch / second:10.1f}  transitions/s, "
            f"ours : stock {second / first:.3f}"
            + (f" ({median(stock, parts, 1) / median(ours, parts, 1):.3f} by CPU time)" if cpu else "")
        )

    seen = {part for spent in ours + stock for part in spent}
    print(f"  {'milliseconds of an update':42s} {'ours':>10s} {'stock':>10s}")
    if len(seen) > 1:
        for part in (part for part in PARTS if part in seen):
            line(part, median(ours, [part]), median(stock, [part]), PARTS[part])
        for group in GROUPS:
            parts = [part for part in PARTS if PARTS[part] == group]
            line(f"  all of {group}", median(ours, parts), median(stock, parts))
    line("  everything", median(ours, list(PARTS)), median(stock, list(PARTS)))
    ratio("(a) replay to the end of the update", list(PARTS))
    if len(seen) > 1:
        plumbing = [part for part in PARTS if PARTS[part] == PLUMBING]
        passes = [part for part in PARTS if PARTS[part] == SEGMENTER]
        ratio("(b) replay to tensors, with the segmenter", plumbing + passes)
        ratio("(b) replay to tensors, without it", plumbing)
        own = [part for part in PARTS if PARTS[part] == NETWORKS]
        ratio("(c) the networks' own work", own)
        bound = median(stock, list(PARTS)) / median(stock, own)
        print(f"  {'bound on (a): stock, its networks alone':42s} {bound:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times updates from replay against RLlib's stock plumbing.")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="which setting (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--batch", type=int, help="transitions per update (default: 2 for paper, 8 for the others)")
    parser.add_argument(
        "--transitions", type=int, help="transitions in replay (default: 8 for paper, 128 for the others)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of the recipe's")
    parser.add_argument("--repeats", type=int, default=7, help="timed updates (default: 7)")
    parser.add_argument("--remote", action="store_true", help="learners in processes of their own; the whole is timed")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Ray {ray.__version__}, {device}{', remote learners' if options.remote else ''}")
    if options.remote:
        ray.init(num_cpus=4, object_store_memory=2 << 30, include_dashboard=False, log_to_driver=False)
    try:
        for name in options.case or CASES:
            print(f"\n{name}:")
            with tempfile.TemporaryDirectory() as folder:
                run(name, options, Path(folder))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
