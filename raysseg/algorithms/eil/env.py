"""EIL's environment: one step extends the label maps of B images by thresholds and is paid by the contrastive
reward.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.rewards import REWARDS, Transition
from raysseg.algorithms.eil.state import EILState, StateBuilder
from raysseg.core.env import SegmentationVectorEnv, SingleImageEnv
from raysseg.core.workspace import Workspace
from raysseg.data import Store, open_dataset
from raysseg.functional.random import mix
from raysseg.functional.state import plane_count
from raysseg.segmenters import Segmenter, build_segmenter

REWARD_STREAM = 1
"""Keeps what a reward draws apart from what an episode's crop is drawn by."""


class EILVectorEnv(SegmentationVectorEnv[torch.Tensor]):
    """B episodes of label inference on the training split.

    Observation: the operators' planes `[B, S, h, w]` float32. Action: thresholds `[B, A]` in [0, 1] (a mask
    `[B, h·w]` for the action `mask`). Reward: Eq. 12. An episode starts at the stored map of `label_version` in
    stage `stage`, ends (terminated) with the last stage and is cut (truncated) after `exploration.episode_steps`.

    Args:
        workspace: the data on its device.
        settings: the variant's settings.
        num_envs: B.
        segmenter: Φ; may be replaced with `use_segmenter`.
        autoreset_mode: see `SegmentationVectorEnv`.

    Source: Eq. 1-12.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: EILSettings,
        *,
        num_envs: int,
        segmenter: Segmenter,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        self.builder = StateBuilder(workspace, settings)
        self.settings = settings
        self.segmenter = segmenter
        self.label_version = 0
        self.stage = 1
        height, width = settings.training.augmentation.crop or workspace.train.canvas
        stride = segmenter.feature_stride
        cells = (-(-height // stride), -(-width // stride))
        planes = plane_count(segmenter.feature_channels, workspace.num_classes)
        size = settings.eil.action_size(workspace.num_classes) or cells[0] * cells[1]
        super().__init__(
            num_envs=num_envs,
            num_rows=len(workspace.train.keys),
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (planes, *cells), np.float32),
            action_space=gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32),
            device=workspace.device,
            autoreset_mode=autoreset_mode,
        )
        self.state: EILState | None = None
        self._step = 0

    def use_segmenter(self, segmenter: Segmenter) -> None:
        """Plays on with another segmenter of the same shape."""
        self.segmenter = segmenter

    def observe(self, rows: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """Starts an episode: forward pass of Φ on the crops, M^t from the label store."""
        self._seeds = seeds
        augmented = seeds if self.settings.eil.exploration.augment else None
        self.state = self.builder.observe(self.segmenter, rows, self.label_version, seeds=augmented)
        self._step = 0
        return self.state.planes()

    def advance(
        self, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Infers M^{t+1}, takes the virtual step and pays r; info holds the two parts of r and V."""
        assert self.state is not None, "step needs a reset first"
        options = self.settings.eil
        stage = self.stage + self._step
        labels = self.builder.infer(self.state, actions, min(stage, options.stages))
        following = self.builder.advance(self.segmenter, self.state, labels)
        transition = Transition(
            builder=self.builder,
            segmenter=self.segmenter,
            state=self.state,
            following=following,
            seeds=mix(self._seeds, REWARD_STREAM, self._step),
        )
        reward = REWARDS[options.reward](transition)
        previous, self.state = self.state, following
        self._step += 1
        last = stage >= options.stages and not options.terminal_bootstrap
        terminated = torch.full((self.num_envs,), last, dtype=torch.bool, device=self.device)
        truncated = torch.full(
            (self.num_envs,),
            self._step >= options.exploration.episode_steps and not last,
            dtype=torch.bool,
            device=self.device,
        )
        info = {
            "reward_relabelling": reward.relabelling,
            "reward_features": reward.features,
            "value_map": reward.next_value,
            "new_labels": (following.labels != previous.labels).flatten(1).sum(1),
        }
        return following.planes(), reward.reward, terminated, truncated, info


def make_eil_env(run: str | None = None, **overrides: Any) -> SingleImageEnv:
    """Makes the registered environment `raysseg/EIL-v0`.

    Args:
        run: folder of a finished variant (`…/variants/<name>/seed-<s>`), whose data and segmenter are played; without it, a few
            synthetic scenes and a small untrained segmenter, for trying an agent out.
        overrides: options of EIL (`window`, `delta`, `action`, …) in place of those settings.
            Unless `exploration` is given, an episode goes through all stages.

    Raises:
        InputError: the folder is not a variant's, or an option is unknown.
    """
    from raysseg.algorithms.recipes import load_variant, set_options
    from raysseg.configuration import load_settings

    if run is not None:
        variant = load_variant(Path(run))
        store_uri, segmenter, settings = variant.store().uri, variant.segmenter, variant.settings
        values = settings.model_dump()
        set_options(values, "eil", overrides)
        settings = load_settings(EILSettings, values, where="gymnasium.make")
        labels_uri = str(variant.folder / "labels")
    else:
        folder = tempfile.mkdtemp(prefix="raysseg-env-")
        values = {
            "data": {"synthetic": {"train_images": 8, "val_images": 1, "height": 48, "width": 48}},
            "segmenter": {"architecture": "FPN", "encoder": "resnet18", "weights": "none", "decoder_channels": 32},
            "training": {"augmentation": {"crop": None}},
            "eil": {"virtual_steps": 0, "window": 9, **overrides},
        }
        settings = load_settings(EILSettings, values, where="gymnasium.make")
        store_uri = open_dataset(settings.data, folder).uri
        torch.manual_seed(settings.seed)
        segmenter = build_segmenter(settings.segmenter, Store.open(store_uri).info.num_classes)
        labels_uri = f"{folder}/labels"
    if "exploration" not in overrides:
        exploration = settings.eil.exploration.model_copy(update={"episode_steps": max(1, settings.eil.stages)})
        settings = settings.model_copy(update={"eil": settings.eil.model_copy(update={"exploration": exploration})})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workspace = Workspace(settings, store_uri, labels_uri, device)
    env = EILVectorEnv(
        workspace,
        settings,
        num_envs=1,
        segmenter=segmenter.to(device).eval(),
        autoreset_mode=AutoresetMode.DISABLED,
    )
    return SingleImageEnv(env)


def register() -> None:
    """Registers `raysseg/EIL-v0` with gymnasium, once."""
    if "raysseg/EIL-v0" not in gymnasium.registry:
        gymnasium.register("raysseg/EIL-v0", entry_point="raysseg.algorithms.eil.env:make_eil_env")
