"""EIL's environment for other people's agents: gymnasium's own checks, tensors in batches, and an agent of Stable-Baselines3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from algorithms.tiny_eil import Bench
from gymnasium.utils.env_checker import check_env

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.algorithms.eil.env import EILVectorEnv
from raysseg.errors import InputError


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gymnasium.Env:
    """The registered environment on its own scenes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return gymnasium.make("raysseg/EIL-v0")


def test_it_passes_gymnasiums_own_checks(env: gymnasium.Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The features have no bounds, which is all that may be remarked on.
        warnings.filterwarnings("ignore", message=r".*(infinity|infinite).*")
        warnings.filterwarnings("ignore", message=r".*render.*")
        check_env(env.unwrapped)


def test_the_reward_depends_on_the_action(env: gymnasium.Env) -> None:
    options = {"rows": [2], "seeds": [11]}
    rewards, new = {}, {}
    for threshold in (0.0, 1.0):
        observation, _ = env.reset(options=options)
        assert env.observation_space.contains(observation)
        action = np.full(env.action_space.shape, threshold, np.float32)
        _, rewards[threshold], terminated, truncated, info = env.step(action)
        assert not terminated
        assert not truncated
        new[threshold] = info["new_labels"]
    assert rewards[1.0] == 0.0, "nothing exceeds a threshold of 1, and the segmenter does not move"
    assert rewards[0.0] != 0.0
    assert new[0.0] > new[1.0] == 0


def test_an_episode_goes_through_all_stages(env: gymnasium.Env) -> None:
    env.reset(seed=0)
    ends = [env.step(np.full(2, 0.3, np.float32))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(True, False)]


def test_options_reach_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = gymnasium.make("raysseg/EIL-v0", action="per_class", window="image")
    assert env.action_space.shape == (5,)
    env.reset(options={"rows": [2], "seeds": [11]})
    far = env.step(np.zeros(5, np.float32))[-1]["new_labels"]
    near = gymnasium.make("raysseg/EIL-v0", action="per_class", window=3)
    near.reset(options={"rows": [2], "seeds": [11]})
    assert far > near.step(np.zeros(5, np.float32))[-1]["new_labels"]
    with pytest.raises(InputError, match=r"eil\.windw.*did you mean 'window'"):
        gymnasium.make("raysseg/EIL-v0", windw=3)
    with pytest.raises(InputError, match=r"not the folder of a trained variant"):
        gymnasium.make("raysseg/EIL-v0", run=str(tmp_path))


def vector_env(bench: Callable[..., Bench], **changes: object) -> EILVectorEnv:
    one = bench(**changes)
    return EILVectorEnv(one.runner.workspace, one.settings, num_envs=3, segmenter=one.runner.segmenter.online)


def test_a_batch_is_its_images_side_by_side(bench: Callable[..., Bench]) -> None:
    env = vector_env(bench, eil__virtual_steps=1)
    rows, seeds = torch.tensor([5, 0, 5]), torch.tensor([1, 2, 3])
    observation, _ = env.reset(options={"rows": rows, "seeds": seeds})
    assert torch.is_tensor(observation)
    assert observation.shape == env.observation_space.shape
    assert observation.dtype == torch.float32
    actions = torch.tensor([[0.2, 0.3], [0.4, 0.1], [0.0, 0.9]])
    _, reward, terminated, truncated, info = env.step(actions)
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    assert truncated.all()
    assert not terminated.any(), "a first stage of two is cut, not over"
    torch.testing.assert_close(
        reward, sum(info["final_info"][name] for name in ("reward_relabelling", "reward_features"))
    )
    order = torch.tensor([2, 0, 1])
    swapped, _ = env.reset(options={"rows": rows[order], "seeds": seeds[order]})
    torch.testing.assert_close(swapped, observation[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(env.step(actions[order])[1], reward[order], atol=1e-5, rtol=1e-5)


def test_the_last_stage_is_terminal_unless_told_otherwise(bench: Callable[..., Bench]) -> None:
    for bootstrap in (False, True):
        env = vector_env(bench, eil__terminal_bootstrap=bootstrap)
        env.stage = 2
        env.reset(seed=0)
        _, _, terminated, truncated, _ = env.step(torch.zeros(3, 2))
        assert terminated.all().item() is not bootstrap
        assert truncated.all().item() is bootstrap


def test_an_agent_that_steps_for_ever_sees_new_images(bench: Callable[..., Bench]) -> None:
    env = vector_env(bench)
    env.reset(seed=0)
    seen = [env.step(torch.full((3, 2), 0.5))[0] for _ in range(3)]
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_observations_are_planes_of_features_probabilities_and_labels(bench: Callable[..., Bench]) -> None:
    one = bench(eil__exploration__augment=False)
    env = EILVectorEnv(one.runner.workspace, one.settings, num_envs=2, segmenter=one.runner.segmenter.online)
    observation, _ = env.reset(options={"rows": torch.tensor([0, 1]), "seeds": torch.tensor([0, 0])})
    features, probabilities, labels = observation.split([16, 5, 6], 1)
    assert features.abs().sum() > 0
    torch.testing.assert_close(probabilities.sum(1), torch.ones_like(probabilities[:, 0]))
    torch.testing.assert_close(labels.sum(1), torch.ones_like(labels[:, 0]))
    scribbles = one.runner.workspace.train.labels(torch.tensor([0, 1]), 0)
    assert labels[:, -1].mean().item() == pytest.approx((scribbles == 255).float().mean().item())


def test_an_agent_of_stable_baselines_trains_on_it(env: gymnasium.Env) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    agent = sb3.TD3(
        "MlpPolicy",
        gymnasium.wrappers.FlattenObservation(env),
        learning_starts=20,
        batch_size=16,
        buffer_size=200,
        policy_kwargs={"net_arch": [16]},
        seed=0,
        device="cpu",
    )
    before = torch.cat([parameter.detach().flatten().clone() for parameter in agent.actor.parameters()])
    agent.learn(200)
    after = torch.cat([parameter.detach().flatten() for parameter in agent.actor.parameters()])
    assert agent.num_timesteps == 200
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    rewards = agent.replay_buffer.rewards[:200]
    assert np.isfinite(rewards).all()
    assert len(np.unique(rewards)) > 5
