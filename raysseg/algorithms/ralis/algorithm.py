"""RALIS as RLlib's `Algorithm`: pre-train twice, play, label D_V with what was learned, then train and score per budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.module import QUERY, START
from raysseg.algorithms.ralis.plan import PlayPlan
from raysseg.algorithms.ralis.pools import check_budget, check_grid, check_oracle
from raysseg.algorithms.ralis.replay import StepReplay
from raysseg.algorithms.ralis.results import draw_regions, write_results
from raysseg.algorithms.ralis.sets import RegionSets
from raysseg.algorithms.ralis.stages import Labelled, count_budgets, label_maps
from raysseg.algorithms.ralis.steps import StepShapes
from raysseg.algorithms.ralis.variant_sets import sets_of_run
from raysseg.core import rollout
from raysseg.core.algorithm import DONE, Position, SegmentationAlgorithm
from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.seeding import draw_seeds
from raysseg.core.segmenter_phase import SegmenterPhase
from raysseg.data.batches import GROUND_TRUTH
from raysseg.data.store import Store


class RALIS(SegmentationAlgorithm):
    """Reinforced active learning (Casanova et al., ICLR 2020), its baselines, and full supervision.

    Phases: start → pretrain → evaluate → play → acquire → (refine → evaluate) × budgets. Only the policy `query` plays;
    `full` neither plays nor acquires, and `none` ends with theta_0.
    """

    settings: RALISSettings
    summary_numbers = (*SegmentationAlgorithm.summary_numbers, "budget", "labelled_share", "rare_share")

    @classmethod
    def get_default_config(cls) -> RALISConfig:
        """Returns RALIS' configuration with the paper's settings, still without data."""
        return RALISConfig(algo_class=cls)

    def setup(self, config: Any) -> None:
        """Cuts the training split into its sets before any actor starts, and adds the replay buffer."""
        settings: RALISSettings = config.settings
        options, store = settings.ralis, Store.open(config.store_uri)
        keys = store.keys(settings.data.train_split)
        check_grid(keys, [store.size(key) for key in keys], options.regions.rows, options.regions.columns)
        self.sets: RegionSets = sets_of_run(settings, store, Path(config.run_dir))
        if options.policy != "none":
            check_oracle([key for key in (keys[row] for row in self.sets.pool) if not store.has_label(key)])
        if options.labels:
            check_budget("ralis.budgets", max(options.budgets), len(self.sets.pool), options.regions.count)
        network = options.network(store.info.num_classes)
        shapes = StepShapes(
            state=(network["state_size"], network["state_features"]),
            candidates=(options.per_step, options.learning.pool_size, network["action_features"]),
        )
        learning = options.learning
        self.replay = StepReplay(
            learning.replay,
            shapes=shapes,
            return_steps=learning.return_steps,
            gamma=learning.gamma,
            centred=learning.reward_baseline == "step",
        )
        self.labelled = Labelled.everything(self.sets.pool[:0], 0)
        self.acquisition: dict[str, Any] | None = None
        self.budget_numbers: list[dict[str, Any]] = []
        super().setup(config)

    @property
    def num_stages(self) -> int:
        """Budgets that a segmenter is trained for after theta_0."""
        options = self.settings.ralis
        return len(options.budgets) if options.labels else int(options.policy == "full")

    def module_version(self, module: str) -> int:
        """Returns the version of a module's weights; the starting segmenter never changes while it is used."""
        return 0 if module == START else super().module_version(module)

    # ---- phases -----------------------------------------------------------------------------------------------------

    def next_phase(self, finished: Position | None) -> str:
        """Returns the phase after a finished one."""
        options, training = self.settings.ralis, self.settings.training
        if finished is None:
            return "start" if training.pretrained is None and training.pretrain_epochs > 0 else "evaluate"
        if finished.phase in ("start", "pretrain", "play", "acquire"):
            return {"start": "pretrain", "pretrain": "evaluate", "play": "acquire", "acquire": "refine"}[finished.phase]
        last = finished.stage >= self.num_stages
        if finished.phase == "refine" and (last or self.settings.evaluation.every_stage):
            return "evaluate"
        if last:
            return DONE
        if finished.stage > 0 or not options.labels:
            return "refine"
        return "play" if options.learns else "acquire"

    def next_stage(self, finished: Position) -> int:
        """Returns the stage of the phase after a finished one: every budget begins with refining."""
        return finished.stage + (self.next_phase(finished) == "refine")

    @property
    def play_updates(self) -> int:
        """Updates of the loop while playing: one for the episodes that pay for it."""
        return math.ceil(self.settings.ralis.learning.episodes / self.rollouts_per_update)

    @property
    def minibatches_per_update(self) -> int:
        """Updates of the query network in one update of the loop."""
        options = self.settings.ralis
        played = options.steps_per_episode * self.rollouts_per_update
        return max(1, round(options.learning.updates_per_step * played))

    @property
    def _play_chunk(self) -> int:
        return max(1, self.settings.engine.updates_per_iteration // self.minibatches_per_update)

    def _segmenter_updates(self, phase: str) -> int:
        """Returns the updates of one phase of the segmenter, which depend on neither policy nor budget."""
        training, sets = self.settings.training, self.sets
        if phase == "start":
            return math.ceil(self.settings.ralis.start_share * self._segmenter_updates("pretrain"))
        count, epochs = {
            "pretrain": (len(sets.labelled), training.pretrain_epochs),
            "refine": (len(sets.labelled) + len(sets.pool), training.stage_epochs),
        }[phase]
        return epochs * -(-count // training.batch_size)

    def iterations_left(self) -> int:
        """Returns the iterations of the rest of this phase and of all later ones."""
        chunk, options = self.settings.engine.updates_per_iteration, self.settings.ralis
        left, position = 0, self.position
        while position.phase != DONE:
            length, each = 1, 1
            if position.phase in ("start", "pretrain", "refine"):
                length, each = self._segmenter_updates(position.phase), chunk
            elif position.phase == "play":
                length, each = self.play_updates, self._play_chunk
            elif position.phase == "acquire":
                length, each = max(options.budgets) // options.per_step, chunk
            left += max(1, -(-(length - position.step) // each))
            position = Position(phase=self.next_phase(position), stage=self.next_stage(position))
        return left

    # ---- the segmenter ----------------------------------------------------------------------------------------------

    def segmenter_phase(self, position: Position) -> SegmenterPhase:
        """Returns what the segmenter is trained on: a part of D_T, D_T, or D_T and the labels of a budget.

        Every phase has its own schedule.
        """
        training, refine = self.settings.training, position.phase == "refine"
        version, rows = GROUND_TRUTH, self.sets.start if position.phase == "start" else self.sets.labelled
        if refine and self.settings.ralis.policy == "full":
            rows = np.concatenate([rows, self.sets.pool])
        elif refine:
            version = position.stage
            rows = np.concatenate([rows, np.unique(self.labelled_at(position.stage).rows)])
        updates = self._segmenter_updates(position.phase)
        rate = training.refine_learning_rate if refine else None
        return SegmenterPhase(
            rows=rows,
            version=version,
            updates=updates,
            first_epoch=0,
            where=("segmenter", position.phase, position.stage),
            first_update=0,
            total_updates=updates,
            learning_rate=rate or training.optimiser.learning_rate,
        )

    def run_start(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains the segmenter that played episodes start with, some updates of it."""
        return self.train_segmenter(position, self.segmenter_phase(position))

    def run_pretrain(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains theta_0 on all of D_T, from what played episodes start with; some updates of it."""
        if position.step == 0:
            self._on_learners(lambda learner: learner.capture_segmenter("network"))
            self._on_learners(lambda learner: learner.restart_segmenter(from_origin=False))
        return super().run_pretrain(position)

    def run_refine(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains the segmenter from theta_0 on D_T and the labels of one budget, some updates of it."""
        if position.step == 0:
            self._on_learners(lambda learner: learner.restart_segmenter(from_origin=True))
            self.segmenter_version += 1
        return super().run_refine(position)

    def run_evaluate(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Scores the segmenter as the last update left it, with the numbers of the labels that it was trained on."""
        if position.stage == 0:
            self._on_learners(lambda learner: learner.capture_segmenter("origin"))
        numbers, steps, over = super().run_evaluate(position)
        if self.settings.ralis.policy == "full" and position.stage > 0 and not self.budget_numbers:
            whole = Labelled.everything(self.sets.pool, self.settings.ralis.regions.count)
            self.budget_numbers = self._count_budgets(whole, [len(whole)])
        bought = self.budget_numbers[position.stage - 1] if position.stage > 0 else {"budget": 0, "labelled_share": 0.0}
        return {**numbers, **bought}, steps, over

    def _on_learners(self, function: Callable[[Any], None]) -> None:
        """Calls a function on every learner and waits for all of them."""
        for answer in self.learner_group.foreach_learner(function):
            if not answer.ok:
                raise answer.get()

    # ---- play -------------------------------------------------------------------------------------------------------

    def run_play(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Plays episodes on D_T and learns from them; a step is one update of the loop."""
        start, engine, total = time.perf_counter(), self.settings.engine, self.play_updates
        self.publish(START, QUERY)
        steps = min(self._play_chunk, total - position.step)
        loop = self.enter_loop(lambda: PlayPlan(self), updates=total, done=position.step, modules=(QUERY,))
        loop.plan.fresh.clear()
        numbers = loop.run(steps, should_stop=self.should_stop)
        fresh, done = list(loop.plan.fresh), position.step + len(numbers)
        self.leave_loop(over=done >= total)
        self.telemetry.replay(len(self.replay))
        if engine.write_rollouts and fresh:
            path = Path(self.config.run_dir) / "rollouts" / f"play-update-{position.step:06d}.parquet"
            rollout.write_parquet(fresh, path)
        regions = sum(batch.num_rows for batch in fresh) * self.settings.ralis.per_step
        self.images_per_second = regions / max(time.perf_counter() - start, 1e-9)
        means = {name: float(np.mean([one[name] for one in numbers])) for name in (numbers[0] if numbers else {})}
        record = {"update": done, **means, **(self._episode_numbers(fresh) if fresh else {})}
        return record, len(numbers), done >= total

    def _episode_numbers(self, episodes: list[pa.RecordBatch]) -> dict[str, Any]:
        """Returns what fresh episodes were worth."""
        table = pa.Table.from_batches(episodes)
        reward = table.column("reward").to_numpy()
        return {
            "episodes": len(episodes),
            "reward": float(reward.mean()),
            "episode_return": float(np.mean([batch.column("reward").to_numpy().sum() for batch in episodes])),
            "episode_miou": float(np.mean([batch.column("miou")[-1].as_py() for batch in episodes])),
            "share_positive_reward": float((reward > 0).mean()),
            "epsilon": float(table.column("epsilon").to_numpy().mean()),
            "bytes_per_transition": sum(rollout.wire_bytes(batch) for batch in episodes)
            / (len(reward) * self.settings.ralis.per_step),
            "replay_size": len(self.replay),
            "replay_dropped": self.replay.dropped,
        }

    # ---- acquire ----------------------------------------------------------------------------------------------------

    def run_acquire(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Labels D_V from theta_0 on, some steps of it in one actor, up to the largest budget; a step labels K regions."""
        start, options = time.perf_counter(), self.settings.ralis
        total = max(options.budgets) // options.per_step
        steps = min(self.settings.engine.updates_per_iteration, total - position.step)
        self.publish(SEGMENTER, *([QUERY] if options.learns else []))
        context = {
            "steps": steps,
            "seed": int(draw_seeds(self.settings.seed, "acquire", count=1)[0]),
            "state": self.acquisition,
        }
        (answer,) = self.map_runners("acquire", [{"context": context}])
        self.acquisition = answer["state"]
        self.labelled = Labelled(
            rows=np.concatenate([self.labelled.rows, answer["rows"].reshape(-1)]),
            regions=np.concatenate([self.labelled.regions, answer["regions"].reshape(-1)]),
        )
        done = position.step + steps
        if done >= total:
            self._write_labels()
            self.acquisition = None
        self.images_per_second = steps * options.per_step / (time.perf_counter() - start)
        record = {
            "labelled_regions": len(self.labelled),
            "labelled_images": len(np.unique(self.labelled.rows)),
            "reward": float(answer["reward"].mean()),
            "episode_miou": float(answer["miou"][-1]),
            "step_loss": float(answer["loss"].mean()),
        }
        return record, steps, done >= total

    def labelled_at(self, stage: int) -> Labelled:
        """Returns the regions of one budget."""
        return self.labelled.first(self.settings.ralis.budgets[stage - 1])

    def _write_labels(self) -> None:
        """Writes one label version for every budget, and counts what its regions are made of."""
        options = self.settings.ralis
        for stage in range(1, self.num_stages + 1):
            maps = label_maps(self.store, self.train_keys, self.sets.labelled, self.labelled_at(stage), options.regions)
            self.label_store.write(stage, maps)
        self.label_version = self.num_stages
        self.budget_numbers = self._count_budgets(self.labelled, options.budgets)

    def _count_budgets(self, labelled: Labelled, budgets: Sequence[int]) -> list[dict[str, Any]]:
        """Returns what every budget bought."""
        return count_budgets(
            self.store,
            self.train_keys,
            labelled,
            budgets,
            known=self.sets.labelled,
            pool=len(self.sets.pool),
            options=self.settings.ralis.regions,
        )

    def export(self, folder: Path) -> SegmenterModule:
        """Writes the segmenter, and what goes on from it or from what was learned needs."""
        module = super().export(folder)
        write_results(self, folder)
        return module

    def draw_pictures(self, module: SegmenterModule, folder: Path) -> None:
        """Draws the labelled regions of every budget over the images that most of them come from."""
        if len(self.labelled):
            draw_regions(self, module.online, folder / "regions.png")

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def replay_buffers(self) -> dict[str, Any]:
        """Returns the buffer of the played steps, where the variant plays."""
        return {"steps": self.replay} if self.settings.ralis.learns else {}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds the labelled regions, and where their acquisition stands."""
        state = super().get_state(*args, **kwargs)
        state["ralis"] = {
            "rows": self.labelled.rows,
            "regions": self.labelled.regions,
            "acquisition": self.acquisition,
            "budget_numbers": self.budget_numbers,
        }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` gave, and removes episodes that were written later."""
        super().set_state(state)
        own = state.get("ralis")
        if own is not None:
            if self.position.phase in ("start", "pretrain", "evaluate", "play") and self.position.stage == 0:
                place = (self.position.step if self.position.phase == "play" else 0,)
                rollout.remove_later(Path(self.config.run_dir) / "rollouts", place)
            self.labelled = Labelled(rows=own["rows"], regions=own["regions"])
            self.acquisition, self.budget_numbers = own["acquisition"], own["budget_numbers"]
