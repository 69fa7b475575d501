"""EIL's operators as an RLModule: the policy searcher, the policy assessor and their moving-average targets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from safetensors.torch import load_file
from torch import nn

from raysseg.algorithms.eil.config import EILOptions, OperatorSettings
from raysseg.configuration import load_settings
from raysseg.errors import InputError
from raysseg.functional.state import plane_count

OPERATORS = "operators"
"""The module id of searcher and assessor."""


def build_backbone(settings: OperatorSettings, planes: int, *, load: bool) -> nn.Module:
    """Builds a residual network over `[B, planes, h, w]` that ends in its last feature map `[B, 512, h/32, w/32]`.

    The first convolution is new (Kaiming); the rest comes from ImageNet where `load` and the settings say so.

    Raises:
        InputError: the weights cannot be had, or belong to another network.

    Source: EIL, implementation details.
    """
    make = getattr(torchvision.models, settings.backbone)
    network = make(weights=None)
    if load and settings.weights != "none":
        _load_backbone(network, settings)
    network.conv1 = nn.Conv2d(planes, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(
        network.conv1,
        network.bn1,
        network.relu,
        network.maxpool,
        network.layer1,
        network.layer2,
        network.layer3,
        network.layer4,
    )


def _load_backbone(network: nn.Module, settings: OperatorSettings) -> None:
    """Fills a torchvision network from ImageNet or a file; whole stages may be missing at the end, nothing else."""
    if settings.weights == "imagenet":
        try:
            state = torchvision.models.get_model_weights(settings.backbone).DEFAULT.get_state_dict(progress=False)
        except OSError as error:
            raise InputError(
                f"The ImageNet weights of {settings.backbone} could not be downloaded ({error}); "
                "set eil.operators.weights to 'none' or to a file."
            ) from None
    else:
        path = Path(settings.weights)
        if not path.is_file():
            raise InputError(f"The file of eil.operators.weights, {path}, does not exist.")
        try:
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        except Exception as error:
            raise InputError(f"The weights file {path} cannot be read: {type(error).__name__}.") from None
    own = network.state_dict()
    usable = {name: value for name, value in state.items() if not name.startswith(("conv1.", "fc."))}
    wrong = [name for name, value in usable.items() if name not in own or own[name].shape != value.shape]
    if wrong or not usable:
        raise InputError(
            f"The weights file {settings.weights} belongs to another network than {settings.backbone}: "
            f"{len(wrong)} of its {len(usable)} tensors do not fit."
        )
    wanted = {name for name in own if not name.startswith(("conv1.", "fc."))}
    absent = {name.split(".")[0] for name in wanted - set(usable) if not name.endswith("num_batches_tracked")}
    if absent - {"layer4"}:
        raise InputError(
            f"The weights file {settings.weights} lacks {', '.join(sorted(absent))} of {settings.backbone}."
        )
    network.load_state_dict(usable, strict=False)


class Searcher(nn.Module):
    """Policy searcher g_φ: planes `[B, S, h, w]` to an action `[B, A]` in [0, 1] (a mask `[B, h·w]` for the action
    `mask`).
    """

    def __init__(self, options: EILOptions, planes: int, num_classes: int, *, load: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(options.operators, planes, load=load)
        self.is_mask = options.action == "mask"
        size = options.action_size(num_classes)
        self.last: nn.Module = nn.Conv2d(512, 1, 1) if self.is_mask else nn.Linear(512, size)
        self.skip = nn.Conv2d(128, 1, 1) if self.is_mask else None
        nn.init.kaiming_normal_(self.last.weight)
        nn.init.constant_(self.last.bias, options.operators.searcher_bias)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """Returns the action."""
        if self.skip is None:
            return self.last(self.backbone(planes).mean((2, 3))).sigmoid()
        middle = self.backbone[:6](planes)
        score = F.interpolate(
            self.last(self.backbone[6:](middle)), size=middle.shape[-2:], mode="bilinear"
        ) + self.skip(middle)
        return F.interpolate(score, size=planes.shape[-2:], mode="bilinear").flatten(1).sigmoid()


class Assessor(nn.Module):
    """Policy assessor f_ψ: planes `[B, S, h, w]` and action `[B, A]` to a value `[B]` (Eq. 3)."""

    def __init__(self, options: EILOptions, planes: int, num_classes: int, *, load: bool) -> None:
        super().__init__()
        self.fusion = options.operators.fusion
        self.action_gain = options.operators.action_gain
        self.is_mask = options.action == "mask"
        size = 1 if self.is_mask else options.action_size(num_classes)
        extra = size if self.fusion == "planes" else 0
        self.backbone = build_backbone(options.operators, planes + extra, load=load)
        hidden = options.operators.hidden_units
        if self.fusion == "hidden":
            self.head: nn.Module = nn.Sequential(nn.Linear(512 + size, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        else:
            self.head = nn.Linear(512 + (size if self.fusion == "linear" else 0), 1)
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        if options.operators.assessor_start == "zero":
            nn.init.zeros_((self.head[-1] if isinstance(self.head, nn.Sequential) else self.head).weight)

    def forward(self, planes: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Returns the value q."""
        if self.fusion == "planes":
            height, width = planes.shape[-2:]
            tiled = (
                action.view(-1, 1, height, width)
                if self.is_mask
                else action[:, :, None, None].expand(-1, -1, height, width)
            )
            return self.head(self.backbone(torch.cat([planes, tiled.to(planes.dtype)], 1)).mean((2, 3))).squeeze(1)
        pooled = self.backbone(planes).mean((2, 3))
        centred = (action.to(pooled.dtype) - 0.5) * self.action_gain
        return self.head(torch.cat([pooled, centred], 1)).squeeze(1)


class OperatorsModule(TorchRLModule, InferenceOnlyAPI):
    """Searcher and assessor with their targets φ̄, ψ̄; an inference-only module has no targets and reads no weights file.

    `model_config` carries `eil` (options as plain values), `num_classes`, `feature_channels` and `seed`.
    """

    def setup(self) -> None:
        """Builds the networks."""
        config: dict[str, Any] = dict(self.model_config)
        options = load_settings(EILOptions, config["eil"], where="EIL's options")
        planes = plane_count(config["feature_channels"], config["num_classes"])
        torch.manual_seed(int(config["seed"]) + 1)
        load = not self.inference_only
        self.searcher = Searcher(options, planes, config["num_classes"], load=load)
        self.assessor = Assessor(options, planes, config["num_classes"], load=load)
        if not self.inference_only:
            self.target_searcher = copy.deepcopy(self.searcher).requires_grad_(False)
            self.target_assessor = copy.deepcopy(self.assessor).requires_grad_(False)

    def get_non_inference_attributes(self) -> list[str]:
        """Returns the names of what only the learner needs."""
        return ["target_searcher", "target_assessor"]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """RLlib's generic forward: `obs` `[B, S, h, w]` to `actions` `[B, A]`."""
        return {"actions": self.searcher(batch["obs"])}
