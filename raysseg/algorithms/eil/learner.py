"""EIL's learner: rebuilds s and s' from decisions and updates assessor, then searcher, then their targets (Eq. 4-7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysseg.algorithms.eil.actions import unpack_actions
from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.module import OPERATORS, OperatorsModule
from raysseg.algorithms.eil.state import EILState, StateBuilder
from raysseg.core.learner import SegmentationLearner
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.data.codec import decode_map
from raysseg.errors import NonFiniteError
from raysseg.functional.ddpg import assessor_loss, bootstrap_target, searcher_loss, soft_update
from raysseg.functional.random import mix, uniform


class EILLearner(SegmentationLearner):
    """Adds the operators' update to the segmenter's."""

    settings: EILSettings

    def build(self) -> None:
        """Builds everything and the state builder on this learner's device."""
        super().build()
        self.builder = StateBuilder(self.workspace, self.settings)

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Registers one optimiser for each operator, and the segmenter's."""
        super().configure_optimizers_for_module(module_id, config)
        if module_id != OPERATORS:
            return
        module, exploration = self._operators(), self.config.settings.eil.exploration
        for name, network, settings in (
            ("assessor", module.assessor, exploration.assessor_optimiser),
            ("searcher", module.searcher, exploration.searcher_optimiser),
        ):
            parameters = list(network.parameters())
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=build_optimiser(settings, parameters),
                params=parameters,
                lr_or_lr_schedule=settings.learning_rate,
            )

    def _operators(self) -> OperatorsModule:
        return self.module[OPERATORS].unwrapped()

    def update_operators(
        self, records: pa.RecordBatch, *, update: int, total_updates: int, seed: int
    ) -> dict[str, float]:
        """Does one update of assessor and searcher on transitions.

        Args:
            records: transitions of one label version and one segmenter version.
            update: number of this update in the run, on schedules of `total_updates`.
            seed: of the next action where the policy is random.

        Returns:
            `assessor_loss`, `searcher_loss`, `action_sensitivity` (mean |∂q/∂a|), `target` (mean of Eq. 4).

        Raises:
            NonFiniteError: a loss is not finite.
        """
        module, options = self._operators(), self.settings.eil
        state, following, actions = self._rebuild(records)
        rewards = torch.tensor(np.asarray(records.column("reward")), device=self._device)
        terminated = torch.tensor(records.column("terminated").to_numpy(zero_copy_only=False), device=self._device)
        planes = state.planes()
        with torch.no_grad():
            bootstrap = torch.zeros_like(rewards)
            if following is not None:
                seeds = mix(torch.tensor(np.asarray(records.column("seed")), device=self._device), seed, update)
                bootstrap = self._next_values(module, following.planes(), seeds)
            target = bootstrap_target(rewards, bootstrap, terminated, options.gamma)

        progress = update / max(1, total_updates)
        first = self._step_assessor(module, planes, actions, target, progress)
        second, sensitivity = torch.zeros_like(first), torch.zeros_like(first)
        if options.policy == "searcher":
            second, sensitivity = self._step_searcher(module, planes, progress)
            self._follow(module.target_searcher, module.searcher)
        self._follow(module.target_assessor, module.assessor)

        numbers = torch.stack([first, second, sensitivity, target.mean()]).tolist()
        for name, number in zip(("assessor_loss", "searcher_loss"), numbers, strict=False):
            if not np.isfinite(number):
                keys = ", ".join(records.column("key").to_pylist())
                raise NonFiniteError(f"The {name} at operator update {update} is {number}; its samples are {keys}.")
        return dict(zip(("assessor_loss", "searcher_loss", "action_sensitivity", "target"), numbers, strict=True))

    @torch.no_grad()
    def _rebuild(self, records: pa.RecordBatch) -> tuple[EILState, EILState | None, torch.Tensor]:
        """Rebuilds s, s' (None where no transition bootstraps) and the actions `[B, A]` from the decisions."""
        device = self._device
        rows = torch.tensor(np.asarray(records.column("row")), dtype=torch.int64, device=device)
        seeds = torch.tensor(np.asarray(records.column("seed")), device=device)
        version = records.column("label_version")[0].as_py()
        segmenter = self._segmenter_module().online
        augmented = seeds if self.settings.eil.exploration.augment else None
        state = self.builder.observe(segmenter, rows, version, seeds=augmented)
        stored = records.column("labels").to_pylist()
        if any(one is not None for one in stored):
            maps = [
                map_ if one is None else torch.from_numpy(np.array(decode_map(one))).to(device)
                for one, map_ in zip(stored, state.labels, strict=True)
            ]
            state = self.builder.relabel(state, torch.stack(maps))
        cells = int(state.features.shape[-2] * state.features.shape[-1])
        size = self.settings.eil.action_size(self.workspace.num_classes) or cells
        actions = unpack_actions(records.column("action").to_pylist(), self.settings.eil.action, size).to(device)
        if self.settings.eil.gamma == 0 or all(records.column("terminated").to_pylist()):
            return state, None, actions
        labels = np.stack([decode_map(one) for one in records.column("next_labels").to_pylist()])
        following = self.builder.advance(segmenter, state, torch.from_numpy(labels).to(device))
        return state, following, actions

    def _next_values(self, module: OperatorsModule, planes: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """Returns q̄^{t+1} `[B]` of the targets; where the policy is random, so is the next action."""
        with self.workspace.autocast():
            if self.settings.eil.policy == "random":
                actions = uniform(seeds, self.settings.eil.action_size(self.workspace.num_classes))
            else:
                actions = module.target_searcher.eval()(planes).float()
            return module.target_assessor.eval()(planes, actions).float()

    def _step_assessor(
        self,
        module: OperatorsModule,
        planes: torch.Tensor,
        actions: torch.Tensor,
        target: torch.Tensor,
        progress: float,
    ) -> torch.Tensor:
        """Eq. 5: one step on (q̄ − q)²; returns the loss."""
        settings = self.settings.eil.exploration.assessor_optimiser
        optimiser = self.get_optimizer(OPERATORS, "assessor")
        set_learning_rate(optimiser, settings.learning_rate * schedule_factor(settings, progress))
        with self.workspace.autocast():
            values = module.assessor.train()(planes, actions)
        loss = assessor_loss(values.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.assessor.parameters(), settings.clip_norm)
        optimiser.step()
        return loss.detach()

    def _step_searcher(
        self, module: OperatorsModule, planes: torch.Tensor, progress: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 6-7: one step on −f_ψ(s, g_φ(s)) with ψ held fixed; returns the loss and the mean |∂q/∂a|."""
        settings = self.settings.eil.exploration.searcher_optimiser
        optimiser = self.get_optimizer(OPERATORS, "searcher")
        set_learning_rate(optimiser, settings.learning_rate * schedule_factor(settings, progress))
        parameters = list(module.searcher.parameters())
        with self.workspace.autocast():
            actions = module.searcher.train()(planes)
            values = module.assessor.eval()(planes, actions)
        loss = searcher_loss(values.float())
        slope, *gradients = torch.autograd.grad(loss, [actions, *parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimiser.step()
        return loss.detach(), slope.float().abs().mean() * len(planes)

    def _follow(self, target: torch.nn.Module, source: torch.nn.Module) -> None:
        """Moves a target towards its network; normalisation statistics are copied, as they are measured and not
        learned.
        """
        soft_update(list(target.parameters()), list(source.parameters()), self.settings.eil.exploration.kappa)
        for old, new in zip(target.buffers(), source.buffers(), strict=True):
            old.copy_(new)
