"""EIL's learner: rebuilds s and s' from decisions and updates assessor, then searcher, then their targets (Eq. 4-7)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from raysseg.algorithms.eil.actions import unpack_actions
from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.module import OPERATORS, OperatorsModule
from raysseg.algorithms.eil.state import EILState, StateBuilder
from raysseg.core.learner import Preparation, SegmentationLearner
from raysseg.core.prefetch import ReadRows, ReadWorkspace, to_device
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.work import LearnerWork, Share
from raysseg.data.codec import decode_map
from raysseg.errors import NonFiniteError
from raysseg.functional.ddpg import assessor_loss, bootstrap_target, searcher_loss, soft_update
from raysseg.functional.random import mix, uniform


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """What the decisions of B transitions name, read and on the device; nothing of it depends on a network.

    Args:
        rows: of the training split, int64 `[B]`.
        seeds: of the augmentation, int64 `[B]`.
        version: label version of M.
        split: images and label maps of the rows.
        given: bool `[B]`, where M is not the stored map but `labels`.
        labels: M, uint8 `[B, H, W]` where any is given.
        actions: as they travelled, B of them.
        next_labels: M', uint8 `[B, H, W]`; None where no transition bootstraps.
        rewards: float32 `[B]`.
        terminated: bool `[B]`.
        weights: importance weights, float32 `[B]`, where the records have them.
    """

    rows: torch.Tensor
    seeds: torch.Tensor
    version: int
    split: ReadRows
    given: torch.Tensor
    labels: torch.Tensor | None
    actions: list[bytes]
    next_labels: torch.Tensor | None
    rewards: torch.Tensor
    terminated: torch.Tensor
    weights: torch.Tensor | None


class EILLearner(SegmentationLearner):
    """Adds the operators' update to the segmenter's."""

    settings: EILSettings

    def build(self) -> None:
        """Builds everything and the state builder on this learner's device."""
        super().build()
        self.builder = StateBuilder(self.workspace, self.settings)

    def trained_networks(self) -> dict[str, torch.nn.Module]:
        """Returns the segmenter, and the operators where the variant trains them."""
        networks = super().trained_networks()
        if OPERATORS in self.module:
            networks |= {"assessor": self._operators().assessor, "searcher": self._operators().searcher}
        return networks

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

    def update_operators(self, work: LearnerWork, *, update: int, total_updates: int, seed: int) -> dict[str, Any]:
        """Does one update of assessor and searcher on transitions.

        Args:
            work: one minibatch of transitions of one label version and one segmenter version; with a column `weight`, the
                assessor's loss is the mean of weight · (q̄ − q)².
            update: number of this update in the run, on schedules of `total_updates`.
            total_updates: length of those schedules.
            seed: of the next action where the policy is random.

        Returns:
            `assessor_loss`, `searcher_loss`, `action_sensitivity` (mean |∂q/∂a|), `target` (mean of Eq. 4), and `errors`, a list:
            |q̄ − q| of every transition of the work, before the update.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        (minibatch,) = work.own_minibatches()
        records, share, options = minibatch.records, minibatch.share, self.settings.eil
        wanted = Preparation(kind="operators", records=records)
        batch: Transitions = self.learners.agree(lambda: self.prefetch.take(wanted))
        if work.upcoming is not None:
            self.prefetch.begin(Preparation(kind="operators", records=work.upcoming))
        module = self._operators()
        state, following, actions = self._rebuild(batch)
        planes = state.planes()
        with torch.no_grad():
            bootstrap = torch.zeros_like(batch.rewards)
            if following is not None:
                bootstrap = self._next_values(module, following.planes(), mix(batch.seeds, seed, update))
            target = bootstrap_target(batch.rewards, bootstrap, batch.terminated, options.gamma)

        progress = update / max(1, total_updates)
        first, errors = self._step_assessor(share, planes, actions, target, batch.weights, progress)
        second, sensitivity = torch.zeros_like(first), torch.zeros_like(first)
        if options.policy == "searcher":
            second, sensitivity = self._step_searcher(share, planes, progress)
            self._follow(module.target_searcher, module.searcher)
        self._follow(module.target_assessor, module.assessor)

        everyones = errors.new_zeros(share.total)
        everyones[share.start : share.stop] = errors
        parts = torch.stack([first, second, sensitivity, target.sum() / share.total])
        numbers = self.learners.sum(torch.cat([parts, everyones]), share).tolist()
        for name, number in zip(("assessor_loss", "searcher_loss"), numbers, strict=False):
            if not np.isfinite(number):
                keys = self._keys_of(records.column("key").to_pylist(), share)
                raise NonFiniteError(f"The {name} at operator update {update} is {number}; its samples are {keys}.")
        names = ("assessor_loss", "searcher_loss", "action_sensitivity", "target")
        return {**dict(zip(names, numbers, strict=False)), "errors": numbers[len(names) :]}

    def prepare_operators(self, preparation: Preparation) -> Transitions:
        """Reads images and stored label maps, and decodes those that travelled.

        Args:
            preparation: transitions of one label version.
        """
        records, options, device = preparation.records, self.settings.eil, self._device
        rows = torch.tensor(np.asarray(records.column("row")), dtype=torch.int64)
        version = records.column("label_version")[0].as_py()
        split = ReadRows.read(self.workspace.train, rows, {0, version})
        stored = records.column("labels").to_pylist()
        labels = None
        if any(one is not None for one in stored):
            some = decode_map(next(one for one in stored if one is not None))
            maps = np.stack([np.zeros_like(some) if one is None else decode_map(one) for one in stored])
            labels = to_device(maps, device)
        next_labels = None
        terminated = records.column("terminated").to_numpy(zero_copy_only=False)
        if options.gamma != 0 and not terminated.all():
            next_labels = to_device(
                np.stack([decode_map(one) for one in records.column("next_labels").to_pylist()]), device
            )
        return Transitions(
            rows=rows,
            seeds=to_device(np.asarray(records.column("seed")), device),
            version=version,
            split=split,
            given=to_device(np.array([one is not None for one in stored]), device),
            labels=labels,
            actions=records.column("action").to_pylist(),
            next_labels=next_labels,
            rewards=to_device(np.asarray(records.column("reward")), device),
            terminated=to_device(terminated, device),
            weights=to_device(np.asarray(records.column("weight")), device)
            if "weight" in records.schema.names
            else None,
        )

    @torch.no_grad()
    def _rebuild(self, batch: Transitions) -> tuple[EILState, EILState | None, torch.Tensor]:
        """Rebuilds s, s' (None where no transition bootstraps) and the actions `[B, A]` from the decisions."""
        segmenter, options = self._segmenter_module().online, self.settings.eil
        builder = StateBuilder(ReadWorkspace(self.workspace, batch.split), self.settings)
        augmented = batch.seeds if options.exploration.augment else None
        state = builder.observe(segmenter, batch.rows, batch.version, seeds=augmented)
        if batch.labels is not None:
            state = builder.relabel(state, torch.where(batch.given[:, None, None], batch.labels, state.labels))
        cells = int(state.features.shape[-2] * state.features.shape[-1])
        size = options.action_size(self.workspace.num_classes) or cells
        actions = unpack_actions(batch.actions, options.action, size).to(self._device)
        following = None if batch.next_labels is None else builder.advance(segmenter, state, batch.next_labels)
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
        share: Share,
        planes: torch.Tensor,
        actions: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor | None,
        progress: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 5: one step on (q̄ − q)²; returns this learner's part of the loss, and |q̄ − q| of its rows `[B]`."""
        settings = self.settings.eil.exploration.assessor_optimiser
        optimiser = self.get_optimizer(OPERATORS, "assessor")
        set_learning_rate(optimiser, settings.learning_rate * schedule_factor(settings, progress))
        self._operators().assessor.train()
        errors = []

        def loss_of(network: torch.nn.Module, rows: slice) -> torch.Tensor:
            with self.workspace.autocast():
                values = network(planes[rows], actions[rows]).float()
            errors.append((target[rows] - values.detach()).abs())
            loss = assessor_loss(values, target[rows], None if weights is None else weights[rows])
            return loss * (len(values) / share.total)

        loss = self.descend("assessor", optimiser, share, loss_of, clip_norm=settings.clip_norm)
        return loss, torch.cat(errors)

    def _step_searcher(self, share: Share, planes: torch.Tensor, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 6-7: one step on −f_ψ(s, g_φ(s)) with ψ held fixed; returns this learner's parts of the loss and of the
        mean |∂q/∂a|.
        """
        settings = self.settings.eil.exploration.searcher_optimiser
        optimiser = self.get_optimizer(OPERATORS, "searcher")
        set_learning_rate(optimiser, settings.learning_rate * schedule_factor(settings, progress))
        module, played = self._operators(), []
        module.searcher.train()
        module.assessor.eval()

        def loss_of(network: torch.nn.Module, rows: slice) -> torch.Tensor:
            with self.workspace.autocast():
                actions = network(planes[rows])
                values = module.assessor(planes[rows], actions).float()
            actions.retain_grad()
            played.append(actions)
            return searcher_loss(values) * (len(values) / share.total)

        with _held_fixed(module.assessor):
            loss = self.descend("searcher", optimiser, share, loss_of, clip_norm=settings.clip_norm)
        slopes = torch.cat([actions.grad for actions in played]).float()
        return loss, slopes.abs().sum() / (slopes.shape[1] * self.learners.scale(share))

    def _follow(self, target: torch.nn.Module, source: torch.nn.Module) -> None:
        """Moves a target towards its network; normalisation statistics are copied, as they are measured and not
        learned.
        """
        soft_update(list(target.parameters()), list(source.parameters()), self.settings.eil.exploration.kappa)
        for old, new in zip(target.buffers(), source.buffers(), strict=True):
            old.copy_(new)


@contextlib.contextmanager
def _held_fixed(network: torch.nn.Module) -> Iterator[None]:
    """Lets no gradient reach a network's parameters; it still passes through to the inputs."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
