"""The central learner: takes work orders as Arrow record batches, rebuilds what they need on its device and updates
the networks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import nn

from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.parallel import Learners, RowsOfBatch
from raysseg.core.prefetch import Prefetcher
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.seeding import generator
from raysseg.core.segmenter_batch import SegmenterBatch, read_segmenter_batch
from raysseg.core.segmenter_loss import ClassWeights, SegmenterLoss, Totals, count_pixels, teach
from raysseg.core.weights import PackedWeights, pack_weights
from raysseg.core.work import LearnerWork, Minibatch, Share
from raysseg.core.workspace import Workspace
from raysseg.errors import NonFiniteError
from raysseg.functional.class_balance import class_weights
from raysseg.segmenters import update_teacher


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What is to be made ready for an update of some kind; two that are equal give the same.

    Args:
        kind: of the work.
        records: this learner's rows of one minibatch.
        version: label version, where the records do not say it themselves.
    """

    kind: str
    records: pa.RecordBatch
    version: int | None = None


class SegmentationLearner(TorchLearner):
    """RLlib's learner for a segmenter and the networks of a method.

    `update(training_data=LearnerWork(kind=…))` calls `update_<kind>(work, **context)`; a method adds its own kinds, and to each a
    `prepare_<kind>(preparation)` that reads what the records name. Each update returns plain numbers, the same on every learner. A
    loss that is not finite stops the run with the sample keys that held it.
    """

    def build(self) -> None:
        """Builds networks and optimisers, and opens the data on this learner's device."""
        config = self.config
        self.settings = config.settings
        engine = self.settings.engine
        if engine.torch_threads and config.num_learners:
            torch.set_num_threads(engine.torch_threads)
        super().build()
        self.workspace = Workspace(config.settings, config.store_uri, config.labels_uri, self._device)
        self.prefetch: Prefetcher[Preparation, Any] = Prefetcher(self._prepare, engine.prefetch, self._device)
        self._class_weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last_end = time.perf_counter()

    def shutdown(self) -> None:
        """Ends the background thread."""
        self.prefetch.close()
        super().shutdown()

    def trained_networks(self) -> dict[str, nn.Module]:
        """Returns the networks that updates change, by name; several learners keep them the same."""
        return {"online": self._segmenter_module().online}

    def trained_in_parts(self) -> tuple[str, ...]:
        """Returns the trained networks of which an update may leave parameters out."""
        return ()

    def _make_modules_ddp_if_necessary(self) -> None:
        """Wraps each trained network for itself and leaves RLlib's modules, and with them all names in checkpoints, as
        they are.
        """
        self.learners = Learners(distributed=self.distributed, device=self._device)
        self.networks = {
            name: self.learners.wrap(network, in_parts=name in self.trained_in_parts())
            for name, network in self.trained_networks().items()
        }

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Registers the segmenter's optimiser: backbone and new layers with their own learning rates."""
        if module_id != SEGMENTER:
            return
        training = self.config.settings.training
        groups = self._segmenter_module().online.parameter_groups(
            training.optimiser.learning_rate, training.head_multiplier, training.optimiser.weight_decay
        )
        for group in groups:
            group["learning_rate_multiplier"] = group["lr"] / training.optimiser.learning_rate
        optimiser = build_optimiser(training.optimiser, groups)
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.register_optimizer(
            module_id=module_id,
            optimizer_name="segmenter",
            optimizer=optimiser,
            params=parameters,
            lr_or_lr_schedule=training.optimiser.learning_rate,
        )

    def compute_loss_for_module(self, *, module_id: str, **kwargs: Any) -> torch.Tensor:
        """Refuses RLlib's own update: losses here belong to work orders, which say what to rebuild."""
        raise TypeError(
            f"The module '{module_id}' is trained by update(training_data=LearnerWork(…)), not from RLlib's batches."
        )

    def _segmenter_module(self) -> SegmenterModule:
        return self.module[SEGMENTER].unwrapped()

    def update(self, *args: Any, training_data: LearnerWork, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Does one work order.

        Args:
            args: none; RLlib's signature.
            training_data: the work, or this learner's part of it.
            kwargs: RLlib's, of no use here.

        Returns:
            The numbers of the work, the same on every learner (where a method has them also `errors`, one per record), and under
            `timing` this learner's own seconds: `busy_seconds` in this call (of which it waited `prepare_seconds` for records to
            be made ready, and computed `update_seconds`) and `idle_seconds` since the end of the call before.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        begun = time.perf_counter()
        training_data.validate()
        self.prefetch.waited = 0.0
        self._weights_seq_no += 1
        result: dict[str, Any] = getattr(self, f"update_{training_data.kind}")(training_data, **training_data.context)
        ended = time.perf_counter()
        result["timing"] = {
            "busy_seconds": ended - begun,
            "idle_seconds": begun - self._last_end,
            "prepare_seconds": self.prefetch.waited,
            "update_seconds": ended - begun - self.prefetch.waited,
        }
        self._last_end = ended
        return result

    def update_and_publish(
        self, training_data: LearnerWork, modules: tuple[str, ...]
    ) -> tuple[dict[str, Any], PackedWeights]:
        """Does one work order; returns its numbers, and the weights after it.

        Called with two return values, so that the weights go into the object store and never through the driver.

        Args:
            training_data: as for `update`.
            modules: ids of those whose weights are wanted; of several learners one is asked, the others for none.
        """
        return self.update(training_data=training_data), self.publish_weights(modules)

    def publish_weights(self, modules: tuple[str, ...]) -> PackedWeights:
        """Returns the weights of modules as actors need them; they belong into the object store before the next update.

        Args:
            modules: their ids; none gives nothing.
        """
        return pack_weights({name: self.module[name].unwrapped() for name in modules})

    # ---- what updates are made of -----------------------------------------------------------------------------------

    def _prepare(self, preparation: Preparation) -> Any:
        """Reads what a minibatch needs; in the background where there is time to."""
        prepare: Callable[[Preparation], Any] = getattr(self, f"prepare_{preparation.kind}")
        return prepare(preparation)

    def descend(
        self,
        name: str,
        optimiser: torch.optim.Optimizer,
        share: Share,
        loss_of: Callable[[nn.Module, slice], torch.Tensor],
        *,
        clip_norm: float | None,
        seed: int | None = None,
        clipped: Sequence[Sequence[nn.Parameter]] | None = None,
    ) -> torch.Tensor:
        """Takes one step of an optimiser on a minibatch that learners share, in `engine.gradient_accumulation` pieces.

        Args:
            name: of the trained network.
            optimiser: of its parameters.
            share: which rows of the minibatch are this learner's.
            loss_of: from the network as it is to be called and some of this learner's rows (a slice of them) to their
                part of the whole minibatch's loss, a scalar: a sum over rows over a denominator of all rows.
            clip_norm: largest norm of the gradient; None does not clip.
            seed: of dropout; None for networks without.
            clipped: parameters whose gradient has that norm together; None: all of the network's.

        Returns:
            This learner's part of the loss, a scalar without gradient.
        """
        network = self.networks[name]
        pieces = self._pieces(share)
        optimiser.zero_grad(set_to_none=True)
        losses = []
        for piece, rows in pieces:
            with self.learners.passing(network, piece, last=piece is pieces[-1][0]):
                if seed is not None:
                    torch.manual_seed(seed)
                if piece.is_split:
                    with RowsOfBatch(piece):
                        loss = loss_of(network, rows)
                else:
                    loss = loss_of(network, rows)
                (loss * self.learners.scale(share)).backward()
            losses.append(loss.detach())
        if clip_norm is not None:
            for parameters in [list(network.parameters())] if clipped is None else clipped:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()
        return torch.stack(losses).sum()

    def _pieces(self, share: Share) -> list[tuple[Share, slice]]:
        """Cuts a share into the pieces that are passed one after the other, each with its rows of the share."""
        pieces = share.pieces(self.settings.engine.gradient_accumulation, self.learners.world)
        return [(one, slice(one.start - share.start, one.stop - share.start)) for one in pieces]

    def _keys_of(self, keys: list[str], share: Share) -> str:
        """Returns the keys of a whole minibatch; to be called on all learners, each with its own keys."""
        parts = self.learners.gather(keys) if share.is_split else [keys]
        return ", ".join(key for part in parts for key in part)

    # ---- the segmenter's update -------------------------------------------------------------------------------------

    def update_segmenter(
        self,
        work: LearnerWork,
        *,
        version: int,
        first_update: int,
        total_updates: int,
        learning_rate: float,
        epoch_ends: list[int],
        seed: int,
        rows: np.ndarray | None = None,
        self_training: bool = False,
    ) -> dict[str, Any]:
        """Trains the segmenter on a label version (Eq. 14): cross-entropy over labelled pixels, and over the others with the
        teacher's probabilities where self-training acts.

        Args:
            work: records with the columns `row` and `seed`, in minibatches that never cross the end of an epoch.
            version: label version; 0 the scribbles, −1 the ground truth.
            first_update: number of the first minibatch on the learning-rate schedule of `total_updates`.
            total_updates: length of that schedule.
            learning_rate: at the start of that schedule.
            epoch_ends: numbers of records after which an epoch ends.
            seed: of dropout.
            rows: int64 `[N]` of the training split, which class weights are counted over; None: all of them.
            self_training: whether unlabelled pixels learn from the teacher.

        Returns:
            `loss` (mean over minibatches), `learning_rate`, `labelled_pixels` (mean per image); in self-training also
            `self_training_loss` (its part of the loss before its weight, mean over minibatches) and `self_training_share` (of
            the crops' pixels on images, those that learned from the teacher).

        Raises:
            NonFiniteError: with the keys of the first minibatch whose loss is not finite.
        """
        training, optimiser = self.settings.training, self.get_optimizer(SEGMENTER, "segmenter")
        weights = ClassWeights.of(
            training, version, lambda own: self._class_weight(own, rows), self_training=self_training
        )
        module, rate = self._segmenter_module(), 0.0
        minibatches = work.own_minibatches()
        kind = "self_training" if self_training else "segmenter"
        batches = self.prefetch.each(
            Preparation(kind=kind, records=one.records, version=version) for one in minibatches
        )
        losses, lessons, counts = [], [], []
        for index, one in enumerate(minibatches):
            batch = self.learners.agree(lambda: next(batches))
            rate = learning_rate * schedule_factor(training.optimiser, (first_update + index) / max(1, total_updates))
            set_learning_rate(optimiser, rate)
            loss, loss_of = self._step_segmenter(module, one.share, batch, weights, seed, first_update + index)
            losses.append(loss if one.share.is_split else loss / self.learners.world)
            counts.append(torch.stack(loss_of.totals))
            if self_training:
                taught = torch.stack(loss_of.taught).sum()
                lessons.append(taught if one.share.is_split else taught / self.learners.world)
            if training.teacher_interval == "update" or one.stop in epoch_ends:
                update_teacher(module.teacher, module.online, training.teacher_momentum)
        values = self.learners.sum(torch.stack(losses).float())
        finite = torch.isfinite(values).tolist()
        if not all(finite):
            bad = finite.index(False)
            self._refuse(minibatches[bad], f"update {first_update + bad} (label version {version})", values[bad].item())
        totals = Totals(*torch.stack(counts).sum(0).tolist())
        numbers = {
            "loss": values.mean().item(),
            "learning_rate": rate,
            "labelled_pixels": totals.labelled / sum(one.share.total for one in minibatches),
        }
        if self_training:
            numbers["self_training_loss"] = self.learners.sum(torch.stack(lessons).float()).mean().item()
            numbers["self_training_share"] = totals.taught / max(1.0, totals.inside)
        return numbers

    def _refuse(self, minibatch: Minibatch, where: str, loss: float) -> None:
        """Raises the error of a loss that is not finite."""
        rows = minibatch.records.column("row").to_pylist()
        keys = self._keys_of([self.workspace.train.keys[row] for row in rows], minibatch.share)
        raise NonFiniteError(f"The segmenter's loss at {where} is {loss}; its samples are {keys}.")

    def prepare_segmenter(self, preparation: Preparation) -> SegmenterBatch:
        """Reads and augments images and label maps.

        Args:
            preparation: records with the columns `row` and `seed`, and the label version.
        """
        return self._read_batch(preparation, self_training=False)

    def prepare_self_training(self, preparation: Preparation) -> SegmenterBatch:
        """Reads and augments images and label maps, and varies what the student sees of them.

        Args:
            preparation: as for `prepare_segmenter`.
        """
        return self._read_batch(preparation, self_training=True)

    def _read_batch(self, preparation: Preparation, *, self_training: bool) -> SegmenterBatch:
        assert preparation.version is not None
        return read_segmenter_batch(
            self.workspace.train,
            preparation.records,
            preparation.version,
            self.settings.training,
            self.workspace.num_classes,
            self_training=self_training,
        )

    def _step_segmenter(
        self,
        module: SegmenterModule,
        share: Share,
        batch: SegmenterBatch,
        weights: ClassWeights,
        seed: int,
        update: int,
    ) -> tuple[torch.Tensor, SegmenterLoss]:
        """Takes one step; returns this learner's part of the loss, and what it was taken on.

        BatchNorm needs two images, so one alone uses its statistics.
        """
        training, autocast, lesson = self.settings.training, self.workspace.autocast, None
        pieces = [rows for _, rows in self._pieces(share)]
        if batch.crops is not None:
            lesson = teach(module.teacher, batch, pieces, autocast, training.self_training, weights.labels)
        totals = self.learners.sum(count_pixels(batch, weights, lesson, pieces), share)
        loss_of = SegmenterLoss(
            batch=batch,
            weights=weights,
            totals=Totals(*totals),
            autocast=autocast,
            inferred_weight=(training.inferred_weight or 0.0) if batch.inferred is not None else 0.0,
            lesson=lesson,
        )
        module.online.train(share.total > 1)
        optimiser, clip_norm = self.get_optimizer(SEGMENTER, "segmenter"), training.optimiser.clip_norm
        own_seed = int(generator(seed, "dropout", update).integers(2**62))
        loss = self.descend("online", optimiser, share, loss_of, clip_norm=clip_norm, seed=own_seed)
        return loss, loss_of

    def _class_weight(self, version: int, rows: np.ndarray | None = None) -> torch.Tensor | None:
        """Returns the class weights `[K]` of rows under a label version, mean 1 over their classes, or None for the plain
        loss.
        """
        power = self.settings.training.class_balance_power
        if power == 0.0:
            return None
        counted = torch.arange(len(self.workspace.train.keys)) if rows is None else torch.tensor(rows)
        known = self._class_weights.get(version)
        if known is None or not torch.equal(known[0], counted):
            counts = self.prefetch.now(lambda: self._count_classes(version, counted))
            # Of the versions of earlier stages nothing is asked again.
            kept = {number: one for number, one in self._class_weights.items() if number == 0}
            known = (counted, class_weights(counts, power))
            self._class_weights = {**kept, version: known}
        return known[1]

    def _count_classes(self, version: int, rows: torch.Tensor) -> torch.Tensor:
        """Counts the pixels of each class in rows of the training split under a label version, float64 `[K]`."""
        counts = torch.zeros(256, dtype=torch.float64, device=self._device)
        for part in rows.split(64):
            counts += torch.bincount(self.workspace.train.labels(part, version).flatten().long(), minlength=256)
        return counts[: self.workspace.num_classes]
