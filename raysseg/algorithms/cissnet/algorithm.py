"""CiSS-Net as RLlib's `Algorithm`: train the segmenter that X is from, learn contexts on it, score at every t."""

from __future__ import annotations

import functools
import operator
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.features import NewestFeatures
from raysseg.algorithms.cissnet.module import CONTEXT, ContextNetworks
from raysseg.algorithms.cissnet.pictures import draw_contexts
from raysseg.algorithms.cissnet.plan import ContextPlan
from raysseg.algorithms.cissnet.results import save_networks
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.core import rollout
from raysseg.core.algorithm import DONE, Position, SegmentationAlgorithm
from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.segmenter_phase import SegmenterPhase
from raysseg.data.batches import GROUND_TRUTH
from raysseg.evaluation import Counts

STEP_SCORES = ("miou", "pixel_accuracy", "iiou")
EPISODE_NUMBERS = ("reward", "context_share", "context_right", "accuracy")


class CiSSNet(SegmentationAlgorithm):
    """Context-reinforced segmentation (Zhou et al., CVPR 2019) and what the paper compares it with.

    Phases: pretrain → evaluate (the segmenter that X is from) → base (the Base Net alone, where it has updates of its own) →
    learn → evaluate (at every t). `none` ends with the first evaluation.
    """

    settings: CiSSNetSettings

    @classmethod
    def get_default_config(cls) -> CiSSNetConfig:
        """Returns CiSS-Net's configuration with the paper's settings, still without data."""
        return CiSSNetConfig(algo_class=cls)

    def setup(self, config: Any) -> None:
        """Builds everything; no rollout waits to be learned from yet."""
        self.fresh: list[pa.RecordBatch] = []
        super().setup(config)
        # X of a whole minibatch and of its pieces may differ in the last bit, and with them serial and remote runs.
        if self.env_runner is not None and self.learner.is_local and self.settings.engine.gradient_accumulation == 1:
            newest = NewestFeatures()
            self.env_runner.newest_features = newest
            self.learner_group.foreach_learner(lambda learner: learner.look_for_features(newest))

    @property
    def num_stages(self) -> int:
        """One stage of learning, where anything is trained on X."""
        return self.settings.cissnet.stages

    @property
    def training_version(self) -> int:
        """The segmenter that X is from learns from the dataset's own labels."""
        return GROUND_TRUTH

    # ---- phases -----------------------------------------------------------------------------------------------------

    def next_phase(self, finished: Position | None) -> str:
        """Returns the phase after a finished one."""
        training = self.settings.training
        if finished is None:
            return "pretrain" if training.pretrained is None and training.pretrain_epochs > 0 else "evaluate"
        if finished.phase == "evaluate":
            if finished.stage == self.num_stages:
                return DONE
            return "base" if self.settings.cissnet.learning.base_updates else "learn"
        return "learn" if finished.phase == "base" else "evaluate"

    def next_stage(self, finished: Position) -> int:
        """Returns the stage of the phase after a finished one: learning begins the only one."""
        return int(finished.stage > 0 or self.next_phase(finished) in ("base", "learn"))

    def iterations_left(self) -> int:
        """Returns the iterations of the rest of this phase and of all later ones."""
        chunk, left, position = self.settings.engine.updates_per_iteration, 0, self.position
        while position.phase != DONE:
            learning = self.settings.cissnet.learning
            length = {"pretrain": self._pretrain_updates, "base": learning.base_updates, "learn": learning.updates}
            each = chunk if position.phase in length else 1
            left += max(1, -(-(length.get(position.phase, 1) - position.step) // each))
            position = Position(phase=self.next_phase(position), stage=self.next_stage(position))
        return left

    @property
    def _pretrain_updates(self) -> int:
        return self.segmenter_phase(Position(phase="pretrain")).updates

    def segmenter_phase(self, position: Position) -> SegmenterPhase:
        """Returns what the segmenter that X is from is trained on: all rows, with a schedule of their own."""
        training, rows = self.settings.training, np.arange(len(self.train_keys))
        updates = training.pretrain_epochs * -(-len(rows) // training.batch_size)
        return SegmenterPhase(
            rows=rows,
            version=GROUND_TRUTH,
            updates=updates,
            first_epoch=0,
            first_update=0,
            total_updates=updates,
            learning_rate=training.optimiser.learning_rate,
        )

    # ---- learn ------------------------------------------------------------------------------------------------------

    def run_base(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Trains the Base Net alone, on episodes without a step; a step of the phase is one update."""
        return self._update(position, self.settings.cissnet.learning.base_updates, episode_steps=0, first=0)

    def run_learn(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Plays contexts and learns from them; a step of the phase is one update."""
        options = self.settings.cissnet
        steps, first = options.episode_steps, options.learning.base_updates
        return self._update(position, options.learning.updates, episode_steps=steps, first=first)

    def _update(
        self, position: Position, total: int, *, episode_steps: int, first: int
    ) -> tuple[dict[str, Any], int, bool]:
        start, engine = time.perf_counter(), self.settings.engine
        self.publish(SEGMENTER, CONTEXT)
        steps = min(engine.updates_per_iteration, total - position.step)
        loop = self.enter_loop(
            lambda: ContextPlan(self, steps=episode_steps, first=first),
            updates=total,
            done=position.step,
            modules=(CONTEXT,),
        )
        loop.plan.learned_from.clear()
        numbers = loop.run(steps, should_stop=self.should_stop)
        episodes, done = list(loop.plan.learned_from), position.step + len(numbers)
        self.leave_loop(over=done >= total)
        if done >= total:
            self.fresh.clear()
        if engine.write_rollouts and episodes:
            rollout.write_parquet(
                episodes, Path(self.config.run_dir) / "rollouts" / f"update-{first + position.step:06d}.parquet"
            )
        self.images_per_second = sum(one.num_rows for one in episodes) / max(time.perf_counter() - start, 1e-9)
        names = [name for name in (numbers[0] if numbers else {}) if name != "timing"]
        means = {name: float(np.mean([one[name] for one in numbers])) for name in names}
        record = {"update": first + done, **means, **(self._episode_numbers(episodes) if episodes else {})}
        return record, len(numbers), done >= total

    def _episode_numbers(self, episodes: list[pa.RecordBatch]) -> dict[str, Any]:
        """Returns what the episodes that were learned from were like."""
        table = pa.Table.from_batches(episodes)
        columns = {name: np.array(table.column(name).to_pylist(), dtype=np.float64) for name in EPISODE_NUMBERS}
        numbers: dict[str, Any] = {
            "episodes": table.num_rows,
            "first_accuracy": float(columns["accuracy"][:, 0].mean()),
            "last_accuracy": float(columns["accuracy"][:, -1].mean()),
            "bytes_per_episode": sum(rollout.wire_bytes(one) for one in episodes) / table.num_rows,
            "rollouts_dropped": self.telemetry.get_state()["rollouts_dropped"],
        }
        if columns["reward"].shape[1]:
            numbers["reward"] = float(columns["reward"].mean())
            numbers["episode_return"] = float(columns["reward"].sum(1).mean())
            numbers["context_share"] = share = float(columns["context_share"].mean())
            if share:
                numbers["context_accuracy"] = float(columns["context_right"].mean()) / share
                if share < 1:
                    all_right = float(columns["accuracy"][:, :-1].mean())
                    numbers["uncertain_accuracy"] = (all_right - float(columns["context_right"].mean())) / (1 - share)
        return numbers

    # ---- evaluate ---------------------------------------------------------------------------------------------------

    def run_evaluate(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Scores the segmenter that X is from, and after learning the networks on X at every t."""
        if position.stage == 0:
            return super().run_evaluate(position)
        self.publish(SEGMENTER, CONTEXT)
        split = self.settings.data.val_split
        start, count = time.perf_counter(), len(self.store.keys(split))
        size = max(self.settings.engine.inference_batch_size, -(-count // (4 * self.num_actors)))
        orders = [
            {"rows": np.arange(first, min(first + size, count), dtype=np.int64), "split": split}
            for first in range(0, count, size)
        ]
        parts: list[list[Counts]] = self.map_runners("score_steps", orders)
        counts = [functools.reduce(operator.add, of_step) for of_step in zip(*parts, strict=True)]
        options = self.settings.cissnet
        records = {step: one.record() for step, one in zip(options.scored_steps, counts, strict=True)}
        used = records[options.inference_steps]
        self.images_per_second = count / (time.perf_counter() - start)
        return (
            {
                "split": split,
                "images": count,
                **used,
                "steps": list(records),
                **{f"{name}_at_steps": [one[name] for one in records.values()] for name in STEP_SCORES if name in used},
            },
            1,
            True,
        )

    # ---- results ----------------------------------------------------------------------------------------------------

    def export_networks(self) -> ContextNetworks:
        """Returns a copy of the networks on X with the learner's weights, on the CPU in evaluation mode."""
        module = self.config.method_specs()[CONTEXT].build()
        state = self.learner_group.get_state(components=f"learner/rl_module/{CONTEXT}")
        module.set_state(state["learner"]["rl_module"][CONTEXT])
        return module.networks.eval()

    def export(self, folder: Path) -> SegmenterModule:
        """Writes the segmenter that X is from, and the networks on X."""
        module = super().export(folder)
        if self.settings.cissnet.trains:
            save_networks(self.export_networks(), folder)
        return module

    def draw_pictures(self, module: SegmenterModule, folder: Path) -> None:
        """Draws contexts and predictions step by step on some images of the validation split."""
        if self.settings.cissnet.uses_context:
            network = ContextSegmenter(module.online.eval(), self.export_networks(), self.settings.cissnet)
            draw_contexts(self.store, self.store.keys(self.settings.data.val_split), network, folder / "contexts.png")

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds the rollouts that arrived and were not learned from yet."""
        state = super().get_state(*args, **kwargs)
        state["cissnet"] = {"fresh": rollout.to_bytes(self.fresh)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` gave, and removes episodes that were written later."""
        super().set_state(state)
        own = state.get("cissnet")
        if own is not None:
            self.fresh[:] = rollout.from_bytes(own["fresh"])
            position, first = self.position, self.settings.cissnet.learning.base_updates
            if position.stage == 0 or position.phase in ("base", "learn"):
                done = {"base": position.step, "learn": first + position.step}.get(position.phase, 0)
                rollout.remove_later(Path(self.config.run_dir) / "rollouts", (done,))
