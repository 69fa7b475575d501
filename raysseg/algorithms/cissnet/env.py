"""CiSS-Net's environment: one step turns an action per position into a context and the next p-map, paid by Eq. 4."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.episode import ContextEpisode, box_of_positions, labels_of_positions
from raysseg.algorithms.cissnet.features import domain_features, feature_shape
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.core.crops import read_crops
from raysseg.core.env import SegmentationVectorEnv, SingleImageEnv
from raysseg.core.workspace import Workspace
from raysseg.data import Store, open_dataset
from raysseg.data.batches import GROUND_TRUTH
from raysseg.functional.constants import PADDING
from raysseg.functional.context_reward import context_rewards
from raysseg.segmenters import Segmenter, build_segmenter

Observation = dict[str, torch.Tensor]


class CiSSNetVectorEnv(SegmentationVectorEnv[Observation]):
    """B episodes of context on crops of the training split.

    Observation: X float32 `[B, C, h, w]` and the p-map uint8 `[B, h, w]`. Action: bool `[B, h, w]`, whether a prediction becomes
    context. Reward: the mean of Eq. 4 over an image's valid positions, 0 where it has none; `info["rewards"]` has every position's.
    An episode is cut (truncated) after `learning.steps`.

    Args:
        workspace: the data on its device.
        settings: the variant's settings.
        num_envs: B.
        segmenter: that X is from.
        networks: S-Net, with whatever C-Net it has; None until `use_networks` gives some.
        autoreset_mode: see `SegmentationVectorEnv`.

    Raises:
        InputError: the reward's box is larger than the maps.

    Source: CiSS-Net, Eq. 1-4.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: CiSSNetSettings,
        *,
        num_envs: int,
        segmenter: Segmenter,
        networks: ContextNetworks | None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        self.workspace, self.settings = workspace, settings
        self.segmenter, self.networks = segmenter, networks
        options = settings.cissnet
        crop = settings.crops.augmentation.crop or workspace.train.canvas
        channels, self.stride = feature_shape(segmenter, options.network.features)
        self.cells = (-(-crop[0] // self.stride), -(-crop[1] // self.stride))
        self.box = box_of_positions(options.reward.box, self.cells, self.stride)
        box = gymnasium.spaces.Box
        super().__init__(
            num_envs=num_envs,
            num_rows=len(workspace.train.keys),
            observation_space=gymnasium.spaces.Dict(
                {
                    "features": box(-np.inf, np.inf, (channels, *self.cells), np.float32),
                    "predictions": box(0, workspace.num_classes - 1, self.cells, np.uint8),
                }
            ),
            action_space=gymnasium.spaces.MultiBinary(self.cells),
            device=workspace.device,
            autoreset_mode=autoreset_mode,
        )
        self.episode: ContextEpisode | None = None
        self._features: torch.Tensor | None = None

    def use_networks(self, segmenter: Segmenter, networks: ContextNetworks) -> None:
        """Plays on with other networks of the same shapes."""
        self.segmenter, self.networks = segmenter, networks

    def observe(self, rows: torch.Tensor, seeds: torch.Tensor) -> Observation:
        """Starts an episode: X of the crops, and Y^0 from the Base Net."""
        data = self.workspace.train
        images, labels = read_crops(data, rows, seeds, self.settings.crops, data.labels(rows, GROUND_TRUTH))
        assert self.networks is not None, "reset needs networks"
        options = self.settings.cissnet
        with self.workspace.autocast():
            self._features = domain_features(self.segmenter, images, options.network.features)
            self.labels = labels_of_positions(labels, self.cells, self.stride)
            self.episode = ContextEpisode(self.networks, options, self._features, self.labels)
        self.valid = self.labels < PADDING
        self._count = self.valid.flatten(1).sum(1).clamp(min=1)
        return self._observation()

    def advance(
        self, actions: torch.Tensor
    ) -> tuple[Observation, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Makes Y^{t+1} of the context, and pays; info holds `rewards` `[B, h, w]`, and as shares of the valid
        positions `[B]` `context_share` (became context), `context_right` (did, and is right) and `accuracy` (of Y^{t+1}).
        """
        assert self.episode is not None, "step needs a reset first"
        before, actions = self.episode.predictions, actions.bool()
        with self.workspace.autocast():
            after = self.episode.advance(actions)
        options = self.settings.cissnet
        rewards = context_rewards(
            torch.stack([before, after]),
            actions[None],
            self.labels,
            box=self.box,
            correct_weight=options.reward.correct_weight,
            uncertain_weight=options.reward.uncertain_weight,
        )[0]
        ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        truncated = torch.full_like(ended, self.episode.step >= options.learning.steps)
        info = {
            "rewards": rewards,
            "context_share": self.mean_over_valid(actions.float()),
            "context_right": self.mean_over_valid((actions & (before == self.labels)).float()),
            "accuracy": self.accuracy(),
        }
        return self._observation(), self.mean_over_valid(rewards), ended, truncated, info

    def accuracy(self) -> torch.Tensor:
        """Returns the share of the valid positions that the present p-map has right, float32 `[B]`."""
        assert self.episode is not None
        return self.mean_over_valid((self.episode.predictions == self.labels).float())

    def mean_over_valid(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean of maps float `[B, h, w]` over each image's valid positions, `[B]`; 0 where it has none."""
        return torch.where(self.valid, values, 0.0).flatten(1).sum(1) / self._count

    def _observation(self) -> Observation:
        assert self.episode is not None
        assert self._features is not None
        return {"features": self._features, "predictions": self.episode.predictions}


def make_cissnet_env(run: str | None = None, **overrides: Any) -> SingleImageEnv:
    """Makes the registered environment `raysseg/CiSSNet-v0`.

    Args:
        run: folder of a finished variant (`…/variants/<name>/seed-<s>`), whose data and networks are played; without it, a few
            synthetic scenes and small untrained networks, for trying an agent out.
        overrides: options of CiSS-Net (`reward`, `learning`, …) in place of those settings.

    Raises:
        InputError: the folder is not a variant's, or an option is unknown.
    """
    from raysseg.algorithms.cissnet.results import load_networks
    from raysseg.algorithms.recipes import load_variant, set_options
    from raysseg.configuration import load_settings

    if run is not None:
        variant = load_variant(Path(run))
        store_uri, segmenter, values = variant.store().uri, variant.segmenter, variant.settings.model_dump()
        set_options(values, "cissnet", overrides)
        settings = load_settings(CiSSNetSettings, values, where="gymnasium.make")
        networks = load_networks(settings, variant.folder, segmenter)
        labels_uri = str(variant.folder / "labels")
    else:
        folder = tempfile.mkdtemp(prefix="raysseg-env-")
        small = {"features": "encoder", "width": 32, "context_width": 16, "prediction_width": 16}
        values = {
            "data": {"scribbles": "none", "synthetic": {"train_images": 8, "val_images": 1, "height": 64, "width": 64}},
            "segmenter": {"architecture": "FPN", "encoder": "resnet18", "weights": "none", "encoder_depth": 3},
            "training": {"augmentation": {"crop": None}},
            "cissnet": {"network": small, "reward": {"box": (24, 24)}, **overrides},
        }
        settings = load_settings(CiSSNetSettings, values, where="gymnasium.make")
        store_uri = open_dataset(settings.data, folder).uri
        torch.manual_seed(settings.seed)
        num_classes = Store.open(store_uri).info.num_classes
        segmenter = build_segmenter(settings.segmenter, num_classes)
        channels, _ = feature_shape(segmenter, settings.cissnet.network.features)
        networks = ContextNetworks(
            settings.cissnet.network.model_dump(), channels, num_classes, uses_context=True, learns=True
        )
        labels_uri = f"{folder}/labels"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workspace = Workspace(settings, store_uri, labels_uri, device)
    env = CiSSNetVectorEnv(
        workspace,
        settings,
        num_envs=1,
        segmenter=segmenter.to(device).eval(),
        networks=networks.to(device).eval(),
        autoreset_mode=AutoresetMode.DISABLED,
    )
    return SingleImageEnv(env)


def register() -> None:
    """Registers `raysseg/CiSSNet-v0` with gymnasium, once."""
    if "raysseg/CiSSNet-v0" not in gymnasium.registry:
        gymnasium.register("raysseg/CiSSNet-v0", entry_point="raysseg.algorithms.cissnet.env:make_cissnet_env")
