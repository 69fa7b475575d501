"""Context module of the segmenter: pixels attend to pooled patterns of several granularities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRANULARITIES = (1, 3, 6, 8)
"""Sides g of the g×g grids that the map is pooled to: 110 pattern nodes. [R]"""


class PatternPropagation(nn.Module):
    """Adds to every pixel what the pooled patterns that resemble it hold.

    With Z the average-pooled nodes of all granularities,
    A = softmax over the nodes of (W_q F)ᵀ (W_k Z) / √d and F' = F + BN(W_o ((W_v Z) Aᵀ)).

    Source: reconstruction. The paper names a context aggregation module (CPP) whose structure is in no source found.

    Args:
        channels: width D of the map.
        dimension: width d of the queries, keys and values. 64 [R]
    """

    def __init__(self, channels: int, dimension: int = 64) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, dimension, 1, bias=False)
        self.key = nn.Conv1d(channels, dimension, 1, bias=False)
        self.value = nn.Conv1d(channels, dimension, 1, bias=False)
        self.output = nn.Conv2d(dimension, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the map with its context added.

        Args:
            features: float [B, D, h, w].

        Returns:
            float [B, D, h, w].
        """
        height, width = features.shape[-2:]
        nodes = torch.cat([F.adaptive_avg_pool2d(features, side).flatten(2) for side in GRANULARITIES], dim=2)
        query = self.query(features).flatten(2).transpose(1, 2)
        key, value = self.key(nodes), self.value(nodes)
        attention = torch.softmax(query @ key * key.shape[1] ** -0.5, dim=-1)
        gathered = (value @ attention.transpose(1, 2)).unflatten(2, (height, width))
        return features + self.norm(self.output(gathered))


class ContextBefore(nn.Module):
    """A decoder whose last input map goes through a context module first.

    Args:
        context: module on the last encoder map [B, D, h, w].
        network: decoder on the list of encoder maps.
    """

    def __init__(self, context: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.context = context
        self.network = network

    def forward(self, encoded: list[Tensor]) -> Tensor:
        """Returns the decoder's output [B, D', h', w'] for the encoder maps, finest first."""
        return self.network([*encoded[:-1], self.context(encoded[-1])])


def insert_context(network: nn.Module, encoder_channels: int, decoder_channels: int) -> nn.Module:
    """Returns the decoder with a `PatternPropagation` after its ASPP, or before it where it has no ASPP.

    Args:
        network: a decoder of segmentation_models_pytorch; changed in place where it has an ASPP.
        encoder_channels: width of the last encoder map.
        decoder_channels: width of the ASPP's output, used where there is one.
    """
    aspp = getattr(network, "aspp", None)
    if isinstance(aspp, nn.Module):
        network.aspp = nn.Sequential(aspp, PatternPropagation(decoder_channels))
        return network
    return ContextBefore(PatternPropagation(encoder_channels), network)
