"""EIL's actor: explores (Eq. 3-4, 12), infers the label maps of a stage (Eq. 13) and counts what they are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.eil.actions import pack_actions, quantise_mask
from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.env import EILVectorEnv
from raysseg.algorithms.eil.module import OPERATORS, OperatorsModule
from raysseg.algorithms.eil.policy import Policy
from raysseg.algorithms.eil.rehearsal import Outcome, Rehearsal
from raysseg.algorithms.eil.rewards import GATES, REWARDS, Transition
from raysseg.algorithms.eil.state import EILState
from raysseg.core import rollout
from raysseg.core.env_runner import SegmentationEnvRunner
from raysseg.data.codec import encode_map
from raysseg.errors import NonFiniteError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.ddpg import explore
from raysseg.functional.policy_search import image_traits
from raysseg.functional.random import mix, uniform
from raysseg.functional.reward import reliability
from raysseg.functional.selection import confidence_histogram
from raysseg.functional.statistics import label_precision
from raysseg.segmenters import build_segmenter


class EILEnvRunner(SegmentationEnvRunner):
    """Plays the ordered episodes with the searcher (or with uniform actions), and infers the ordered label maps with
    the teacher.
    """

    settings: EILSettings

    def make_env(self) -> None:
        """Builds the environment; its segmenter is replaced by the module's before it is played."""
        options = self.settings.eil
        segmenter = (
            self.segmenter.online
            if self.module is not None
            else build_segmenter(
                self.settings.segmenter.model_copy(update={"weights": "none"}), self.workspace.num_classes
            )
        )
        self.env: EILVectorEnv = EILVectorEnv(
            self.workspace,
            self.settings,
            num_envs=options.exploration.rollout_batch_size,
            segmenter=segmenter,
            autoreset_mode=AutoresetMode.DISABLED,
        )
        self._rehearsal: tuple[tuple[int, int, int], Rehearsal] | None = None

    @property
    def operators(self) -> OperatorsModule:
        """Searcher and assessor."""
        assert self.module is not None
        return self.module[OPERATORS]

    @torch.inference_mode()
    def sample(self, *, records: pa.RecordBatch, context: dict[str, Any]) -> pa.RecordBatch:  # type: ignore[override]
        """Rolls out the ordered episodes with the behaviour policy.

        Args:
            records: columns `row` and `seed`.
            context: `stage`, `label_version`, `segmenter_version`, `policy_version`, `noise_std`, `uniform_share`.

        Returns:
            Transitions; the behaviour's q stands in `value`, the two parts of r in `reward_parts`.

        Raises:
            NonFiniteError: a reward or an action is not finite.
        """
        env = self.env
        env.use_segmenter(self.segmenter.online)
        env.label_version, env.stage = context["label_version"], context["stage"]
        rows, seeds = np.asarray(records.column("row")), np.asarray(records.column("seed"))
        planes, _ = env.reset(options={"rows": torch.tensor(rows), "seeds": torch.tensor(seeds)})
        keys = [self.workspace.train.keys[row] for row in rows]
        item_seeds = torch.tensor(seeds, device=self.device)
        parts: list[pa.RecordBatch] = []
        for step in range(self.settings.eil.exploration.episode_steps):
            actions = self._behaviour(planes, mix(item_seeds, step), context)
            with self.workspace.autocast():
                values = self.operators.assessor.eval()(planes, actions).float()
            before = env.state
            assert before is not None
            planes, reward, terminated, truncated, info = env.step(actions)
            assert env.state is not None
            self._check_finite(reward, actions, keys, context)
            parts.append(
                rollout.transitions(
                    {
                        "key": keys,
                        "row": rows,
                        "seed": seeds,
                        "stage": np.full(len(rows), context["stage"] + step),
                        "step": np.full(len(rows), step),
                        "labels": [None] * len(rows) if step == 0 else _encode(before.labels),
                        "action": pack_actions(actions, self.settings.eil.action),
                        "next_labels": _encode(env.state.labels),
                        "reward": reward.cpu().numpy(),
                        "reward_parts": torch.stack([info["reward_relabelling"], info["reward_features"]], 1)
                        .cpu()
                        .numpy()
                        .tolist(),
                        "value": values.cpu().numpy(),
                        "terminated": terminated.cpu().numpy(),
                        "label_version": np.full(len(rows), context["label_version"]),
                        "segmenter_version": np.full(len(rows), context["segmenter_version"]),
                        "policy_version": np.full(len(rows), context["policy_version"]),
                    }
                )
            )
            if bool((terminated | truncated).all()):
                break
        return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]

    def _behaviour(self, planes: torch.Tensor, seeds: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        """Returns the actions `[B, A]` that are played: the searcher's with noise, or uniform ones."""
        options = self.settings.eil
        if options.policy == "random":
            return uniform(seeds, options.action_size(self.workspace.num_classes))
        with self.workspace.autocast():
            actions = self.operators.searcher.eval()(planes).float()
        actions = explore(actions, seeds, noise_std=context["noise_std"], uniform_share=context["uniform_share"])
        return quantise_mask(actions) if options.action == "mask" else actions

    def _check_finite(
        self, reward: torch.Tensor, actions: torch.Tensor, keys: list[str], context: dict[str, Any]
    ) -> None:
        finite = torch.isfinite(reward) & torch.isfinite(actions).all(1)
        if not bool(finite.all()):
            bad = [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
            name = "reward" if bool(torch.isfinite(actions).all()) else "action"
            raise NonFiniteError(
                f"The {name} is not finite in stage {context['stage']} at policy version {context['policy_version']}; "
                f"its samples are {', '.join(bad)}."
            )

    @torch.inference_mode()
    def infer(self, *, rows: np.ndarray, context: dict[str, Any]) -> pa.RecordBatch:
        """Infers M^{t+1} of whole images with the teacher, and gates it (Eq. 13).

        Args:
            rows: int64 `[N]` rows of the training split.
            context: `stage`, `label_version`, `seeds` int64 `[N]`, `thresholds` (of the quantile policies), `policy` (of the
                searched one), `truth` (whether there is any).

        Returns:
            One record per image: key, label bytes, accepted, value, action, and pixel counts (labelled, proposed, correct, …).
        """
        index = torch.as_tensor(rows, device=self.device)
        sizes = self.workspace.train.images(index)[1].tolist()
        state = self.workspace_state(index, context["label_version"])
        truth = self.workspace.train.labels(index, -1) if context["truth"] else None
        actions, inferred, values = self._propose(state, truth, context)
        gate = GATES[self.settings.eil.gate](values) if values is not None else None
        accept = torch.ones(len(rows), dtype=torch.bool, device=self.device) if gate is None else gate
        labels = torch.where(accept[:, None, None], inferred, state.labels)
        columns = self._count(state, inferred, labels, truth)
        maps = labels.cpu().numpy()
        return pa.RecordBatch.from_pydict(
            {
                "key": [self.workspace.train.keys[row] for row in rows],
                "label": [encode_map(one[:height, :width]) for one, (height, width) in zip(maps, sizes, strict=True)],
                "accepted": accept.cpu().numpy(),
                "value": [None] * len(rows) if values is None else values.cpu().numpy(),
                "action": [None] * len(rows) if actions is None else actions.cpu().numpy().tolist(),
                **columns,
            }
        )

    def workspace_state(self, index: torch.Tensor, version: int) -> EILState:
        """Returns the teacher's state of whole images."""
        return self.env.builder.observe(self.segmenter.teacher, index, version)

    def _propose(
        self, state: EILState, truth: torch.Tensor | None, context: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Returns the actions `[B, A]`, the maps `[B, H, W]` they give, and their values `[B]` (None: not gated)."""
        options, builder, stage = self.settings.eil, self.env.builder, context["stage"]
        count, size = len(state.labels), options.action_size(self.workspace.num_classes)
        seeds = torch.tensor(context["seeds"], device=self.device)
        if options.policy == "oracle":
            assert truth is not None
            return None, builder.infer_oracle(state, truth, stage), None
        if options.policy == "greedy":
            return self._greedy(state, seeds, stage)
        if options.policy == "population":
            return self._searched(state, context["policy"])
        if options.policy in ("quantile", "moving_quantile"):
            actions = torch.tensor(context["thresholds"], device=self.device).expand(count, -1)
        elif options.policy == "fixed":
            fixed = torch.tensor(options.thresholds, dtype=torch.float32, device=self.device)
            actions = fixed.expand(count, size).contiguous() if fixed.ndim == 0 else fixed.expand(count, -1)
        elif options.policy == "random":
            actions = uniform(seeds, size)
        else:
            with self.workspace.autocast():
                actions = self.operators.searcher.eval()(state.planes()).float()
        quantiles = options.policy in ("quantile", "moving_quantile")
        inferred = builder.infer(state, actions, stage, per_class=quantiles)
        if not options.explores:
            return actions, inferred, None
        with self.workspace.autocast():
            values = self.operators.assessor.eval()(state.planes(), actions).float()
        return actions, inferred, values

    def _searched(
        self, state: EILState, order: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the thresholds of the searched policy, and the maps that they and its window give."""
        policy, (mean, std) = Policy.of(order["parameters"], self.settings.eil), self._centre_of(order)
        actions = policy.thresholds((image_traits(state.confidence, state.labels) - mean) / std)
        inferred = self.env.builder.infer_candidates(
            state.labels, state.scribbles, state.classes, state.confidence, actions, window=policy.window
        )
        return actions, inferred, None

    def _centre_of(self, order: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(part, device=self.device) for part in order["centre"])
        return mean, std

    @torch.inference_mode()
    def rehearse(self, *, parameters: np.ndarray, context: dict[str, Any]) -> Outcome:
        """Plays one policy for a whole stage on cached features.

        Args:
            parameters: of the policy, float64 `[D]`.
            context: `rows`, `stage`, `label_version`, `segmenter_version`, `truth`, `seed`, `fold`, `centre`.
        """
        rehearsal = self._rehearsal_of(context)
        return rehearsal.play(
            Policy.of(parameters, self.settings.eil),
            self._centre_of(context),
            seed=context["seed"],
            fold=context["fold"],
        )

    @torch.inference_mode()
    def rehearsed_traits(self, *, context: dict[str, Any]) -> np.ndarray:
        """Returns the traits of the images that policies are rehearsed on, float32 `[N, 2]`."""
        return self._rehearsal_of(context).traits.cpu().numpy()

    def _rehearsal_of(self, context: dict[str, Any]) -> Rehearsal:
        """Returns the states that a stage is rehearsed on; they are made once and serve all its policies."""
        place = (context["segmenter_version"], context["stage"], context["label_version"])
        if self._rehearsal is None or self._rehearsal[0] != place:
            self._rehearsal = None
            rehearsal = Rehearsal(
                self.env.builder,
                self.segmenter.teacher,
                torch.as_tensor(context["rows"], device=self.device),
                version=context["label_version"],
                truth=context["truth"],
            )
            self._rehearsal = (place, rehearsal)
        return self._rehearsal[1]

    def _greedy(
        self, state: EILState, seeds: torch.Tensor, stage: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns per image the best of `greedy_candidates` uniform actions by the true one-step reward, which is
        then its value.
        """
        options, builder = self.settings.eil, self.env.builder
        size = options.action_size(self.workspace.num_classes)
        best_action = torch.ones(len(seeds), size, device=self.device)
        best_value = torch.full((len(seeds),), -torch.inf, device=self.device)
        best_map = state.labels
        for number in range(options.greedy_candidates):
            actions = uniform(mix(seeds, number), size)
            inferred = builder.infer(state, actions, stage)
            following = builder.advance(self.segmenter.teacher, state, inferred)
            transition = Transition(
                builder=builder, segmenter=self.segmenter.teacher, state=state, following=following, seeds=seeds
            )
            reward = REWARDS[options.reward](transition).reward
            better = reward > best_value
            best_value = torch.where(better, reward, best_value)
            best_action = torch.where(better[:, None], actions, best_action)
            best_map = torch.where(better[:, None, None], inferred, best_map)
        return best_action, best_map, best_value

    def _count(
        self, state: EILState, inferred: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor | None
    ) -> dict[str, Any]:
        """Counts pixels `[B]`: of the image, labelled, newly labelled, proposed and (with ground truth) correct, and
        V of the map.
        """
        options = self.settings.eil
        after = self.env.builder.relabel(state, labels)
        value, _ = reliability(state.features, after.counts, delta=options.delta, distance=options.distance)
        proposed = (inferred != state.labels) & (inferred < PADDING)
        columns: dict[str, torch.Tensor] = {
            "pixels": (labels != PADDING).flatten(1).sum(1),
            "labelled": (labels < PADDING).flatten(1).sum(1),
            "new": ((labels < PADDING) & (state.labels == UNLABELLED)).flatten(1).sum(1),
            "proposed": proposed.flatten(1).sum(1),
            "value_map": value,
        }
        result = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
        if truth is not None:
            known = proposed & (truth < PADDING)
            correct, total = label_precision(labels, state.scribbles, truth, self.workspace.num_classes)
            result["proposed_known"] = known.flatten(1).sum(1).cpu().numpy()
            result["proposed_correct"] = (known & (inferred == truth)).flatten(1).sum(1).cpu().numpy()
            result["correct"] = correct.cpu().numpy().tolist()
            result["total"] = total.cpu().numpy().tolist()
        return result

    @torch.inference_mode()
    def histogram(self, *, rows: np.ndarray, bins: int) -> np.ndarray:
        """Counts the teacher's confidences per predicted class, int64 `[K, bins]`, for the quantile policies."""
        state = self.workspace_state(torch.as_tensor(rows, device=self.device), 0)
        valid = state.labels != PADDING
        return (
            confidence_histogram(state.classes, state.confidence, valid, self.workspace.num_classes, bins).cpu().numpy()
        )

    @torch.inference_mode()
    def count_labels(self, *, rows: np.ndarray, version: int) -> tuple[int, int]:
        """Returns labelled pixels and all pixels of images under a label version."""
        labels = self.workspace.train.labels(torch.as_tensor(rows, device=self.device), version)
        return int((labels < PADDING).sum()), int((labels != PADDING).sum())


def _encode(labels: torch.Tensor) -> list[bytes]:
    return [encode_map(one) for one in labels.cpu().numpy()]
