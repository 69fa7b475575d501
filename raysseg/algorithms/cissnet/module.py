"""Base, Bias and Context Net as one RLModule, and S-Net as they make it together (Eq. 1-2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from raysseg.algorithms.cissnet.networks import BaseNet, BiasNet, ContextNet, PyramidEncoder

CONTEXT = "context"
"""The module id of the networks on X."""


class Played(NamedTuple):
    """What the networks say of whole episodes."""

    logits: Tensor
    """Of the classes before Y^0 … Y^T, float `[T+1, B, N_c, h, w]`."""
    action_logits: Tensor | None
    """Of the actions at s_0 … s_{T−1}, float `[T, B, 2, h, w]`."""
    values: Tensor | None
    """V(s_0) … V(s_T), float `[T+1, B, h, w]`."""


class ContextNetworks(nn.Module):
    """S-Net and, where contexts are chosen by it, C-Net.

    Args:
        network: values of `NetworkOptions`.
        features: channels of X.
        classes: N_c.
        uses_context: whether there is a Bias Net.
        learns: whether there is a Context Net.

    Source: CiSS-Net, Fig. 2 and 3.
    """

    def __init__(
        self, network: dict[str, Any], features: int, classes: int, *, uses_context: bool, learns: bool
    ) -> None:
        super().__init__()
        width, group, dropout = network["width"], network["group_channels"], network["dropout"]
        bins = tuple(network["bins"])
        self.base = BaseNet(features, width, classes, group, dropout)
        self.bias: BiasNet | None = None
        self.context: ContextNet | None = None
        if uses_context:
            encoder = PyramidEncoder(classes + 1, network["context_width"], group, bins)
            self.bias = BiasNet(features, encoder, width, classes, group, dropout)
        if learns:
            encoder = PyramidEncoder(classes, network["prediction_width"], group, bins)
            self.context = ContextNet(features, encoder, width, group)

    def s_net_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of Base and Bias Net."""
        return [*self.base.parameters(), *(() if self.bias is None else self.bias.parameters())]

    def c_net_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the Context Net; none without one."""
        return [] if self.context is None else list(self.context.parameters())

    def forward(self, features: Tensor, predictions: Tensor, contexts: Tensor) -> Played:
        """Passes all steps of episodes at once.

        Args:
            features: X, float `[B, C, h, w]`.
            predictions: uint8 `[T+1, B, h, w]`, Y^0 … Y^T; looked at by the Context Net alone.
            contexts: uint8 `[T, B, h, w]`, K^0 … K^{T−1}: 0 uncertain, else class + 1.
        """
        logits = self.base(features)[None].float()
        if self.bias is not None and len(contexts):
            changed = self.bias(self.bias.prepare(features), contexts.flatten(0, 1))
            logits = torch.cat([logits, logits + changed.float().unflatten(0, contexts.shape[:2])])
        if self.context is None or not len(contexts):
            return Played(logits, None, None)
        actions, values = self.context(self.context.prepare(features), predictions.flatten(0, 1))
        shape = predictions.shape[:2]
        return Played(logits, actions.unflatten(0, shape)[:-1], values.unflatten(0, shape))


class ContextModule(TorchRLModule):
    """The networks that are trained on X.

    `model_config` carries `network` (plain values of `NetworkOptions`), `policy`, `features` (channels of X), `num_classes` and
    `seed`.
    """

    def setup(self) -> None:
        """Builds the networks."""
        config: dict[str, Any] = dict(self.model_config)
        torch.manual_seed(int(config["seed"]) + 2)
        self.networks = ContextNetworks(
            config["network"],
            config["features"],
            config["num_classes"],
            uses_context=config["policy"] != "baseline",
            learns=config["policy"] == "context",
        )

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """RLlib's generic forward: `obs` with `features` `[B, C, h, w]` and `predictions` `[B, h, w]` to `action_logits`
        `[B, 2, h, w]` and `values` `[B, h, w]`.
        """
        context = self.networks.context
        if context is None:
            raise TypeError("This variant has no Context Net.")
        features = batch["obs"]["features"]
        logits, values = context(context.prepare(features), batch["obs"]["predictions"])
        return {"action_logits": logits, "values": values}
