"""CiSS-Net's learner: rebuilds all steps of its episodes in one pass and updates Base, Bias and Context Net (Eq. 5-7)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.episode import box_of_positions, context_map, labels_of_positions
from raysseg.algorithms.cissnet.features import NewestFeatures, domain_features, feature_shape
from raysseg.algorithms.cissnet.module import CONTEXT, ContextNetworks, Played
from raysseg.algorithms.cissnet.steps import read_maps
from raysseg.core.crops import read_crops
from raysseg.core.learner import Preparation, SegmentationLearner
from raysseg.core.prefetch import to_device
from raysseg.core.schedules import build_optimiser, schedule_factor, set_learning_rate
from raysseg.core.seeding import generator
from raysseg.core.work import LearnerWork, Share
from raysseg.data.batches import GROUND_TRUTH
from raysseg.errors import NonFiniteError
from raysseg.functional.class_balance import label_mass
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.context_reward import context_rewards
from raysseg.functional.pixel_policy import action_entropy, action_log_probabilities, actor_critic_losses
from raysseg.functional.returns import generalised_advantages, n_step_advantages, v_trace
from raysseg.segmenters import upsample_logits

LOSSES = ("segmentation_loss", "policy_loss", "value_loss", "entropy")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """A minibatch of episodes on the device, as they were played.

    Args:
        images: normalised crops, float32 `[B, 3, H, W]`.
        labels: uint8 `[B, H, W]`.
        predictions: Y^0 … Y^T, uint8 `[T+1, B, h, w]`.
        actions: B^0 … B^{T−1}, bool `[T, B, h, w]`.
        probabilities: of the actions under the policy that took them, float16 `[T, B, h, w]`; None where the same one learns.
    """

    images: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor
    actions: torch.Tensor
    probabilities: torch.Tensor | None


class CiSSNetLearner(SegmentationLearner):
    """Adds the update of the networks on X to the segmenter's."""

    settings: CiSSNetSettings
    _newest_features: NewestFeatures | None = None

    def look_for_features(self, newest: NewestFeatures) -> None:
        """Takes X from an actor of this process where it has made it, instead of making it again."""
        self._newest_features = newest

    def trained_networks(self) -> dict[str, torch.nn.Module]:
        """Returns the segmenter, and the networks on X where the variant trains any."""
        networks = super().trained_networks()
        return networks | ({CONTEXT: self._networks()} if CONTEXT in self.module else {})

    def trained_in_parts(self) -> tuple[str, ...]:
        """Returns the networks on X where the Base Net learns alone at first."""
        options = self.settings.cissnet
        return (CONTEXT,) if options.uses_context and options.learning.base_updates else ()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Registers one optimiser for the networks on X, with the Base Net's learning rate and the others', and the segmenter's."""
        super().configure_optimizers_for_module(module_id, config)
        if module_id != CONTEXT:
            return
        learning, networks = self.config.settings.cissnet.learning, self._networks()
        others = [part for part in (networks.bias, networks.context) if part is not None]
        groups: list[dict[str, Any]] = [{"params": list(networks.base.parameters()), "learning_rate_multiplier": 1.0}]
        if others:
            parameters = [parameter for part in others for parameter in part.parameters()]
            groups.append({"params": parameters, "learning_rate_multiplier": learning.context_rate})
        for group in groups:
            group["lr"] = learning.optimiser.learning_rate * group["learning_rate_multiplier"]
            group["weight_decay"] = learning.optimiser.weight_decay
        self.register_optimizer(
            module_id=module_id,
            optimizer_name=CONTEXT,
            optimizer=build_optimiser(learning.optimiser, groups),
            params=list(networks.parameters()),
            lr_or_lr_schedule=learning.optimiser.learning_rate,
        )

    def _networks(self) -> ContextNetworks:
        return self.module[CONTEXT].unwrapped().networks

    def update_context(self, work: LearnerWork, *, update: int, policy_version: int, seed: int) -> dict[str, Any]:
        """Does one update on whole episodes.

        Args:
            work: one minibatch of episodes.
            update: number of this update on the schedule.
            policy_version: of the weights that learn.
            seed: of dropout.

        Returns:
            `loss` (Eq. 7) and its parts before their weights, `segmentation_loss` (mean over the valid pixels of all T + 1
            predictions, weighed by class where `training.class_balance_power` is above 0) and, where a policy learns,
            `policy_loss`, `value_loss` and `entropy` (nats; means over the valid positions of all T steps); `policy_lag`
            (mean), `learning_rate`.

        Raises:
            NonFiniteError: a loss is not finite; with the keys.

        Source: CiSS-Net, Eq. 7; means in place of the authors' sums are a reconstruction.
        """
        (minibatch,) = work.own_minibatches()
        learning, networks = self.settings.cissnet.learning, self._networks()
        wanted = Preparation(kind="context", records=minibatch.records)
        batch: Episodes = self.learners.agree(lambda: self.prefetch.take(wanted))
        if work.upcoming is not None:
            self.prefetch.begin(Preparation(kind="context", records=work.upcoming))
        optimiser = self.get_optimizer(CONTEXT, CONTEXT)
        rate = learning.optimiser.learning_rate * schedule_factor(
            learning.optimiser, update / self.settings.cissnet.total_updates
        )
        set_learning_rate(optimiser, rate)
        segmenter, kind = self._segmenter_module().online, self.settings.cissnet.network.features
        size = (int(batch.predictions.shape[-2]), int(batch.predictions.shape[-1]))
        labels = labels_of_positions(batch.labels, size, self._stride)
        weight = self._class_weight(GROUND_TRUTH, None)
        counts = torch.stack([label_mass(batch.labels, weight).double(), (labels < PADDING).sum().double()])
        mass, positions = self.learners.sum(counts, minibatch.share).clamp(min=1.0).float().unbind()
        networks.train()
        parts: list[torch.Tensor] = []
        known = None
        if self._newest_features is not None:
            known = self._newest_features.take(
                *(np.asarray(minibatch.records.column(name)) for name in ("row", "seed"))
            )

        def loss_of(network: torch.nn.Module, rows: slice) -> torch.Tensor:
            contexts = context_map(batch.predictions[:-1, rows], batch.actions[:, rows])
            with self.workspace.autocast():
                features = domain_features(segmenter, batch.images[rows], kind) if known is None else known[rows]
                played: Played = network(features, batch.predictions[:, rows], contexts)
            losses = [self._segmentation(played.logits, batch.labels[rows], weight) / (len(played.logits) * mass)]
            if played.action_logits is not None and played.values is not None:
                own = (labels[rows] < PADDING).sum().clamp(min=1)
                part = own / positions
                losses += [one * part for one in self._actor_critic(played, batch, labels[rows], rows)]
            parts.append(torch.stack([one.detach() for one in losses]))
            weights = (learning.segmentation_weight, 1.0, 1.0, learning.entropy_weight)
            return torch.stack([weight * one for weight, one in zip(weights, losses, strict=False)]).sum()

        own_seed = int(generator(seed, "context-dropout", update).integers(2**62))
        clip_norm = learning.optimiser.clip_norm
        # C-Net's values start far from their targets; clipped together, they would hold S-Net back.
        clipped = [networks.s_net_parameters(), networks.c_net_parameters()]
        loss = self.descend(
            CONTEXT, optimiser, minibatch.share, loss_of, clip_norm=clip_norm, seed=own_seed, clipped=clipped
        )
        return self._numbers(minibatch.share, loss, torch.stack(parts).sum(0), work, policy_version, rate)

    def prepare_context(self, preparation: Preparation) -> Episodes:
        """Reads crops again and unpacks the maps of their episodes.

        Args:
            preparation: episodes of one minibatch.
        """
        records, device = preparation.records, self._device
        rows = torch.tensor(np.asarray(records.column("row")), dtype=torch.int64)
        seeds = to_device(np.asarray(records.column("seed")), device)
        data = self.workspace.train
        images, labels = read_crops(data, rows, seeds, self.settings.crops, data.labels(rows, GROUND_TRUTH))
        maps = read_maps(records)
        return Episodes(
            images=images,
            labels=labels,
            predictions=to_device(np.ascontiguousarray(maps.predictions), device),
            actions=to_device(np.ascontiguousarray(maps.actions), device),
            probabilities=None
            if maps.probabilities is None
            else to_device(np.ascontiguousarray(maps.probabilities), device),
        )

    @functools.cached_property
    def _stride(self) -> int:
        """Pixels of a crop per position."""
        return feature_shape(self._segmenter_module().online, self.settings.cissnet.network.features)[1]

    @staticmethod
    def _segmentation(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Returns the cross-entropy of all predictions `[T+1, B, N_c, h, w]`, weighed by class, summed over their valid pixels."""
        target = torch.where(labels == PADDING, UNLABELLED, labels).long()
        size = (int(target.shape[-2]), int(target.shape[-1]))
        sums = [
            F.cross_entropy(
                upsample_logits(one.float(), size), target, weight, ignore_index=UNLABELLED, reduction="sum"
            )
            for one in logits
        ]
        return torch.stack(sums).sum()

    def _actor_critic(
        self, played: Played, batch: Episodes, labels: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns Loss_p, Loss_v and Loss_e of some rows, each a mean over their valid positions."""
        options = self.settings.cissnet
        learning = options.learning
        assert played.action_logits is not None
        assert played.values is not None
        predictions, actions = batch.predictions[:, rows], batch.actions[:, rows]
        rewards = context_rewards(
            predictions,
            actions,
            labels,
            box=box_of_positions(options.reward.box, (labels.shape[-2], labels.shape[-1]), self._stride),
            correct_weight=options.reward.correct_weight,
            uncertain_weight=options.reward.uncertain_weight,
        )
        logits, values = played.action_logits.float(), played.values.float()
        logs = action_log_probabilities(logits, actions)
        if batch.probabilities is not None:
            ratios = logs.detach() - batch.probabilities[:, rows].float().clamp(min=1e-6).log()
            targets, advantages = v_trace(
                rewards,
                values.detach(),
                ratios,
                gamma=learning.gamma,
                clip_ratio=learning.clip_ratio,
                clip_trace=learning.clip_trace,
                trace=learning.trace,
            )
        else:
            if learning.return_steps is not None:
                advantages = n_step_advantages(rewards, values, gamma=learning.gamma, steps=learning.return_steps)
            else:
                advantages = generalised_advantages(rewards, values, gamma=learning.gamma, trace=learning.trace)
            targets = advantages + values[:-1].detach()
        return actor_critic_losses(logs, advantages, values[:-1], targets, action_entropy(logits), labels < PADDING)

    def _numbers(
        self, share: Share, loss: torch.Tensor, parts: torch.Tensor, work: LearnerWork, version: int, rate: float
    ) -> dict[str, Any]:
        """Returns the numbers of an update, the same on every learner."""
        assert work.records is not None
        lag = (version - np.asarray(work.records.column("policy_version"))).sum() / share.total
        summed = torch.cat([loss.view(1), parts, parts.new_tensor([lag])]).float()
        *values, lag = self.learners.sum(summed, share).tolist()
        if not np.isfinite(values).all():
            keys = self._keys_of(work.records.column("key").to_pylist(), share)
            raise NonFiniteError(f"The loss of the networks on X is {values[0]}; its samples are {keys}.")
        named = dict(zip(LOSSES, values[1:], strict=False))
        if "entropy" in named:
            named["entropy"] = -named["entropy"]
        return {"loss": values[0], **named, "policy_lag": lag, "learning_rate": rate}
