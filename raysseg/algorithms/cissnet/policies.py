"""Who decides which predictions become context: the Context Net, or what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from raysseg.algorithms.cissnet.config import CiSSNetOptions
from raysseg.algorithms.cissnet.networks import ContextNet
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING
from raysseg.functional.random import uniform


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What can be decided by, for B images at one step.

    Args:
        predictions: Y^t, uint8 `[B, h, w]`.
        logits: that they are the largest of, float `[B, N_c, h, w]`.
        prepared: what the Context Net made of X, float `[B, width, h, w]`; None without one.
        labels: L, uint8 `[B, h, w]`; None where there is no truth.
        seeds: int64 `[B]` of this step; None takes the likelier action.
    """

    predictions: Tensor
    logits: Tensor
    prepared: Tensor | None = None
    labels: Tensor | None = None
    seeds: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What becomes context.

    Args:
        actions: B^t, bool `[B, h, w]`.
        probabilities: of the actions taken, float32 `[B, h, w]`; None where nothing was drawn.
    """

    actions: Tensor
    probabilities: Tensor | None = None


def on_images(actions: Tensor, labels: Tensor | None) -> Tensor:
    """Returns actions bool `[B, h, w]` without those beside an image, where labels uint8 `[B, h, w]` say 254. Source: design."""
    return actions if labels is None else actions & (labels != PADDING)


def choose_by_context_net(observation: Observation, network: ContextNet | None, options: CiSSNetOptions) -> Choice:
    """Draws from π(· | s), or takes the likelier action of every position. Source: CiSS-Net, Eq. 2."""
    assert network is not None
    assert observation.prepared is not None
    logits, _ = network(observation.prepared, observation.predictions)
    share = torch.softmax(logits.float(), 1)[:, 1]
    if observation.seeds is None:
        return Choice(actions=on_images(share > 0.5, observation.labels))
    drawn = uniform(observation.seeds, share[0].numel()).view_as(share)
    actions = on_images(drawn < share, observation.labels)
    return Choice(actions=actions, probabilities=torch.where(actions, share, 1.0 - share))


def choose_everything(observation: Observation, network: ContextNet | None, options: CiSSNetOptions) -> Choice:
    """Takes every prediction. Source: CiSS-Net, Sec. 3.4 (Baseline + p-map)."""
    return Choice(actions=on_images(torch.ones_like(observation.predictions, dtype=torch.bool), observation.labels))


def choose_confident(observation: Observation, network: ContextNet | None, options: CiSSNetOptions) -> Choice:
    """Takes the share of an image's positions whose predictions are the most confident. Source: reconstruction."""
    confidence = torch.softmax(observation.logits.float(), 1).amax(1)
    if observation.labels is not None:
        confidence = confidence.masked_fill(observation.labels == PADDING, -1.0)
    confidence = confidence.flatten(1)
    counts = (options.greedy_share * (confidence >= 0).sum(1, keepdim=True)).round().long().clamp(min=1)
    threshold = confidence.sort(1, descending=True).values.gather(1, counts - 1)
    actions = (confidence >= threshold).view_as(observation.predictions)
    return Choice(actions=on_images(actions, observation.labels))


def choose_right(observation: Observation, network: ContextNet | None, options: CiSSNetOptions) -> Choice:
    """Takes the predictions that are right: an upper bound that looks at the truth. Source: reconstruction."""
    if observation.labels is None:
        raise InputError("The policy 'oracle' takes the predictions that are right, so it needs label maps.")
    return Choice(actions=(observation.predictions == observation.labels) & (observation.labels < PADDING))


POLICIES: dict[str, Callable[[Observation, ContextNet | None, CiSSNetOptions], Choice]] = {
    "context": choose_by_context_net,
    "p-map": choose_everything,
    "greedy": choose_confident,
    "oracle": choose_right,
}
