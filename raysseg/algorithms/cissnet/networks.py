"""CiSS-Net's networks: pyramid encoder, Base Net, Bias Net and Context Net on frozen features (Sec. 2.2 and 2.3, Fig. 3).

    X ───────────────┬──────────────────────────────┐
                     │ once per image                │ once per image
    context K ─ F_e ─┴▶ Bias Net ─▶ logits    Y ─ F_e ┴▶ Context Net ─▶ policy, value

X does not change along an episode and a convolution is linear in what is stacked before it, so the part of each first
convolution that sees X is computed once (`prepare`) and added at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitConv2d(nn.Module):
    """A 3×3 convolution without bias of two stacks of maps, the part of one of which can be kept.

    Parameters and initial values are those of `nn.Conv2d(fixed + varying, out, 3, padding=1, bias=False)`.

    Args:
        fixed: channels of the maps that stay as they are.
        varying: channels of those that change.
        out: channels of the result.

    Source: reconstruction.
    """

    def __init__(self, fixed: int, varying: int, out: int) -> None:
        super().__init__()
        self.fixed = fixed
        self.convolution = nn.Conv2d(fixed + varying, out, 3, padding=1, bias=False)

    def prepare(self, maps: Tensor) -> Tensor:
        """Returns the part of the maps that stay, float `[B, out, h, w]`, of maps float `[B, fixed, h, w]`."""
        return F.conv2d(maps, self.convolution.weight[:, : self.fixed], padding=1)

    def forward(self, prepared: Tensor, maps: Tensor) -> Tensor:
        """Returns the convolution float `[T·B, out, h, w]`.

        Args:
            prepared: float `[B, out, h, w]`, from `prepare`.
            maps: float `[T·B, varying, h, w]`, B after B for each of T steps.
        """
        varying = F.conv2d(maps, self.convolution.weight[:, self.fixed :], padding=1)
        return (varying.unflatten(0, (-1, len(prepared))) + prepared).flatten(0, 1)


def _norm(channels: int, per_group: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // per_group, channels)


class PyramidEncoder(nn.Module):
    """Encodes a map of classes: one-hot, beside it four average poolings of it, each through a convolution (F_e).

    Args:
        classes: number of values, N_c + 1 for a context map.
        width: channels of each pooled branch.
        per_group: channels of a group of the normalisation.
        bins: cells over height and width of every branch.

    Source: CiSS-Net, Sec. 2.2 and Fig. 3a.
    """

    def __init__(self, classes: int, width: int, per_group: int, bins: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(classes, width, 3, padding=1, bias=False), _norm(width, per_group), nn.ReLU())
            for _ in bins
        )
        self.channels = classes + len(bins) * width

    def forward(self, maps: Tensor) -> Tensor:
        """Returns float `[B, channels, h, w]` of maps, integers `[B, h, w]`; a value beyond the classes is 0 everywhere."""
        values = torch.arange(self.classes, device=maps.device).view(1, -1, 1, 1)
        parameter = next(self.parameters())
        hot = (maps[:, None] == values).to(parameter.dtype)
        size = maps.shape[-2:]
        pooled = [
            F.interpolate(branch(F.adaptive_avg_pool2d(hot, cells)), size=size, mode="bilinear", align_corners=False)
            for branch, cells in zip(self.branches, self.bins, strict=True)
        ]
        return torch.cat([hot, *pooled], 1)


class ContextTrunk(nn.Module):
    """Four convolutions on features and an encoded map; the first one's output is added after the third and the fourth.

    Args:
        features: channels of X.
        encoded: channels of the encoded map.
        width: of every layer.
        per_group: channels of a group of the normalisation.
        dropout: probability.

    Source: CiSS-Net, Fig. 3b.
    """

    def __init__(self, features: int, encoded: int, width: int, per_group: int, dropout: float) -> None:
        super().__init__()
        self.first = SplitConv2d(features, encoded, width)
        self.first_norm = _norm(width, per_group)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width, per_group), nn.ReLU())
            for _ in range(3)
        )
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, prepared: Tensor, encoded: Tensor) -> Tensor:
        """Returns float `[T·B, width, h, w]` of what `first.prepare` made of X and encoded maps `[T·B, encoded, h, w]`."""
        entry = F.relu(self.first_norm(self.first(prepared, encoded)))
        second = self.layers[0](entry)
        third = self.layers[1](second) + entry
        hidden = self.layers[2](third) + entry
        if not self.training or isinstance(self.dropout, nn.Identity):
            return hidden
        # Drawn image by image with all steps of one side by side, as whoever passes some of a minibatch's images draws them.
        images, channels = len(prepared), hidden.shape[1]
        kept = self.dropout(hidden.new_ones(images, len(hidden) // images * channels, 1, 1))
        return hidden * kept.unflatten(1, (-1, channels)).transpose(0, 1).flatten(0, 1)


class BaseNet(nn.Module):
    """Segments from the features alone (F_s^ba).

    Args:
        features: channels of X.
        width: of the layer.
        classes: N_c.
        per_group: channels of a group of the normalisation.
        dropout: probability.

    Source: CiSS-Net, Eq. 1 and Sec. 3.2; its second layer is the authors' code's, 1×1.
    """

    def __init__(self, features: int, width: int, classes: int, per_group: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(features, width, 3, padding=1, bias=False),
            _norm(width, per_group),
            nn.ReLU(),
            nn.Dropout2d(dropout) if dropout else nn.Identity(),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `[B, N_c, h, w]` of X `[B, C, h, w]`."""
        return self.layers(features)


