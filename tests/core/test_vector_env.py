"""The environments' base: which images are played, when episodes begin again, and the single-image view."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from raysseg.core.env import SegmentationVectorEnv, SingleImageEnv


class Counting(SegmentationVectorEnv):
    """Shows row, seed and step of each image; an episode has two steps, each paid with the action."""

    def __init__(self, num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> None:
        super().__init__(
            num_envs=num_envs,
            num_rows=10,
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            action_space=gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32),
            device=torch.device("cpu"),
            autoreset_mode=mode,
        )

    def observe(self, rows: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        self.state = torch.stack([rows.float(), (seeds % 1000).float(), torch.zeros(len(rows))], 1)
        return self.state.clone()

    def advance(self, actions: torch.Tensor) -> tuple[Any, ...]:
        self.state[:, 2] += 1
        over = self.state[:, 2] >= 2
        return self.state.clone(), actions[:, 0], over, torch.zeros_like(over), {"step": self.state[:, 2].clone()}


def test_given_images_are_played() -> None:
    env = Counting(3)
    observation, _ = env.reset(options={"rows": np.array([7, 1, 7]), "seeds": torch.tensor([5, 6, 7])})
    assert observation.tolist() == [[7, 5, 0], [1, 6, 0], [7, 7, 0]]
    assert env.observation_space.shape == (3, 3)


def test_a_wrong_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows and seeds"):
        Counting(3).reset(options={"rows": [1, 2], "seeds": [1, 2]})


def test_drawn_images_depend_on_the_seed() -> None:
    first, second, third = (Counting(6).reset(seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert 0 <= first[:, 0].min() <= first[:, 0].max() < 10


def test_the_next_episode_begins_in_the_same_step() -> None:
    env = Counting(2)
    env.reset(seed=0)
    actions = torch.tensor([[0.25], [0.5]])
    _, reward, terminated, _, info = env.step(actions)
    assert reward.tolist() == [0.25, 0.5]
    assert not terminated.any()
    assert "final_obs" not in info
    observation, _, terminated, _, info = env.step(actions)
    assert terminated.all()
    assert info["final_obs"][:, 2].tolist() == [2, 2]
    assert observation[:, 2].tolist() == [0, 0]
    assert info["final_info"]["step"].tolist() == [2, 2]


def test_without_autoreset_the_last_observation_stays() -> None:
    env = Counting(2, AutoresetMode.DISABLED)
    env.reset(seed=0)
    for _ in range(2):
        observation, _, terminated, _, info = env.step(torch.zeros(2, 1))
    assert terminated.all()
    assert observation[:, 2].tolist() == [2, 2]
    assert "final_obs" not in info


def test_the_single_image_view_speaks_numpy() -> None:
    env = SingleImageEnv(Counting(1, AutoresetMode.DISABLED))
    observation, info = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(observation, again)
    assert (observation.dtype, observation.shape, info) == (np.float32, (3,), {})
    observation, reward, terminated, truncated, info = env.step(np.array([0.5], np.float32))
    assert (reward, terminated, truncated, info) == (0.5, False, False, {"step": 1.0})
    assert type(reward) is float
    assert type(terminated) is bool
    assert env.step(np.array([0.0]))[2] is True
    observation, _ = env.reset(options={"rows": [4], "seeds": [8]})
    assert observation.tolist() == [4, 8, 0]


def test_the_single_image_view_needs_one_image() -> None:
    with pytest.raises(ValueError, match="1 image, got 2"):
        SingleImageEnv(Counting(2))
