"""Environments: a `gymnasium.vector.VectorEnv` whose observations and actions are torch tensors on one device, and
its single-image view.
"""

from __future__ import annotations

import abc
from typing import Any, Generic, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

Observation = TypeVar("Observation", torch.Tensor, dict[str, torch.Tensor])
"""`[B, …]`, or several of them by name where the space is a `Dict`."""


class SegmentationVectorEnv(VectorEnv[Observation, torch.Tensor, torch.Tensor], abc.ABC, Generic[Observation]):
    """B images side by side, one decision for each per step.

    A method implements `observe` and `advance`. Which images are played is either drawn (`reset(seed=…)`) or given
    (`reset(options={"rows": int64 [B], "seeds": int64 [B]})`), so that an actor plays exactly what the driver asked for.

    Args:
        num_envs: B.
        num_rows: images in the split.
        observation_space: of one image.
        action_space: of one image.
        device: where observations, actions and rewards live.
        autoreset_mode: SAME_STEP for agents that step for ever, DISABLED where every reset is given.

    Source: gymnasium's vector environment API; tensors in place of arrays are this design's principle 5.
    """

    def __init__(
        self,
        *,
        num_envs: int,
        num_rows: int,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        device: torch.device,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        self.num_envs = num_envs
        self.num_rows = num_rows
        self.device = device
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.autoreset_mode = autoreset_mode
        self.metadata = {"autoreset_mode": autoreset_mode, "render_modes": []}

    @abc.abstractmethod
    def observe(self, rows: torch.Tensor, seeds: torch.Tensor) -> Observation:
        """Starts an episode on images `rows` int64 `[B]` under augmentation `seeds` int64 `[B]`; returns the
        observation `[B, …]`.
        """

    @abc.abstractmethod
    def advance(
        self, actions: torch.Tensor
    ) -> tuple[Observation, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Applies actions `[B, …]`; returns observation, reward float32 `[B]`, terminated bool `[B]`, truncated bool
        `[B]`, info.
        """

    @torch.no_grad()
    def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts B episodes, on the given rows and seeds or on drawn ones."""
        if seed is not None:
            self._np_random, self._np_random_seed = gymnasium.utils.seeding.np_random(seed)
        if options and "rows" in options:
            rows, seeds = options["rows"], options["seeds"]
        else:
            rows = torch.from_numpy(self.np_random.integers(0, self.num_rows, size=self.num_envs))
            seeds = torch.from_numpy(self.np_random.integers(0, 2**62, size=self.num_envs))
        rows = torch.as_tensor(rows, dtype=torch.int64).to(self.device)
        seeds = torch.as_tensor(seeds, dtype=torch.int64).to(self.device)
        if rows.shape != (self.num_envs,) or seeds.shape != (self.num_envs,):
            raise ValueError(
                f"reset needs {self.num_envs} rows and seeds, got {tuple(rows.shape)} and {tuple(seeds.shape)}."
            )
        self._finished = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self.observe(rows, seeds), {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, actions: torch.Tensor
    ) -> tuple[Observation, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Applies one action per image.

        All B episodes have the same length, so they end together; with SAME_STEP the next B episodes start in the
        same step and the last observation is `info["final_obs"]`.
        """
        observation, reward, terminated, truncated, info = self.advance(actions.to(self.device))
        if self.autoreset_mode == AutoresetMode.SAME_STEP and bool((terminated | truncated).all()):
            info = {"final_obs": observation, "final_info": info}
            observation, _ = self.reset()
        return observation, reward, terminated, truncated, info


class SingleImageEnv(gymnasium.Env[Any, np.ndarray]):
    """The single-image view of a `SegmentationVectorEnv` of one:

    NumPy in, NumPy out (a dictionary of arrays where the space is a `Dict`), so that any agent can be run on it.
    """

    def __init__(self, vector_env: SegmentationVectorEnv) -> None:
        if vector_env.num_envs != 1:
            raise ValueError(f"The single-image view needs an environment of 1 image, got {vector_env.num_envs}.")
        self.vector_env = vector_env
        self.observation_space = vector_env.single_observation_space
        self.action_space = vector_env.single_action_space
        self.metadata = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode on one image; the generator of gymnasium draws which."""
        super().reset(seed=seed)
        if not (options and "rows" in options):
            options = {
                "rows": self.np_random.integers(0, self.vector_env.num_rows, size=1),
                "seeds": self.np_random.integers(0, 2**62, size=1),
            }
        observation, info = self.vector_env.reset(options=options)
        return _first(observation), info

    @torch.no_grad()
    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Applies one action `[…]` of the action space's own type."""
        actions = torch.as_tensor(np.asarray(action, dtype=self.action_space.dtype))[None]
        observation, reward, terminated, truncated, info = self.vector_env.advance(actions.to(self.vector_env.device))
        scalars = {name: float(value[0]) for name, value in info.items() if torch.is_tensor(value) and value.ndim == 1}
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), scalars


def _first(observation: torch.Tensor | dict[str, torch.Tensor]) -> Any:
    """Returns the observation of the first image, as arrays: float32, or the integers that maps of classes are."""
    if isinstance(observation, dict):
        return {name: _first(value) for name, value in observation.items()}
    one = observation[0].float() if observation.is_floating_point() else observation[0]
    return one.cpu().numpy()
