"""The central learner: takes work orders as Arrow record batches, rebuilds what they need on its device and updates
the networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.seeding import generator
from raysseg.core.work import LearnerWork
from raysseg.core.workspace import Workspace
from raysseg.data.augmentation import draw_geometry, normalise, warp_images, warp_labels
from raysseg.errors import NonFiniteError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.segmenters import update_teacher, upsample_logits


class SegmentationLearner(TorchLearner):
    """RLlib's learner for a segmenter and the networks of a method.

    `update(training_data=LearnerWork(kind=…))` calls `update_<kind>(records, **context)`; a method adds its own kinds. Each returns
    plain numbers. A loss that is not finite stops the run with the sample keys that held it.
    """

    def build(self) -> None:
        """Builds networks and optimisers, and opens the data on this learner's device."""
        super().build()
        config = self.config
        self.settings = config.settings
        self.workspace = Workspace(config.settings, config.store_uri, config.labels_uri, self._device)
        self._class_weights: tuple[int, torch.Tensor | None] = (-2, None)

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

    def update(self, *args: Any, training_data: LearnerWork, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """Does one work order and returns its numbers.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        training_data.validate()
        update = getattr(self, f"update_{training_data.kind}")
        self._weights_seq_no += 1
        result: dict[str, float] = update(training_data.records, **training_data.context)
        return result

    def update_segmenter(
        self,
        records: pa.RecordBatch,
        *,
        version: int,
        first_update: int,
        total_updates: int,
        learning_rate: float,
        epoch_ends: list[int],
        seed: int,
    ) -> dict[str, float]:
        """Trains the segmenter on a label version (Eq. 14): cross-entropy over labelled pixels.

        Args:
            records: columns `row` and `seed`, consecutive minibatches of `training.batch_size` (the last of an epoch
                may be smaller).
            version: label version; 0 the scribbles, −1 the ground truth.
            first_update: number of the first minibatch on the learning-rate schedule of `total_updates`.
            learning_rate: at the start of that schedule.
            epoch_ends: numbers of records after which an epoch ends (a minibatch never crosses it).
            seed: of dropout.

        Returns:
            `loss` (mean over minibatches), `learning_rate`, `labelled_pixels` (mean per image).

        Raises:
            NonFiniteError: with the keys of the first minibatch whose loss is not finite.
        """
        training = self.settings.training
        module, optimiser = self._segmenter_module(), self.get_optimizer(SEGMENTER, "segmenter")
        weight = self._class_weight(version)
        rows, seeds = np.array(records.column("row")), np.array(records.column("seed"))
        losses, counts, parts, rate = [], [], self._minibatches(len(rows), epoch_ends), 0.0
        for index, part in enumerate(parts):
            rate = learning_rate * schedule_factor(training.optimiser, (first_update + index) / max(1, total_updates))
            set_learning_rate(optimiser, rate)
            torch.manual_seed(int(generator(seed, "dropout", first_update + index).integers(2**62)))
            loss, count = self._segmenter_loss(module, rows[part], seeds[part], version, weight)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if training.optimiser.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(module.online.parameters(), training.optimiser.clip_norm)
            optimiser.step()
            losses.append(loss.detach())
            counts.append(count)
            if training.teacher_interval == "update" or part.stop in epoch_ends:
                update_teacher(module.teacher, module.online, training.teacher_momentum)
        values = torch.stack(losses).float()
        finite = torch.isfinite(values).tolist()
        if not all(finite):
            bad = finite.index(False)
            keys = [self.workspace.train.keys[row] for row in rows[parts[bad]]]
            raise NonFiniteError(
                f"The segmenter's loss at update {first_update + bad} (label version {version}) is {values[bad].item()}; "
                f"its samples are {', '.join(keys)}."
            )
        return {
            "loss": values.mean().item(),
            "learning_rate": rate,
            "labelled_pixels": torch.stack(counts).sum().item() / len(rows),
        }

    def _minibatches(self, count: int, epoch_ends: list[int]) -> list[slice]:
        """Cuts `count` records into minibatches that never cross the end of an epoch."""
        size, start, parts = self.settings.training.batch_size, 0, []
        for end in sorted({*epoch_ends, count}):
            while start < end:
                parts.append(slice(start, min(start + size, end)))
                start = parts[-1].stop
        return parts

    def _segmenter_loss(
        self, module: SegmenterModule, rows: np.ndarray, seeds: np.ndarray, version: int, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss and the number of labelled pixels of one minibatch;

        BatchNorm needs two images, so one alone uses its statistics.
        """
        data, augmentation = self.workspace.train, self.settings.training.augmentation
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._device)
        images, sizes = data.images(index)
        geometry = draw_geometry(
            sizes,
            torch.as_tensor(seeds, device=self._device),
            augmentation,
            output_size=augmentation.crop or data.canvas,
        )
        labels = warp_labels(data.labels(index, version), sizes, geometry)
        module.online.train(len(rows) > 1)
        with self.workspace.autocast():
            output = module.online(normalise(warp_images(images, sizes, geometry)))
        logits = upsample_logits(output.logits.float(), (int(labels.shape[-2]), int(labels.shape[-1])))
        target = torch.where(labels == PADDING, UNLABELLED, labels).long()
        labelled = (target != UNLABELLED).sum()
        total = F.cross_entropy(logits, target, weight=weight, ignore_index=UNLABELLED, reduction="sum")
        if weight is None:
            return total / labelled.clamp(min=1), labelled
        mass = weight[target.clamp(max=len(weight) - 1)].masked_fill(target == UNLABELLED, 0.0).sum()
        return total / mass.clamp(min=1e-6), labelled

    def _class_weight(self, version: int) -> torch.Tensor | None:
        """Returns the class weights `[K]` of a label version, mean 1 over its classes, or None for the plain loss."""
        power = self.settings.training.class_balance_power
        if power == 0.0:
            return None
        if self._class_weights[0] != version:
            counts = torch.zeros(256, dtype=torch.float64, device=self._device)
            for part in torch.arange(len(self.workspace.train.keys), device=self._device).split(64):
                counts += torch.bincount(self.workspace.train.labels(part, version).flatten().long(), minlength=256)
            counts = counts[: self.workspace.num_classes]
            weight = torch.where(counts > 0, (counts / counts.sum()).clamp(min=1e-9) ** -power, 0.0)
            self._class_weights = (version, (weight / weight[counts > 0].mean()).float())
        return self._class_weights[1]
