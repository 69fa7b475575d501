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


class RunningNorm(nn.Module):
    """Normalises each of C features by running statistics, while it is trained as while it acts.

    Batch normalisation proper would take, in training, the statistics of 16 transitions that share a handful of states,
    and give every value a meaning that depends on the batch it was computed in. Here a value does not depend on its
    batch; a pass in training mode only notes sums, and `absorb` moves the statistics afterwards, so that several
    learners can add their sums up first. Until then there are no statistics, so the first pass in training takes its own:
    otherwise a ReLU behind a layer whose values all happen to be negative would let nothing through.

    Args:
        features: C.
        momentum: share of the newest statistics; the first ones count alone.

    Source: reconstruction; the authors' code has batch normalisation.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    absorbed: torch.Tensor

    def __init__(self, features: int, momentum: float = 0.05, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.register_buffer("absorbed", torch.zeros(()))
        self._momentum, self._epsilon = momentum, epsilon
        self._sums: torch.Tensor | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns normalised values `[..., C]`."""
        mean, variance = self.mean, self.variance
        if self.training:
            rows = values.detach().float().reshape(-1, values.shape[-1])
            sums = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
            self._sums = sums if self._sums is None else self._sums + sums
            if not self.absorbed:
                mean, variance = _moments(sums)
        scale = self.weight * (variance + self._epsilon).rsqrt()
        return (values - mean) * scale + self.bias

    def take_sums(self) -> torch.Tensor:
        """Returns the counts, sums and sums of squares `[3, C]` since the last call; zeros where nothing passed."""
        sums, self._sums = self._sums, None
        return torch.zeros(3, len(self.mean), device=self.mean.device) if sums is None else sums

    @torch.no_grad()
    def absorb(self, sums: torch.Tensor) -> None:
        """Moves the statistics towards those of some sums `[3, C]`."""
        mean, variance = _moments(sums)
        self.absorbed += 1
        share = (1.0 / self.absorbed).clamp(min=self._momentum)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)


def _moments(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns means and variances `[C]` from counts, sums and sums of squares `[3, C]`."""
    count = sums[0].clamp(min=1.0)
    mean = sums[1] / count
    return mean, (sums[2] / count - mean.square()).clamp(min=0.0)


def _norm(kind: Normalisation, features: int) -> nn.Module:
    return RunningNorm(features) if kind == "running" else nn.LayerNorm(features)


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
        normalisation: `running` or `layer`.

    Source: RALIS, Sec. 3.4 and the authors' code (widths); what normalises is a reconstruction.
    """

    def __init__(
        self,
        state_size: int,
        state_features: int,
        action_features: int,
        histograms: int,
        *,
        normalisation: Normalisation = "running",
    ) -> None:
        super().__init__()
        if action_features != state_features + histograms:
            raise ValueError(
                f"A candidate has {action_features} numbers; {state_features} of its region and {histograms} of its "
                "histograms are expected."
            )
        self.histograms = histograms
        self.regions = _shared(normalisation, state_features, STATE_WIDTHS)
        self.state = _shared(normalisation, state_size, (EMBEDDING,))
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

    def running_norms(self) -> list[RunningNorm]:
        """Returns the layers whose statistics are moved after each pass in training, always in one order."""
        return [part for part in self.modules() if isinstance(part, RunningNorm)]


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
