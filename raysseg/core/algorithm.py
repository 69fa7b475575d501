"""The driver of a run as RLlib's `Algorithm`: a machine of phases whose every step is small, ordered and resumable.

What each part waits for (synchronous and serial modes):

    driver ── orders (rows, seeds, versions) ──▶ env runners ── rollouts, label maps, confusion matrices ──▶ driver
      │         with the newest weights' reference     │                                                      │
      │                                                └── pull weights that are newer than theirs ◀── store ◀┤
      └── work (decisions from replay, epochs' rows and seeds) ──▶ learners ── losses, weights ───────────────┘

The driver waits for the answers of all orders, whoever gives them, then for the learners. In asynchronous mode
(`raysseg.core.asynchronous`) only who waits changes, not what travels.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm

from raysseg.core.actor_pool import ActorPool
from raysseg.core.asynchronous import AsynchronousLoop, Plan
from raysseg.core.learner_client import LearnerClient
from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.replay_shards import Replay
from raysseg.core.segmenter_phase import SegmenterPhase
from raysseg.core.settings import MethodSettings
from raysseg.core.synchronous import SynchronousLoop
from raysseg.core.telemetry import Telemetry
from raysseg.core.work import LearnerWork
from raysseg.data.label_store import LabelStore
from raysseg.data.store import Store
from raysseg.evaluation import Counts

DONE = "done"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands: which phase of which stage, and how many steps of it are done."""

    phase: str = "pretrain"
    stage: int = 0
    step: int = 0


