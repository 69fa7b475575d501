"""RALIS' networks as RLModules: the query network with its target, and the segmenters that episodes start with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn

from raysseg.algorithms.ralis.config import Normalisation
from raysseg.configuration import load_settings
from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, SegmenterSettings, build_segmenter, save_segmenter

QUERY = "query"
"""The module id of the query network and its target."""

START = "start"
"""The module id of the segmenter that played episodes start with, and of theta_0."""

START_FILE = "start.safetensors"
"""Beside `online.safetensors` in a folder of pre-trained segmenters: the one that played episodes start with."""

STATE_WIDTHS = (256, 128, 1)
ACTION_WIDTHS = (512, 256, 128)
EMBEDDING = 128


class RowNorm(nn.Module):
    """Batch normalisation over all leading dimensions of `[..., C]`.

    Args:
        features: C.

    Source: RALIS, the authors' code.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns normalised values `[..., C]`."""
        return self.norm(values.reshape(-1, values.shape[-1])).view(values.shape)


def _norm(kind: Normalisation, features: int) -> nn.Module:
    return RowNorm(features) if kind == "batch" else nn.LayerNorm(features)


def _shared(kind: Normalisation, features: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Returns layers of normalisation, ReLU and a linear map that every region passes alike."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [_norm(kind, features), nn.ReLU(), nn.Linear(features, width)]
        features = width
    return nn.Sequential(*layers)


class QueryNetwork(nn.Module):
    """The query network: the value of labelling a candidate region, given the state.

    Args:
        state_size: S, regions of a state.
        state_features: d, numbers of each of them.
        action_features: F = d + H, numbers of a candidate; the last H are its histograms of KL divergences.
        histograms: H; 0 leaves the gate out.
        normalisation: of what regions and candidates pass, `batch` or `layer`. The numbers of a whole state are always
            normalised by themselves: a batch holds few distinct states, whose statistics would mean little.

    Where it is trained it normalises by the statistics of its batch, wherever it scores by their running means.

    Source: RALIS, Sec. 3.4 and the authors' code (layers and widths); how a state is normalised is a reconstruction.
    """

    def __init__(
        self,
        state_size: int,
        state_features: int,
        action_features: int,
        histograms: int,
        *,
        normalisation: Normalisation = "batch",
    ) -> None:
        super().__init__()
        if action_features != state_features + histograms:
            raise ValueError(
                f"A candidate has {action_features} numbers; {state_features} of its region and {histograms} of its "
                "histograms are expected."
            )
        self.histograms = histograms
        self.regions = _shared(normalisation, state_features, STATE_WIDTHS)
        self.state = _shared("layer", state_size, (EMBEDDING,))
        self.action = _shared(normalisation, state_features, ACTION_WIDTHS)
        self.gate = _shared(normalisation, histograms, (1,)) if histograms else None
        self.joint = _norm(normalisation, EMBEDDING + ACTION_WIDTHS[-1])
        self.last = nn.Linear(EMBEDDING + ACTION_WIDTHS[-1], 1)

    def forward(self, state: torch.Tensor, candidates: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Returns values `[B, N]`.

        Args:
            state: float `[B, S, d]`; `[1, S, d]` stands for all rows, and with `index` it is `[U, S, d]`.
            candidates: float `[B, N, F]`.
            index: int64 `[B]`, the state of every row; each distinct state then passes once.
        """
        embedded = self.state(self.regions(state).squeeze(-1))
        if index is not None:
            embedded = embedded[index]
        regions, divergences = candidates.split([candidates.shape[-1] - self.histograms, self.histograms], -1)
        action = self.action(regions)
        joint = torch.cat([embedded[:, None].expand(*action.shape[:2], -1), action], -1)
        values = self.last(self.joint(joint)).squeeze(-1)
        return values if self.gate is None else self.gate(divergences).squeeze(-1).sigmoid() * values


class QueryModule(TorchRLModule, InferenceOnlyAPI):
    """The query network phi and its target phi'; an inference-only module has no target.

    `model_config` carries `network` (the arguments of `QueryNetwork`) and `seed`.
    """

    def setup(self) -> None:
        """Builds the networks."""
        config: dict[str, Any] = dict(self.model_config)
        torch.manual_seed(int(config["seed"]) + 1)
        self.query = QueryNetwork(**config["network"])
        if not self.inference_only:
            self.target_query = copy.deepcopy(self.query).requires_grad_(False).eval()

    def get_non_inference_attributes(self) -> list[str]:
        """Returns the names of what only the learner needs."""
        return ["target_query"]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """RLlib's generic forward: `obs` with `state` `[B, S, d]` and `candidates` `[B, N, F]` to `values` `[B, N]`."""
        return {"values": self.query(batch["obs"]["state"], batch["obs"]["candidates"])}


class StartModule(TorchRLModule, InferenceOnlyAPI):
    """Two segmenters that are not trained: what played episodes start with, and theta_0, from which every budget starts.

    `model_config` carries `segmenter` (its settings as plain values), `num_classes`, `seed` and `pretrained` (a folder
    or None: then both are the untrained one until the learner captures trained ones). An inference-only module has no
    theta_0 and reads no weights file.
    """

    def setup(self) -> None:
        """Builds the segmenters."""
        config: dict[str, Any] = dict(self.model_config)
        settings = load_settings(SegmenterSettings, config["segmenter"], where="the segmenter's settings")
        torch.manual_seed(int(config["seed"]))
        folder = config["pretrained"]
        if self.inference_only:
            settings = settings.model_copy(update={"weights": "none"})
        elif folder is not None:
            path = Path(folder) / START_FILE
            if not path.is_file():
                raise InputError(f"training.pretrained is {folder}, but the file {START_FILE} is not in that folder.")
            settings = settings.model_copy(update={"weights": str(path)})
        self.network = _fixed(build_segmenter(settings, config["num_classes"]))
        if not self.inference_only:
            weights = str(Path(folder) / "online.safetensors") if folder is not None else settings.weights
            torch.manual_seed(int(config["seed"]))
            self.origin = _fixed(
                build_segmenter(settings.model_copy(update={"weights": weights}), config["num_classes"])
            )

    def get_non_inference_attributes(self) -> list[str]:
        """Returns the names of what only the learner needs."""
        return ["origin"]

    def export(self, folder: Path) -> None:
        """Writes what played episodes start with into a folder that exists."""
        save_segmenter(folder / START_FILE, self.network)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """RLlib's generic forward: `obs` `[B, 3, H, W]` normalised images to `logits` `[B, K, h, w]`."""
        return {"logits": self.network(batch["obs"]).logits}


def _fixed(segmenter: Segmenter) -> Segmenter:
    return segmenter.requires_grad_(False).eval()
