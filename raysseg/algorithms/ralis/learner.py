"""RALIS' learner: batch-mode double DQN on single sub-actions (Eq. 2-3), and the segmenters that phases start with."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from raysseg.algorithms.ralis.config import RALISSettings
from raysseg.algorithms.ralis.module import QUERY, START, QueryModule, StartModule
from raysseg.algorithms.ralis.steps import from_binary
from raysseg.core.learner import SegmentationLearner
from raysseg.core.modules import SEGMENTER
from raysseg.core.prefetch import to_device
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.work import LearnerWork, Minibatch, Share
from raysseg.errors import NonFiniteError
from raysseg.functional.double_q import double_q_targets, q_loss


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """B transitions of single sub-actions on the device; the states that several of them share are there once.

    Args:
        states: float32 `[U, S, d]`.
        index: int64 `[B]`, the state of every transition.
        actions: the candidates that were chosen, float32 `[B, 1, F]`.
        going_on: int64 `[B']`, the transitions after which their episode goes on.
        next_index: int64 `[B']`, the states `return_steps` after these.
        next_candidates: the pools then, float32 `[B', N, F]`; None where B' is 0.
        rewards: float32 `[B]`, discounted sums of as many steps.
        terminated: bool `[B]`.
        weights: importance weights, float32 `[B]`.
    """

    states: torch.Tensor
    index: torch.Tensor
    actions: torch.Tensor
    going_on: torch.Tensor
    next_index: torch.Tensor
    next_candidates: torch.Tensor | None
    rewards: torch.Tensor
    terminated: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def read(
        cls, records: pa.RecordBatch, states: np.ndarray, candidates: tuple[int, int], device: torch.device
    ) -> StepBatch:
        """Reads drawn transitions.

        Args:
            records: of a replay's draw.
            states: that they name, float16 `[·, S, d]`.
            candidates: (N, F), of a pool.
            device: where the batch is wanted; what travels in half precision becomes float32 there.
        """
        index, following = (records.column(name).to_numpy() for name in ("state_index", "next_index"))
        terminated = records.column("terminated").to_numpy(zero_copy_only=False)
        going_on = np.flatnonzero(~terminated)
        used, place = np.unique(np.concatenate([index, following[going_on]]), return_inverse=True)
        pools = from_binary(records.column("next_candidates"), candidates)
        return cls(
            states=to_device(states[used], device).float(),
            index=to_device(place[: len(index)], device),
            actions=to_device(from_binary(records.column("action"), (1, candidates[1])), device).float(),
            going_on=to_device(going_on, device),
            next_index=to_device(place[len(index) :], device),
            next_candidates=to_device(pools, device).float() if len(pools) else None,
            rewards=to_device(records.column("reward").to_numpy(), device),
            terminated=to_device(terminated, device),
            weights=to_device(records.column("weight").to_numpy(), device),
        )


class RALISLearner(SegmentationLearner):
    """Adds the query network's update to the segmenter's, and gives the segmenter its starting weights."""

    settings: RALISSettings

    def trained_networks(self) -> dict[str, torch.nn.Module]:
        """Returns the segmenter, and the query network where the variant trains one."""
        networks = super().trained_networks()
        if QUERY in self.module:
            networks["query"] = self._query().query
        return networks

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Registers the query network's optimiser, and the segmenter's; the starting segmenters have none."""
        super().configure_optimizers_for_module(module_id, config)
        if module_id != QUERY:
            return
        settings = self.config.settings.ralis.learning.optimiser
        parameters = list(self._query().query.parameters())
        self.register_optimizer(
            module_id=module_id,
            optimizer_name="query",
            optimizer=build_optimiser(settings, parameters),
            params=parameters,
            lr_or_lr_schedule=settings.learning_rate,
        )

    def _query(self) -> QueryModule:
        return self.module[QUERY].unwrapped()

    def _start(self) -> StartModule:
        return self.module[START].unwrapped()

    # ---- what phases start with -------------------------------------------------------------------------------------

    def capture_segmenter(self, part: Literal["network", "origin"]) -> None:
        """Keeps the segmenter as it is now: as what played episodes start with, or as theta_0."""
        getattr(self._start(), part).load_state_dict(self._segmenter_module().online.state_dict())

    def restart_segmenter(self, *, from_origin: bool) -> None:
        """Begins a new training of the segmenter: without any memory of the optimiser, and from theta_0 if so asked."""
        self.get_optimizer(SEGMENTER, "segmenter").state.clear()
        if from_origin:
            module, weights = self._segmenter_module(), self._start().origin.state_dict()
            module.online.load_state_dict(weights)
            module.teacher.load_state_dict(weights)

    # ---- the query network's update ---------------------------------------------------------------------------------

    def update_query(
        self, work: LearnerWork, *, states: np.ndarray, first_update: int, total_updates: int
    ) -> dict[str, Any]:
        """Updates the query network, one step per minibatch, and its target as often as the settings say.

        Args:
            work: drawn transitions in minibatches.
            states: that they name, float16 `[U, S, d]`.
            first_update: number of the first minibatch in the run, on a schedule of `total_updates`.
            total_updates: length of that schedule.

        Returns:
            `q_loss`, `q_value` and `q_target` (means over all transitions), `q_learning_rate` (of the last minibatch),
            and `errors`, a list: |y − Q| of every transition of the work, before the step that it was part of.

        Raises:
            NonFiniteError: with the episodes and steps of the first minibatch whose loss is not finite.

        Source: RALIS, Eq. 2-3.
        """
        settings, optimiser = self.settings.ralis.learning, self.get_optimizer(QUERY, "query")
        minibatches, rate = work.own_minibatches(), 0.0
        features = self.settings.ralis.regions.action_features(self.workspace.num_classes)
        candidates = (settings.pool_size, features)
        sums: list[torch.Tensor] = []
        errors = torch.zeros(minibatches[-1].stop, device=self._device)
        for index, one in enumerate(minibatches):
            number, share = first_update + index, one.share
            batch = StepBatch.read(one.records, states, candidates, self._device)
            target = self._targets(batch)
            rate = settings.optimiser.learning_rate * schedule_factor(
                settings.optimiser, number / max(1, total_updates)
            )
            set_learning_rate(optimiser, rate)
            loss, values = self._step_query(optimiser, share, batch, target)
            part = 1 if share.is_split else self.learners.world
            first = one.stop - share.total
            errors[first + share.start : first + share.stop] = (target - values).abs() / part
            sums.append(torch.stack([loss * share.total, values.sum(), target.sum()]) / part)
            self._follow(number + 1)
        numbers = self.learners.sum(torch.cat([torch.stack(sums).flatten(), errors])).tolist()
        losses = numbers[0 : 3 * len(sums) : 3]
        for one, loss in zip(minibatches, losses, strict=True):
            if not np.isfinite(loss):
                self._refuse_transitions(one, loss)
        means = {
            name: sum(numbers[start : 3 * len(sums) : 3]) / minibatches[-1].stop
            for start, name in enumerate(("q_loss", "q_value", "q_target"))
        }
        return {**means, "q_learning_rate": rate, "errors": numbers[3 * len(sums) :]}

    @torch.no_grad()
    def _targets(self, batch: StepBatch) -> torch.Tensor:
        """Returns y `[B]` (Eq. 3); both networks score the next pools as they act, not as they are trained."""
        settings, module = self.settings.ralis.learning, self._query()
        width = 1 if batch.next_candidates is None else batch.next_candidates.shape[1]
        values = batch.rewards.new_zeros(2, len(batch.rewards), width)
        if batch.next_candidates is not None:
            for row, network in enumerate((module.query, module.target_query)):
                values[row, batch.going_on] = network.eval()(batch.states, batch.next_candidates, batch.next_index)
        gamma = settings.gamma**settings.return_steps
        return double_q_targets(
            batch.rewards, batch.terminated, values[0], values[1], gamma=gamma, rule=settings.double_q
        )

    def _step_query(
        self, optimiser: torch.optim.Optimizer, share: Share, batch: StepBatch, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one step; returns this learner's part of the loss and Q of its transitions `[B]`, before the step."""
        settings, network = self.settings.ralis.learning, self._query().query
        network.train()
        played = []

        def loss_of(called: torch.nn.Module, rows: slice) -> torch.Tensor:
            values = called(batch.states, batch.actions[rows], batch.index[rows]).squeeze(1)
            played.append(values.detach())
            loss = q_loss(values, target[rows], batch.weights[rows], kind=settings.loss)
            return loss * (len(values) / share.total)

        loss = self.descend("query", optimiser, share, loss_of, clip_norm=settings.optimiser.clip_norm)
        return loss, torch.cat(played)

    @torch.no_grad()
    def _follow(self, updates: int) -> None:
        """Moves the target after some updates in all: copies it, or moves parameters and statistics by a share."""
        settings, module = self.settings.ralis.learning, self._query()
        if settings.target == "hard":
            if updates % settings.target_interval == 0:
                module.target_query.load_state_dict(module.query.state_dict())
            return
        current = module.query.state_dict()
        for name, value in module.target_query.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[name], settings.target_rate)
            else:
                value.copy_(current[name])

    def _refuse_transitions(self, minibatch: Minibatch, loss: float) -> None:
        """Raises the error of a loss that is not finite."""
        episodes, steps = (minibatch.records.column(name).to_pylist() for name in ("episode", "step"))
        places = [f"step {step} of episode {episode}" for episode, step in zip(episodes, steps, strict=True)]
        where = self._keys_of(sorted(set(places)), minibatch.share)
        raise NonFiniteError(f"The query network's loss is {loss}; its transitions are those of {where}.")
