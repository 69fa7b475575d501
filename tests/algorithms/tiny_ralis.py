"""A small RALIS for the tests: 24 images of 48×48 in regions of 24×24, a segmenter of a few channels, everything in this
process.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from algorithms.tiny_eil import changed

from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.env_runner import RALISEnvRunner
from raysseg.algorithms.ralis.episode import Game, LabellingEpisode, Step
from raysseg.algorithms.ralis.module import START
from raysseg.algorithms.ralis.policies import POLICIES, Choice, Exploration
from raysseg.algorithms.ralis.sets import RegionSets
from raysseg.algorithms.ralis.state import Observation
from raysseg.algorithms.ralis.variant_sets import sets_of_run
from raysseg.configuration import load_settings
from raysseg.core import rollout
from raysseg.data import Store
from raysseg.segmenters import Segmenter

CLASSES = 5
PER_STEP = 3

VALUES: dict[str, Any] = {
    "method": "ralis",
    "data": {
        "scribbles": "none",
        "synthetic": {"train_images": 24, "val_images": 4, "height": 48, "width": 48, "objects": 4},
    },
    "segmenter": {
        "architecture": "DeepLabV3Plus",
        "encoder": "resnet18",
        "weights": "none",
        "encoder_depth": 3,
        "decoder_channels": 16,
    },
    "training": {
        "pretrain_epochs": 1,
        "stage_epochs": 1,
        "batch_size": 4,
        "optimiser": {"name": "adamw", "learning_rate": 0.003},
        "head_multiplier": 1.0,
        "augmentation": {"crop": [48, 48]},
    },
    "ralis": {
        "sets": {"state": 3, "play": 10, "start": 3, "reward": 4},
        "regions": {"rows": 2, "columns": 2, "entropy_cells": 4},
        "per_step": PER_STEP,
        "pool_size": 2,
        "budgets": [6, 12],
        "episode": {"optimiser": {"learning_rate": 0.01, "momentum": 0.9, "schedule": "constant"}},
        "learning": {"episodes": 2, "budget": 9, "pool_size": 4, "batch_size": 4, "replay": {"capacity": 64}},
    },
    "engine": {"updates_per_iteration": 2, "inference_batch_size": 4, "torch_threads": 1, "cache_mib": 64},
}

DECODER: dict[str, Any] = {
    "ralis__episode__scope": "decoder",
    "ralis__episode__augmentation": {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": None},
}
"""The changes with which the decoder alone is trained."""


def settings_of(**changes: Any) -> RALISSettings:
    """Returns the small settings; `ralis__per_step=5` replaces `ralis.per_step`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_settings(RALISSettings, changed(VALUES, dotted))


class GameBench:
    """An actor with networks of its own, without Ray: what an episode does can be looked at."""

    def __init__(self, settings: RALISSettings, folder: Path, store_uri: str) -> None:
        self.settings = settings
        self.config = RALISConfig().apply(settings, run_dir=str(folder), store_uri=store_uri)
        self.sets: RegionSets = sets_of_run(settings, Store.open(store_uri), folder)
        self.module = self.config.get_multi_rl_module_spec().build()
        self.runner = self.another_actor()

    def another_actor(self) -> RALISEnvRunner:
        """Returns an actor that has played nothing yet, with the same weights."""
        runner = RALISEnvRunner(config=self.config, worker_index=0)
        runner.share_module(self.module)
        return runner

    @property
    def episode(self) -> LabellingEpisode:
        """The actor's episode."""
        return self.runner.episode

    @property
    def start(self) -> Segmenter:
        """What episodes start with."""
        return self.module[START].network

    def game(self, seed: int = 0, **changes: Any) -> Game:
        """Returns a game on D_V with a budget of all its steps."""
        values: dict[str, Any] = {"rows": self.sets.pool, "state": self.sets.state, "reward": self.sets.reward}
        return Game(**{**values, "pool_size": 3, "budget": 9, "seed": seed, **changes})

    def reset(self, seed: int = 0, **changes: Any) -> LabellingEpisode:
        """Begins an episode."""
        self.episode.reset(self.start, self.game(seed, **changes))
        return self.episode

    def choose(self, policy: str, **changes: Any) -> tuple[Observation, Choice]:
        """Looks at the episode's step and lets a policy choose."""
        observation = self.episode.observe(POLICIES[policy].wanted)
        values: dict[str, Any] = {"seed": self.episode.step_seed}
        if policy == "query":
            values["query"] = self.runner.query
        return observation, POLICIES[policy].choose(observation, Exploration(**{**values, **changes}))

    def play(self, choices: list[list[int]], policy: str = "query") -> tuple[list[Observation], list[Step]]:
        """Plays given choices; what `policy` would look at is looked at."""
        observations, steps = [], []
        for chosen in choices:
            observations.append(self.episode.observe(POLICIES[policy].wanted))
            steps.append(self.episode.label(np.array(chosen)))
        return observations, steps

    def sample(self, seed: int = 0, **context: Any) -> pa.RecordBatch:
        """Plays one whole episode on D_T."""
        values = {"episode": 0, "first_step": 0, "segmenter_version": 0, "policy_version": 0}
        return self.runner.sample(records=rollout.order(np.array([0]), np.array([seed])), context={**values, **context})


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of all parameters and buffers."""
    return copy.deepcopy(network.state_dict())


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
