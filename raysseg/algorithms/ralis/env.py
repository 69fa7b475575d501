"""RALIS' environment: B labelling episodes side by side; one step labels a region of every pool and trains on them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.ralis.config import RALISSettings
from raysseg.algorithms.ralis.episode import Game, LabellingEpisode
from raysseg.algorithms.ralis.module import START_FILE
from raysseg.algorithms.ralis.policies import POLICIES
from raysseg.algorithms.ralis.sets import RegionSets
from raysseg.algorithms.ralis.variant_sets import sets_of_run
from raysseg.core.env import SegmentationVectorEnv, SingleImageEnv
from raysseg.core.modules import SEGMENTER
from raysseg.core.workspace import Workspace
from raysseg.data import Store, open_dataset
from raysseg.segmenters import Segmenter, build_segmenter

_Observation = dict[str, torch.Tensor]


class RALISVectorEnv(SegmentationVectorEnv[dict[str, torch.Tensor]]):
    """B episodes on D_T's play part, each with its own segmenter.

    Observation: `state` float32 `[B, S, d]` and `candidates` float32 `[B, K, N, F]`, both rounded to half precision. Action: one
    candidate of every pool, int64 `[B, K]` in 0…N−1. Reward: change of the mean IoU on D_R, times `reward_scale`. An episode ends
    (terminated) when `learning.budget` regions are labelled; nothing is left to choose then, and the observation is zeros.
    Rows of `reset` mean nothing here, so there is one; seeds decide what is drawn.

    Args:
        workspace: the data on its device.
        settings: the variant's settings.
        num_envs: B.
        start: what every episode starts with; given before the first reset, here or with `use`.
        sets: the images' roles; likewise.
        autoreset_mode: see `SegmentationVectorEnv`.

    Source: RALIS, Sec. 3.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: RALISSettings,
        *,
        num_envs: int,
        start: Segmenter | None = None,
        sets: RegionSets | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        self.settings = settings
        self.start, self.sets = start, sets
        options, classes = settings.ralis, workspace.num_classes
        weightless = settings.own_segmenter.model_copy(update={"weights": "none"})
        self.episodes = [
            LabellingEpisode(workspace, settings, build_segmenter(weightless, classes).to(workspace.device))
            for _ in range(num_envs)
        ]
        network = options.network(classes)
        # The largest entropy, rounded up in half precision.
        highest = float(np.nextafter(np.float16(max(1.0, math.log(classes))), np.float16(np.inf)))
        shapes = {
            "state": (network["state_size"], network["state_features"]),
            "candidates": (options.per_step, options.learning.pool_size, network["action_features"]),
        }
        super().__init__(
            num_envs=num_envs,
            num_rows=1,
            observation_space=gymnasium.spaces.Dict(
                {name: gymnasium.spaces.Box(0.0, highest, shape, np.float32) for name, shape in shapes.items()}
            ),
            action_space=gymnasium.spaces.MultiDiscrete([options.learning.pool_size] * options.per_step),
            device=workspace.device,
            autoreset_mode=autoreset_mode,
        )
        self._shapes = shapes

    def use(self, start: Segmenter, sets: RegionSets) -> None:
        """Plays on with another segmenter to start with, and these sets."""
        self.start, self.sets = start, sets

    def played(self, sets: RegionSets, seed: int) -> Game:
        """Returns a game on D_T's play part.

        Args:
            sets: the images' roles.
            seed: of everything that is drawn.
        """
        learning = self.settings.ralis.learning
        return Game(
            rows=sets.play,
            state=sets.state,
            reward=sets.reward,
            pool_size=learning.pool_size,
            budget=learning.budget,
            seed=seed,
            name="ralis.learning.budget",
            known=sets.start,
        )

    def observe(self, rows: torch.Tensor, seeds: torch.Tensor) -> _Observation:
        """Starts an episode under each of the seeds int64 `[B]`."""
        if self.start is None or self.sets is None:
            raise ValueError("The environment needs a segmenter to start with and the images' sets: call `use` first.")
        for episode, seed in zip(self.episodes, seeds.tolist(), strict=True):
            episode.reset(self.start, self.played(self.sets, seed))
        return self._look()

    def _look(self) -> _Observation:
        if self.episodes[0].over:
            return {
                name: torch.zeros(self.num_envs, *shape, device=self.device) for name, shape in self._shapes.items()
            }
        seen = [episode.observe(POLICIES["query"].wanted) for episode in self.episodes]
        states = [one.state for one in seen if one.state is not None]
        candidates = [one.candidates for one in seen if one.candidates is not None]
        return {"state": torch.stack(states), "candidates": torch.stack(candidates)}

    def advance(
        self, actions: torch.Tensor
    ) -> tuple[_Observation, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Labels the chosen regions int64 `[B, K]`, trains and measures; info holds mean IoU and loss."""
        chosen = actions.cpu().numpy().astype(np.int64)
        steps = [episode.label(one) for episode, one in zip(self.episodes, chosen, strict=True)]
        terminated = torch.tensor([step.terminated for step in steps], device=self.device)
        info = {
            "miou": torch.tensor([step.miou for step in steps], device=self.device),
            "loss": torch.tensor([step.loss for step in steps], device=self.device),
        }
        reward = torch.tensor([step.reward for step in steps], device=self.device)
        return self._look(), reward, terminated, torch.zeros_like(terminated), info


def make_ralis_env(run: str | None = None, **overrides: Any) -> SingleImageEnv:
    """Makes the registered environment `raysseg/RALIS-v0`.

    Args:
        run: folder of a finished variant (`…/variants/<name>/seed-<s>`), on whose data and from whose starting segmenter episodes
            are played; without it, a few synthetic scenes and a small untrained segmenter, for trying an agent out.
        overrides: options of RALIS (`per_step`, `regions`, `learning`, …) in place of those settings.

    Raises:
        InputError: the folder is not a variant's, or an option is unknown.
    """
    from raysseg.algorithms.recipes import load_variant, set_options
    from raysseg.configuration import load_settings

    if run is not None:
        variant = load_variant(Path(run))
        folder, values, store_uri = variant.folder, variant.settings.model_dump(), variant.store().uri
        set_options(values, "ralis", overrides)
        values["segmenter"]["weights"] = str(folder / SEGMENTER / START_FILE)
        # The sets lie in the folder; what the run started from is not needed any more.
        values["training"]["pretrained"] = None
        settings = load_settings(RALISSettings, values, where="gymnasium.make")
    else:
        folder = Path(tempfile.mkdtemp(prefix="raysseg-env-"))
        values = {
            "data": {
                "synthetic": {"train_images": 16, "val_images": 1, "height": 48, "width": 48},
                "scribbles": "none",
            },
            "segmenter": {"architecture": "FPN", "encoder": "resnet18", "weights": "none", "decoder_channels": 32},
            "ralis": {**_SMALL, **overrides},
        }
        settings = load_settings(RALISSettings, values, where="gymnasium.make")
        store_uri = open_dataset(settings.data, str(folder)).uri
    store = Store.open(store_uri)
    torch.manual_seed(settings.seed)
    start = build_segmenter(settings.own_segmenter, store.info.num_classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = RALISVectorEnv(
        Workspace(settings, store_uri, f"{folder}/labels", device),
        settings,
        num_envs=1,
        start=start.to(device).eval(),
        sets=sets_of_run(settings, store, folder),
        autoreset_mode=AutoresetMode.DISABLED,
    )
    return SingleImageEnv(env)


_SMALL: dict[str, Any] = {
    "sets": {"state": 2, "play": 8, "start": 2, "reward": 3},
    "regions": {"rows": 2, "columns": 2, "entropy_cells": 4},
    "per_step": 2,
    "pool_size": 3,
    "budgets": [4],
    "learning": {"budget": 6, "pool_size": 3},
}


def register() -> None:
    """Registers `raysseg/RALIS-v0` with gymnasium, once."""
    if "raysseg/RALIS-v0" not in gymnasium.registry:
        gymnasium.register("raysseg/RALIS-v0", entry_point="raysseg.algorithms.ralis.env:make_ralis_env")
