"""EIL as RLlib's `Algorithm`: pre-train, then per stage explore, infer with the gate, refine, and score."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.module import OPERATORS
from raysseg.algorithms.eil.plan import ExplorationPlan
from raysseg.algorithms.eil.search import PolicySearch
from raysseg.algorithms.eil.stages import stage_numbers
from raysseg.core import rollout
from raysseg.core.algorithm import DONE, Position, SegmentationAlgorithm
from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.pictures import draw_label_maps
from raysseg.core.replay_shards import Replay, make_replay
from raysseg.core.seeding import draw_seeds
from raysseg.data.label_store import LabelRow
from raysseg.functional.constants import UNLABELLED
from raysseg.functional.selection import moving_average, quantiles_from_histogram

HISTOGRAM_BINS = 10_000
EVOLUTION_SAMPLES = 3


class EIL(SegmentationAlgorithm):
    """Exploratory inference learning (Zhou et al., AAAI 2023) and the yardsticks of its tables.

    Phases: pretrain → evaluate → (explore → infer → refine → evaluate) × stages. Policies without operators skip explore;
    `none` and `full` skip infer.
    """

    settings: EILSettings
    summary_numbers = (*SegmentationAlgorithm.summary_numbers, "labelled_share", "label_precision")

    @classmethod
    def get_default_config(cls) -> EILConfig:
        """Returns EIL's configuration with the paper's settings, still without data."""
        return EILConfig(algo_class=cls)

    def setup(self, config: Any) -> None:
        """Adds the replay buffer and the numbers of the last inference."""
        self.quantiles: list[float] | None = None
        self.label_numbers: dict[str, Any] = {}
        self.replay = make_replay(config.settings.eil.exploration.replay, note=lambda sentence: self.note(sentence))
        super().setup(config)
        self.search = PolicySearch(self) if config.settings.eil.searches else None
        self.has_truth = all(self.store.label(key) is not None for key in self.train_keys[:1])

    @property
    def num_stages(self) -> int:
        """T."""
        return self.settings.eil.stages

    @property
    def training_version(self) -> int:
        """The label version that the segmenter is trained on; −1 is the ground truth (full supervision, after pre-
        training).
        """
        full = self.settings.eil.policy == "full" and self.position.stage > 0
        return -1 if full else self.label_version

    # ---- phases -----------------------------------------------------------------------------------------------------

    def next_phase(self, finished: Position | None) -> str:
        """Returns the phase after a finished one."""
        options, training = self.settings.eil, self.settings.training
        if finished is None:
            return "pretrain" if training.pretrained is None and training.pretrain_epochs > 0 else "evaluate"
        if finished.phase == "pretrain":
            return "evaluate"
        if finished.phase == "explore":
            return "infer"
        if finished.phase == "infer":
            return "refine"
        last = finished.stage >= options.stages
        if finished.phase == "refine" and (last or self.settings.evaluation.every_stage):
            return "evaluate"
        if last:
            return DONE
        return "explore" if options.explores or options.searches else "infer" if options.extends else "refine"

    def next_stage(self, finished: Position) -> int:
        """Returns the stage of the phase after a finished one: a new stage begins after scoring, or after refining
        where that is skipped.
        """
        following = self.next_phase(finished)
        begins = finished.phase == "evaluate" or (finished.phase == "refine" and following != "evaluate")
        return finished.stage + 1 if begins and following != DONE else finished.stage

    def explore_length(self, stage: int) -> int:
        """Returns the iterations of exploring in a stage: some updates of the operators each, or one generation."""
        if self.search is not None:
            return self.search.generations(stage)
        return -(-self.updates_per_stage // self.settings.engine.updates_per_iteration)

    @property
    def updates_per_stage(self) -> int:
        """Updates of the operators in one stage."""
        exploration = self.settings.eil.exploration
        return (
            exploration.updates_per_stage
            if exploration.updates_per_stage is not None
            else -(-len(self.train_keys) // exploration.batch_size)
        )

    def iterations_left(self) -> int:
        """Returns the iterations of the rest of this phase and of all later ones."""
        training, chunk = self.settings.training, self.settings.engine.updates_per_iteration
        per_epoch = -(-len(self.train_keys) // training.batch_size)
        lengths = {
            "pretrain": -(-training.pretrain_epochs * per_epoch // chunk),
            "refine": -(-training.stage_epochs * per_epoch // chunk),
        }
        left, position = 0, self.position
        while position.phase != DONE:
            length = (
                self.explore_length(position.stage) if position.phase == "explore" else lengths.get(position.phase, 1)
            )
            left += max(1, length - position.step // (1 if position.phase == "explore" and self.search else chunk))
            position = Position(phase=self.next_phase(position), stage=self.next_stage(position))
        return left

    def run_explore(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Rolls out, replays and updates the operators some times; a step is one update. Where policies are searched for, it is
        one generation.
        """
        if self.search is not None:
            return self._run_search(self.search, position)
        start, engine = time.perf_counter(), self.settings.engine
        if self.updates_per_stage == 0:
            return {"update": 0}, 0, True
        if position.step == 0:
            self.replay.drop_older(segmenter_version=self.segmenter_version, policy_version=0)
        self.publish(SEGMENTER, OPERATORS)
        steps = min(engine.updates_per_iteration, self.updates_per_stage - position.step)
        loop = self.enter_loop(
            lambda: ExplorationPlan(self, position.stage),
            updates=self.updates_per_stage,
            done=position.step,
            modules=(OPERATORS,),
        )
        loop.plan.fresh.clear()
        numbers = loop.run(steps, should_stop=self.should_stop)
        fresh = list(loop.plan.fresh)
        self.leave_loop(over=position.step + len(numbers) >= self.updates_per_stage)
        self.telemetry.replay(len(self.replay))
        if engine.write_rollouts and fresh:
            name = f"stage-{position.stage}-update-{position.step:06d}.parquet"
            rollout.write_parquet(fresh, Path(self.config.run_dir) / "rollouts" / name)
        self.images_per_second = sum(batch.num_rows for batch in fresh) / max(time.perf_counter() - start, 1e-9)
        done = position.step + len(numbers)
        record = {"update": done, **_averages(numbers), **(self._rollout_numbers(fresh) if fresh else {})}
        return record, len(numbers), done >= self.updates_per_stage

    def _run_search(self, search: PolicySearch, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Rehearses one generation of policies."""
        self.publish(SEGMENTER)
        if position.step == 0:
            search.prepare(position.stage)
        if search.generations(position.stage) == 0:
            return {"generation": 0}, 0, True
        numbers = search.generation(position.stage, position.step)
        done = position.step + 1
        return {"generation": done, **numbers}, 1, done >= search.generations(position.stage)

    def _rollout_numbers(self, batches: list[pa.RecordBatch]) -> dict[str, Any]:
        """Returns the means over fresh transitions, with the hazards of the method: closing gate, saturation, an
        assessor that is wrong.
        """
        table = pa.Table.from_batches(batches)
        reward, value = table.column("reward").to_numpy(), table.column("value").to_numpy()
        parts = np.array(table.column("reward_parts").to_pylist())
        numbers: dict[str, Any] = {
            "reward": float(reward.mean()),
            "reward_relabel": float(parts[:, 0].mean()),
            "reward_features": float(parts[:, 1].mean()),
            "share_positive_reward": float((reward > 0).mean()),
            "corr_q_r": float(np.corrcoef(value, reward)[0, 1]) if value.std() > 0 and reward.std() > 0 else None,
            "mean_q": float(value.mean()),
            "bytes_per_transition": sum(rollout.wire_bytes(batch) for batch in batches) / len(reward),
            "replay_size": len(self.replay),
            "replay_dropped": self.replay.dropped,
        }
        if self.settings.eil.action != "mask":
            actions = np.stack([np.frombuffer(one, dtype=np.float32) for one in table.column("action").to_pylist()])
            numbers["threshold_mean"] = actions.mean(0).tolist()
            numbers["threshold_std"] = actions.std(0).tolist()
        return numbers

    def run_infer(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Infers the label maps of all training images, spread over the actors, and writes them as the stage's label
        version.
        """
        start, count = time.perf_counter(), len(self.train_keys)
        self.publish(SEGMENTER, *([OPERATORS] if self.settings.eil.explores else []))
        size = self.settings.engine.inference_batch_size
        spans: list[np.ndarray] = [
            np.arange(first, min(first + size, count), dtype=np.int64) for first in range(0, count, size)
        ]
        context = {
            "stage": position.stage,
            "label_version": self.label_version,
            "thresholds": self._quantile_thresholds(spans),
            "truth": self.has_truth,
            "policy": None if self.search is None else self.search.order(),
        }
        seeds = draw_seeds(self.settings.seed, "infer", position.stage, count=count)
        orders = [{"rows": rows, "context": {**context, "seeds": seeds[rows]}} for rows in spans]
        table = pa.Table.from_batches(self.map_runners("infer", orders))
        keys, labels = table.column("key").to_pylist(), table.column("label").to_pylist()
        accepted, values = table.column("accepted").to_pylist(), table.column("value").to_pylist()
        self.label_store.write(
            position.stage,
            [
                LabelRow(key=key, label=label, extra={"accepted": float(accept), "value": value})
                for key, label, accept, value in zip(keys, labels, accepted, values, strict=True)
            ],
        )
        self.label_version = position.stage
        self.label_numbers = {
            **stage_numbers(table, self.store.info.num_classes),
            "radius": self.settings.eil.radius_of(position.stage),
        }
        self.images_per_second = count / (time.perf_counter() - start)
        return dict(self.label_numbers), 1, True

    def _quantile_thresholds(self, spans: list[np.ndarray]) -> list[float] | None:
        """Returns the thresholds `[K]` of qP and mqP over the training set, and keeps the moving ones."""
        options = self.settings.eil
        if options.policy not in ("quantile", "moving_quantile"):
            return None
        counts = sum(self.map_runners("histogram", [{"rows": rows, "bins": HISTOGRAM_BINS} for rows in spans]))
        share = options.quantile if options.quantile_reading == "top" else 1 - options.quantile
        current = quantiles_from_histogram(torch.as_tensor(counts), share)
        if options.policy == "moving_quantile" and self.quantiles is not None:
            current = moving_average(torch.tensor(self.quantiles), current, options.quantile_momentum)
        self.quantiles = current.tolist()
        return self.quantiles

    def run_evaluate(self, position: Position) -> tuple[dict[str, Any], int, bool]:
        """Scores the segmenter and repeats the numbers of the label maps it was trained on."""
        if position.stage == 0 or not self.settings.eil.extends:
            self.label_numbers = {"radius": 0, "labelled_share": self._labelled_share(self.training_version)}
        numbers, steps, over = super().run_evaluate(position)
        return {**numbers, **self.label_numbers}, steps, over

    def _labelled_share(self, version: int) -> float:
        """Returns the share of labelled pixels over the training set."""
        size, count = self.settings.engine.inference_batch_size, len(self.train_keys)
        orders = [
            {"rows": np.arange(first, min(first + size, count)), "version": version} for first in range(0, count, size)
        ]
        labelled, pixels = np.array(self.map_runners("count_labels", orders)).sum(0)
        return float(labelled / pixels)

    def export(self, folder: Path) -> SegmenterModule:
        """Writes the segmenter, and the searched policy where there is one."""
        module = super().export(folder)
        if self.search is not None:
            self.search.export(folder)
        return module

    def draw_pictures(self, module: SegmenterModule, folder: Path) -> None:
        """Draws how the label maps of a few training images grew from stage to stage (Fig. 3)."""
        versions = self.label_store.versions()
        maps = {
            key: [scribble, *(self.label_store.label(number, key) for number in versions)]
            for key, scribble in self._telling_scribbles()
        }
        if maps:
            titles = ["scribbles", *(f"stage {number}" for number in versions)]
            draw_label_maps(self.store, module.online, maps, titles, folder / "evolution.png")

    def _telling_scribbles(self) -> list[tuple[str, np.ndarray]]:
        """Returns keys and scribbles of the images with the most classes among the first ones that have scribbles."""
        scribbles = {key: self.store.scribble(key) for key in self.train_keys[:64]}
        found = [(-len(np.setdiff1d(one, [UNLABELLED])), key, one) for key, one in scribbles.items() if one is not None]
        return [(key, one) for _, key, one in sorted(found, key=lambda entry: entry[:2])[:EVOLUTION_SAMPLES]]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def replay_buffers(self) -> dict[str, Replay]:
        """Returns the buffer of the operators' transitions."""
        return {"operators": self.replay}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds quantiles and the numbers of the last inference."""
        state = super().get_state(*args, **kwargs)
        state["eil"] = {
            "quantiles": self.quantiles,
            "label_numbers": self.label_numbers,
            "search": None if self.search is None else self.search.get_state(),
        }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` gave, and removes rollouts that were written later."""
        super().set_state(state)
        own = state.get("eil")
        if own is not None:
            here = self.position
            place = (here.stage, here.step) if here.phase == "explore" else (here.stage + 1,)
            rollout.remove_later(Path(self.config.run_dir) / "rollouts", place)
            self.quantiles = own["quantiles"]
            self.label_numbers = own["label_numbers"]
            if self.search is not None:
                self.search.set_state(own["search"])


def _averages(numbers: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of every number over the updates of one iteration."""
    return {name: float(np.mean([one[name] for one in numbers])) for name in (numbers[0] if numbers else {})}
