"""One episode of S-Net and C-Net on a batch of images: p-map → action map → context map → next p-map (Eq. 1-2)."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.algorithms.cissnet.config import CiSSNetOptions
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.algorithms.cissnet.policies import POLICIES, Choice, Observation, on_images
from raysseg.errors import InputError
from raysseg.functional.random import mix


class ContextEpisode:
    """B images whose predictions become each other's context; X's part of every first convolution is computed once.

    What lies beside an image (padding) is never context.

    Args:
        networks: in the mode they are to be used in.
        options: the variant's.
        features: X, float `[B, C, h, w]`.
        labels: L, uint8 `[B, h, w]`, or None where there is no truth.

    Source: CiSS-Net, Eq. 1-2.
    """

    def __init__(
        self, networks: ContextNetworks, options: CiSSNetOptions, features: Tensor, labels: Tensor | None = None
    ) -> None:
        self.networks, self.options, self.features, self.labels = networks, options, features, labels
        self.base = networks.base(features).float()
        self._bias = None if networks.bias is None else networks.bias.prepare(features)
        self._context = None if networks.context is None else networks.context.prepare(features)
        self.logits = self.base
        self.predictions = self.logits.argmax(1).to(torch.uint8)
        self.step = 0

    def choose(self, seeds: Tensor | None = None) -> Choice:
        """Returns what the variant's policy makes context of the present p-map.

        Args:
            seeds: int64 `[B]` of the episode, from which actions are drawn; None takes the likelier ones.
        """
        observation = Observation(
            predictions=self.predictions,
            logits=self.logits,
            prepared=self._context,
            labels=self.labels,
            seeds=None if seeds is None else mix(seeds, self.step),
        )
        return POLICIES[self.options.policy](observation, self.networks.context, self.options)

    def advance(self, actions: Tensor) -> Tensor:
        """Returns the p-map that follows, uint8 `[B, h, w]`, under actions bool `[B, h, w]`."""
        if self.networks.bias is None or self._bias is None:
            raise InputError("A Base Net alone takes no context: this variant's episodes have no step.")
        contexts = context_map(self.predictions, on_images(actions, self.labels))
        self.logits = self.base + self.networks.bias(self._bias, contexts).float()
        self.predictions = self.logits.argmax(1).to(torch.uint8)
        self.step += 1
        return self.predictions


def context_map(predictions: Tensor, actions: Tensor) -> Tensor:
    """Returns K = (Y + 1) ∘ B, uint8 `[..., h, w]`: 0 where the prediction is uncertain, else class + 1.

    Args:
        predictions: Y, uint8 `[..., h, w]`.
        actions: B, bool `[..., h, w]`.

    Source: CiSS-Net, Eq. 2.
    """
    return (predictions + 1) * actions


def labels_of_positions(labels: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Returns the label of the pixel in the middle of every position.

    Args:
        labels: uint8 `[B, H, W]`.
        size: (h, w) of the positions, ⌈H/stride⌉ and ⌈W/stride⌉.
        stride: pixels per position.

    Returns:
        uint8 `[B, h, w]`; where that pixel is beyond the border the last one before it.

    Source: reconstruction.
    """
    places = [
        (torch.arange(count, device=labels.device) * stride + stride // 2).clamp(max=side - 1)
        for count, side in zip(size, labels.shape[-2:], strict=True)
    ]
    return labels[:, places[0]][:, :, places[1]]


def box_of_positions(box: tuple[int, int], size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns the reward's box in positions: the odd number that is next to its pixels over the stride.

    Args:
        box: (C_h, C_w) in pixels.
        size: (h, w) of the maps.
        stride: pixels per position.

    Raises:
        InputError: where the box is larger than the maps.

    Source: CiSS-Net, Eq. 4; the authors' code has 5 × 5 at stride 8, so 40 pixels.
    """
    sides = []
    for name, pixels, positions in zip(("height", "width"), box, size, strict=True):
        side = 2 * (pixels // (2 * stride)) + 1
        if side > positions:
            raise InputError(
                f"cissnet.reward.box is {list(box)} pixels, {side} positions of {stride} pixels in its {name}, but the maps have "
                f"{positions}: expected a smaller box"
            )
        sides.append(side)
    return sides[0], sides[1]