class SegmentationAlgorithm(Algorithm, abc.ABC):
    """Runs phases one small step at a time; `train()` does one step and its numbers are in `record`.

    A method implements `next_phase` and one function `run_<phase>(position) -> (record, steps done, phase is over)` for each of its
    phases; `pretrain`, `refine` and `evaluate` are here.
    """

    settings: MethodSettings
    summary_numbers: tuple[str, ...] = (
        "split",
        "images",
        "miou",
        "per_class_iou",
        "pixel_accuracy",
        "mean_foreground_dice",
    )
    """What a run's summary takes over from its last evaluation."""

    def setup(self, config: Any) -> None:
        """Builds actors and learner, and starts at the first phase."""
        super().setup(config)
        self.settings = self.config.settings
        if self.settings.engine.torch_threads:
            torch.set_num_threads(self.settings.engine.torch_threads)
        self.store = Store.open(self.config.store_uri)
        self.label_store = LabelStore(self.config.labels_uri)
        self.train_keys = self.store.keys(self.settings.data.train_split)
        self.position = Position(phase=self.next_phase(None))
        self.label_version = 0
        self.segmenter_version = 0
        self.policy_version = 0
        self.elapsed = 0.0
        self.record: dict[str, Any] = {}
        self.images_per_second = 0.0
        self.telemetry = Telemetry()
        self.should_stop: Callable[[], bool] = lambda: False
        self.note: Callable[[str], None] = warnings.warn
        self.learner = LearnerClient(self.learner_group, self.telemetry)
        self.pool: ActorPool | None = None
        self.weights: dict[str, tuple[int, list[ray.ObjectRef]]] = {}
        self._loop: AsynchronousLoop[Any] | SynchronousLoop[Any] | None = None
        self._loop_state: dict[str, Any] | None = None
        self._published: dict[str, int] = {}
        self._publications = 0
        if self.env_runner is not None:
            learners = self.learner_group.foreach_learner(lambda learner: learner.module)
            self.env_runner.share_module(next(iter(learners)).get())
        else:
            self.pool = ActorPool(
                self.env_runner_group._worker_manager.actors(),
                stall_seconds=self.settings.engine.stall_seconds,
                on_death=self._count_death,
            )

    def _count_death(self, lost: int) -> None:
        self.telemetry.actor_died()
        self.telemetry.lost(lost)

    # ---- the machine ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def next_phase(self, finished: Position | None) -> str:
        """Returns the phase after a finished one, or the first phase."""

    def next_stage(self, finished: Position) -> int:
        """Returns the stage that the phase after a finished one belongs to."""
        return finished.stage

    @property
    def done(self) -> bool:
        """Whether every phase of the run is over."""
        return self.position.phase == DONE

    def training_step(self) -> None:
        """Does one step of the current phase."""
        if self.done:
            return
        start = time.perf_counter()
        position = self.position
        run: Callable[[Position], tuple[dict[str, Any], int, bool]] = getattr(self, f"run_{position.phase}")
        numbers, steps, over = run(position)
        self.elapsed += time.perf_counter() - start
        self.record = {
            "iteration": self.iteration + 1,
            "phase": position.phase,
            "stage": position.stage,
            "phase_over": over,
            **numbers,
        }
        self.position = (
            Position(phase=self.next_phase(position), stage=self.next_stage(position))
            if over
            else dataclasses.replace(position, step=position.step + steps)
        )

    def step(self) -> dict[str, Any]:
        """RLlib's iteration, with the numbers of this step under `raysseg`."""
        results = super().step()
        results["raysseg"] = dict(self.record)
        results["done"] = self.done
        return results

    @abc.abstractmethod
    def iterations_left(self) -> int:
        """Returns an estimate of the iterations until the end, for the progress display."""

    # ---- actors and learner -----------------------------------------------------------------------------------------

    def map_runners(self, function: str, orders: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Gives every order to some actor, with the newest weights, and returns the results in the orders' sequence.

        An order whose actor died or fell silent goes to another one; results are pure functions of their orders, so
        nothing changes.
        """
        if self.pool is None:
            return [getattr(self.env_runner, function)(**order) for order in orders]
        results = self.pool.map(function, orders, self.weights)
        self.telemetry.actors(self.pool.alive, self.pool.total)
        return results

    @property
    def num_actors(self) -> int:
        """Number of processes that take orders."""
        return max(1, self.settings.engine.num_env_runners)

    def learn(self, work: LearnerWork) -> dict[str, Any]:
        """Lets the learners do one work order and returns its numbers."""
        return self.learner.update(work)

    def module_version(self, module: str) -> int:
        """Returns the version of a module's weights: the segmenter's, or the policy's."""
        return self.segmenter_version if module == SEGMENTER else self.policy_version

    def publish(self, *modules: str) -> None:
        """Puts the named modules' weights where actors pull them with their next order; what is published already stays.

        In serial mode the actor shares the learner's networks. While an asynchronous loop goes on, it alone publishes, as it
        stamps its orders with what it published.
        """
        if isinstance(self._loop, AsynchronousLoop):
            return
        stale = tuple(module for module in modules if self._published.get(module) != self.module_version(module))
        if self.pool is not None and stale:
            self.take_weights(self.learner.publish(stale), *stale)

    def take_weights(self, reference: ray.ObjectRef, *modules: str) -> None:
        """Takes the reference of the named modules' newest weights, which every order carries from now on."""
        self._publications += 1
        for module in modules:
            self.weights[module] = (self._publications, [reference])
            self._published[module] = self.module_version(module)

    @property
    def rollouts_per_update(self) -> float:
        """Rollouts between two updates: one of every actor in turn, or what `engine.rollouts_per_update` says ahead."""
        engine = self.settings.engine
        return engine.rollouts_per_update if engine.mode == "asynchronous" else self.num_actors

    def enter_loop(
        self, make_plan: Callable[[], Plan], *, updates: int, done: int, modules: tuple[str, ...]
    ) -> AsynchronousLoop[Plan] | SynchronousLoop[Plan]:
        """Returns the actor-learner loop of the current phase; it lives on over iterations until `leave_loop`.

        Args:
            make_plan: makes the method's side, where the phase begins or a run was resumed in it.
            updates: number of updates in the phase.
            done: how many of them are done.
            modules: module ids whose weights actors need after an update.
        """
        if self._loop is None:
            engine = self.settings.engine
            if engine.mode == "synchronous":
                self._loop = SynchronousLoop(self, make_plan(), engine, updates=updates, done=done, modules=modules)
            else:
                assert self.pool is not None
                self._loop = AsynchronousLoop(
                    pool=self.pool,
                    learner=self.learner,
                    plan=make_plan(),
                    engine=engine,
                    telemetry=self.telemetry,
                    updates=updates,
                    policy_version=self.policy_version - done,
                    modules=modules,
                )
            if self._loop_state is not None:
                self._loop.set_state(self._loop_state)
                self._loop_state = None
        return self._loop

    def leave_loop(self, *, over: bool) -> None:
        """Ends the loop where its phase is over."""
        if over and self._loop is not None:
            self._loop.close()
            self._loop = None

    # ---- phases that every method has -------------------------------------------------------------------------------

    def run_pretrain(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains the segmenter before the first stage, some updates of it."""
        return self.train_segmenter(position, self.segmenter_phase(position))

    def run_refine(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains the segmenter on the labels of one stage, some updates of it."""
        return self.train_segmenter(position, self.segmenter_phase(position))

    @property
    @abc.abstractmethod
    def num_stages(self) -> int:
        """Number of stages after pre-training."""

    @property
    def training_version(self) -> int:
        """The label version that the segmenter is trained on."""
        return self.label_version

    def segmenter_phase(self, position: Position) -> SegmenterPhase:
        """Returns what `pretrain` or `refine` trains the segmenter on: here all rows, on the current label version.

        The schedule spans the run, or all stages.
        """
        training, count = self.settings.training, len(self.train_keys)
        refine = position.phase == "refine"
        per_epoch = -(-count // training.batch_size)
        first_epoch = training.pretrain_epochs + (position.stage - 1) * training.stage_epochs if refine else 0
        restart = refine and training.refine_learning_rate is not None
        later = self.num_stages * training.stage_epochs
        before = 0 if restart else training.pretrain_epochs
        return SegmenterPhase(
            rows=np.arange(count),
            version=self.training_version,
            updates=(training.stage_epochs if refine else training.pretrain_epochs) * per_epoch,
            first_epoch=first_epoch,
            first_update=(first_epoch - (training.pretrain_epochs if restart else 0)) * per_epoch,
            total_updates=(before + (later if restart or training.refine_learning_rate is None else 0)) * per_epoch,
            learning_rate=(training.refine_learning_rate if restart else None) or training.optimiser.learning_rate,
            self_training=refine,
        )

    def train_segmenter(self, position: Position, phase: SegmenterPhase) -> tuple[dict[str, Any], int, bool]:
        """Does the next `updates_per_iteration` updates of a phase of the segmenter; a step is one update."""
        training, start = self.settings.training, time.perf_counter()
        steps = min(self.settings.engine.updates_per_iteration, phase.updates - position.step)
        if steps <= 0:
            return {"epoch": phase.first_epoch, "loss": None}, 0, True
        work = phase.work(position.step, steps, training, self.settings.seed)
        assert work.records is not None
        numbers = self.learn(work)
        self.segmenter_version += steps
        self.images_per_second = work.records.num_rows / (time.perf_counter() - start)
        done = position.step + steps
        return {"epoch": phase.epoch_after(done, training.batch_size), **numbers}, steps, done >= phase.updates

    def run_evaluate(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Scores the segmenter on the validation split, spread over the actors."""
        self.publish(SEGMENTER)
        return self.score(self.settings.data.val_split), 1, True

    def score(self, split: str) -> dict[str, Any]:
        """Returns mIoU and its companions on a split, from one confusion matrix over the whole set; iIoU where it has
        Cityscapes' instances.
        """
        start = time.perf_counter()
        count = len(self.store.keys(split))
        size = max(self.settings.engine.inference_batch_size, -(-count // (4 * self.num_actors)))
        orders = [
            {"rows": np.arange(first, min(first + size, count), dtype=np.int64), "split": split}
            for first in range(0, count, size)
        ]
        counts: Counts = functools.reduce(operator.add, self.map_runners("evaluate", orders))
        self.images_per_second = count / (time.perf_counter() - start)
        return {"split": split, "images": count, **counts.record()}

    def export_module(self) -> SegmenterModule:
        """Returns a copy of the segmenter's module with the learner's weights, on the CPU."""
        module = self.config.segmenter_spec()
        module.inference_only = True
        built = module.build()
        state = self.learner_group.get_state(components=f"learner/rl_module/{SEGMENTER}")
        built.set_state(state["learner"]["rl_module"][SEGMENTER])
        return built

    def export(self, folder: Path) -> SegmenterModule:
        """Writes everything of a finished run that is used without its training, and returns the segmenter's module."""
        module = self.export_module()
        module.export(folder / SEGMENTER)
        return module

    def draw_pictures(self, module: SegmenterModule, folder: Path) -> None:
        """Draws what a finished run is to show into a folder, which may not exist yet; nothing here."""

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def replay_buffers(self) -> dict[str, Replay]:
        """Returns the replay buffers by name; a checkpoint saves them incrementally beside RLlib's state."""
        return {}

    def restore_replay(self, states: dict[str, dict[str, Any]], folder: Path) -> None:
        """Loads what the replay buffers saved, each below its name in a folder."""
        for name, buffer in self.replay_buffers().items():
            buffer.load(folder / name, states[name])

    def cleanup(self) -> None:
        """Ends what the run started, without a word to the actors: RLlib would ask each to stop and wait for one that is
        silent, or that has no node to be restarted on, for ever.
        """
        for buffer in self.replay_buffers().values():
            buffer.close()
        self.env_runner_group._worker_manager.clear()
        super().cleanup()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state with the machine's position and versions, without replay buffers."""
        state: dict[str, Any] = super().get_state(*args, **kwargs)
        state["raysseg"] = {
            "position": dataclasses.asdict(self.position),
            "label_version": self.label_version,
            "segmenter_version": self.segmenter_version,
            "policy_version": self.policy_version,
            "elapsed": self.elapsed,
            "telemetry": self.telemetry.get_state(),
            "loop": None if self._loop is None else self._loop.get_state(),
        }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` gave, and drops label versions that are newer."""
        super().set_state(state)
        own = state.get("raysseg")
        if own is None:
            return
        self.position = Position(**own["position"])
        self.label_version = own["label_version"]
        self.segmenter_version = own["segmenter_version"]
        self.policy_version = own["policy_version"]
        self.elapsed = own["elapsed"]
        self.telemetry.set_state(own["telemetry"])
        self._loop_state = own["loop"]
        self.label_store.remove_after(self.label_version)