class BiasNet(nn.Module):
    """What a context changes about the logits (F_s^bi).

    Args:
        features: channels of X.
        encoder: of context maps.
        width: of every layer.
        classes: N_c.
        per_group: channels of a group of the normalisation.
        dropout: probability.

    Source: CiSS-Net, Eq. 1.
    """

    def __init__(
        self, features: int, encoder: PyramidEncoder, width: int, classes: int, per_group: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.trunk = ContextTrunk(features, encoder.channels, width, per_group, dropout)
        self.last = nn.Conv2d(width, classes, 1, bias=False)
        # S-Net begins as the Base Net.
        nn.init.zeros_(self.last.weight)

    def prepare(self, features: Tensor) -> Tensor:
        """Returns what of X `[B, C, h, w]` does not change along an episode, `[B, width, h, w]`."""
        return self.trunk.first.prepare(features)

    def forward(self, prepared: Tensor, contexts: Tensor) -> Tensor:
        """Returns logits `[T·B, N_c, h, w]` of context maps K, integers `[T·B, h, w]`, 0 uncertain and class + 1."""
        return self.last(self.trunk(prepared, self.encoder(contexts)))


class ContextNet(nn.Module):
    """Decides per position whether a prediction becomes context, and values the p-map (F_k, F_k^v).

    Args:
        features: channels of X.
        encoder: of p-maps.
        width: of every layer.
        per_group: channels of a group of the normalisation.

    It has no dropout: where policy and value read the same dropped channels, both rise and fall together, and the policy's
    gradient takes that for an advantage of whatever is likelier already. Its heads work in float32: values are about 8, what an
    action is worth 0.2.

    Source: CiSS-Net, Sec. 2.3 and Fig. 3b.
    """

    def __init__(self, features: int, encoder: PyramidEncoder, width: int, per_group: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.trunk = ContextTrunk(features, encoder.channels, width, per_group, 0.0)
        self.policy = nn.Conv2d(width, 2, 1)
        self.value = nn.Conv2d(width, 1, 1, bias=False)

    def prepare(self, features: Tensor) -> Tensor:
        """Returns what of X `[B, C, h, w]` does not change along an episode, `[B, width, h, w]`."""
        return self.trunk.first.prepare(features)

    def forward(self, prepared: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of the actions 0 and 1 `[T·B, 2, h, w]` and values `[T·B, h, w]` of p-maps, integers `[T·B, h, w]`."""
        hidden = self.trunk(prepared, self.encoder(predictions))
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.value.weight.dtype)
            return self.policy(hidden), self.value(hidden).squeeze(1)
