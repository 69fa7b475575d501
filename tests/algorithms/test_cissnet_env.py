"""CiSS-Net's environment: what a step pays, when episodes end and begin again, and other people's agents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch
from algorithms.tiny_cissnet import CELLS, CLASSES, STEPS, settings_of
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.env import CiSSNetVectorEnv
from raysseg.algorithms.cissnet.features import domain_features, feature_shape
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.core.crops import read_crops
from raysseg.core.workspace import Workspace
from raysseg.data import Sample, Store, open_dataset, write_store
from raysseg.data.batches import GROUND_TRUTH
from raysseg.errors import InputError
from raysseg.segmenters import build_segmenter

Make = Callable[..., CiSSNetVectorEnv]
GIVEN = {"rows": np.array([3, 7]), "seeds": np.array([11, 12])}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small scenes."""
    return open_dataset(settings_of().data, tmp_path_factory.mktemp("scenes")).uri


def env_of(settings: CiSSNetSettings, uri: str, folder: Path, **options: Any) -> CiSSNetVectorEnv:
    """Makes an environment of two images with untrained networks."""
    torch.manual_seed(0)
    segmenter = build_segmenter(settings.segmenter, CLASSES).eval()
    channels, _ = feature_shape(segmenter, settings.cissnet.network.features)
    networks = ContextNetworks(
        settings.cissnet.network.model_dump(), channels, CLASSES, uses_context=True, learns=True
    ).eval()
    workspace = Workspace(settings, uri, str(folder / "labels"), torch.device("cpu"))
    values = {"num_envs": 2, "segmenter": segmenter, "networks": networks, **options}
    return CiSSNetVectorEnv(workspace, settings, **values)


@pytest.fixture
def make(tmp_path: Path, scenes: str) -> Make:
    """Makes an environment on the small scenes; `cissnet__learning__steps=2` replaces `cissnet.learning.steps`."""

    def build(mode: AutoresetMode = AutoresetMode.DISABLED, **changes: Any) -> CiSSNetVectorEnv:
        return env_of(settings_of(**changes), scenes, tmp_path, autoreset_mode=mode)

    return build


def drawn_actions(seed: int) -> torch.Tensor:
    """Two action maps, true at about half of the positions."""
    return torch.rand(2, *CELLS, generator=torch.Generator().manual_seed(seed)) < 0.5


def obvious_rewards(before: Any, after: Any, actions: Any, labels: Any, box: int) -> np.ndarray:
    """Eq. 4 position by position, with β1 = 0.4 and β2 = 0.2; labels from 254 on are void."""
    rewards = np.zeros(labels.shape)
    height, width = labels.shape
    for row in range(height):
        for column in range(width):
            if labels[row, column] >= 254:
                continue
            scores = []
            for i in range(max(0, row - box // 2), min(height, row + box // 2 + 1)):
                for j in range(max(0, column - box // 2), min(width, column + box // 2 + 1)):
                    if labels[i, j] < 254:
                        was, is_ = before[i, j] == labels[i, j], after[i, j] == labels[i, j]
                        scores.append({(0, 1): 1.0, (1, 0): -1.0, (0, 0): 0.0, (1, 1): 0.5}[int(was), int(is_)])
            rewards[row, column] = np.mean(scores)
            context = int(before[row, column]) + 1 if actions[row, column] else 0
            rewards[row, column] += 0.4 * (context == labels[row, column] + 1) + 0.2 * (context == 0)
    return rewards


def test_a_step_pays_equation_4_and_void_counts_nowhere(make: Make) -> None:
    env = make()
    data = env.workspace.train
    labels = data.labels

    def torn(rows: torch.Tensor, version: int) -> torch.Tensor:
        result = labels(rows, version).clone()
        result[:, :20], result[:, 28:36, ::5], result[:, 40:, 40:] = 255, 254, 255
        return result

    seen = set()
    with mock.patch.object(data, "labels", torn):
        observation, _ = env.reset(options=GIVEN)
        truth = env.labels.numpy()
        assert 0 < (truth >= 254).sum() < truth.size / 2
        for step in range(STEPS):
            before, actions = observation["predictions"].clone(), drawn_actions(step)
            observation, reward, _, _, info = env.step(actions)
            for image in range(2):
                after = observation["predictions"][image].numpy()
                expected = obvious_rewards(before[image].numpy(), after, actions[image].numpy(), truth[image], 3)
                np.testing.assert_allclose(info["rewards"][image], expected, atol=1e-6)
                valid = truth[image] < 254
                assert reward[image] == pytest.approx(expected[valid].mean(), abs=1e-6)
                assert info["context_share"][image] == pytest.approx(actions[image].numpy()[valid].mean())
                assert info["accuracy"][image] == pytest.approx((after == truth[image])[valid].mean())
                right, taken = before[image].numpy() == truth[image], actions[image].numpy()
                assert info["context_right"][image] == pytest.approx((right & taken)[valid].mean())
                seen |= set(zip(right[valid].tolist(), taken[valid].tolist(), strict=True))
    assert len(seen) == 4, "right and wrong, taken and left: all must occur for this test to say anything"


def test_an_image_without_labels_pays_nothing(make: Make) -> None:
    env = make()
    data = env.workspace.train
    labels = data.labels

    def torn(rows: torch.Tensor, version: int) -> torch.Tensor:
        result = labels(rows, version).clone()
        result[0] = 255
        return result

    with mock.patch.object(data, "labels", torn):
        env.reset(options=GIVEN)
        _, reward, _, _, info = env.step(drawn_actions(0))
    assert not info["rewards"][0].any()
    assert (reward[0], info["context_share"][0], info["accuracy"][0]) == (0, 0, 0)
    assert reward[1] != 0


def test_padding_beside_a_small_image_counts_nowhere(tmp_path: Path, scenes: str) -> None:
    store = Store.open(scenes)
    image, label = store.image(store.keys("train")[0]), store.label(store.keys("train")[0])
    assert label is not None
    samples = [
        Sample(key="whole", image=image, split="train", label=label),
        Sample(key="part", image=image[:32, :24], split="train", label=label[:32, :24]),
    ]
    write_store(tmp_path / "sizes", samples, store.info, image_encoding="raw")
    still = {"training__augmentation": {"crop": None, "scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0}}
    settings = settings_of(**still, data={"source": "store", "path": str(tmp_path / "sizes"), "scribbles": "none"})
    env = env_of(settings, str(tmp_path / "sizes"), tmp_path)
    env.reset(options={"rows": np.array([0, 1]), "seeds": np.array([1, 2])})
    keys = env.workspace.train.keys
    whole, part = keys.index("whole"), keys.index("part")
    assert env.valid[whole].all()
    inside = torch.zeros(CELLS, dtype=torch.bool)
    inside[:4, :3] = True
    assert torch.equal(env.valid[part], inside)
    assert torch.equal(env.labels[part][inside], env.labels[whole][inside])
    _, reward, _, _, info = env.step(drawn_actions(0))
    assert not info["rewards"][part][~inside].any()
    assert reward[part] == pytest.approx(float(info["rewards"][part][inside].mean()))


def test_the_observation_is_x_and_the_p_map(make: Make) -> None:
    env = make()
    observation, info = env.reset(options=GIVEN)
    assert info == {}
    rows, seeds = (torch.as_tensor(GIVEN[name]) for name in ("rows", "seeds"))
    data = env.workspace.train
    images, _ = read_crops(data, rows, seeds, env.settings.training, data.labels(rows, GROUND_TRUTH))
    features = domain_features(env.segmenter, images, "pyramid")
    torch.testing.assert_close(observation["features"], features)
    assert env.networks is not None
    with torch.no_grad():
        first = env.networks.base(features)
        assert torch.equal(observation["predictions"], first.argmax(1).to(torch.uint8))
        actions = drawn_actions(0)
        contexts = torch.where(actions, observation["predictions"] + 1, 0)
        following, *_ = env.step(actions)
        assert env.networks.bias is not None
        bias = env.networks.bias(env.networks.bias.prepare(features), contexts)
    assert torch.equal(following["predictions"], (first + bias).argmax(1).to(torch.uint8))
    assert torch.equal(following["features"], observation["features"])
    for name in ("features", "predictions"):
        assert observation[name].shape == env.observation_space[name].shape
    assert env.action_space.shape == (2, *CELLS)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_an_episode_is_cut_after_its_steps_and_never_terminates(make: Make, steps: int) -> None:
    env = make(cissnet__learning__steps=steps)
    env.reset(options=GIVEN)
    ends = []
    for number in range(steps):
        _, _, terminated, truncated, _ = env.step(drawn_actions(number))
        ends.append((terminated.tolist(), truncated.tolist()))
    assert ends == [([False] * 2, [number == steps - 1] * 2) for number in range(steps)]


def test_the_next_episode_begins_in_the_same_step(make: Make) -> None:
    env = make(AutoresetMode.SAME_STEP)
    first, _ = env.reset(seed=4)
    for number in range(STEPS):
        observation, _, _, truncated, info = env.step(drawn_actions(number))
        assert ("final_obs" in info) == (number == STEPS - 1)
    assert truncated.all()
    assert torch.equal(info["final_obs"]["features"], first["features"])
    assert not torch.equal(observation["features"], first["features"])
    assert info["final_info"]["rewards"].shape == (2, *CELLS)
    assert env.episode is not None
    assert env.episode.step == 0
    again = make(AutoresetMode.DISABLED)
    again.reset(seed=4)
    second, _ = again.reset()
    assert torch.equal(observation["features"], second["features"]), "the next episode is drawn, not given"


def test_without_autoreset_the_last_observation_stays(make: Make) -> None:
    env = make(AutoresetMode.DISABLED)
    first, _ = env.reset(options=GIVEN)
    for number in range(STEPS):
        observation, _, _, _, info = env.step(drawn_actions(number))
    assert torch.equal(observation["features"], first["features"])
    assert "final_obs" not in info


def test_the_same_seed_is_the_same_episode_and_another_is_not(make: Make) -> None:
    def played(seed: int) -> list[torch.Tensor]:
        env = make()
        observation, _ = env.reset(seed=seed)
        parts = [*observation.values()]
        for number in range(STEPS):
            observation, reward, _, _, info = env.step(drawn_actions(number))
            parts += [observation["predictions"], reward, info["rewards"]]
        return parts

    first, again, other = played(1), played(1), played(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_batch_is_its_episodes_side_by_side(make: Make, tmp_path: Path, scenes: str) -> None:
    both = make()
    both.reset(options=GIVEN)
    actions = drawn_actions(0)
    observation, rewards, *_ = both.step(actions)
    for image in range(2):
        alone = env_of(settings_of(), scenes, tmp_path, num_envs=1, autoreset_mode=AutoresetMode.DISABLED)
        alone.reset(options={name: values[image : image + 1] for name, values in GIVEN.items()})
        following, reward, *_ = alone.step(actions[image : image + 1])
        torch.testing.assert_close(following["features"][0], observation["features"][image], atol=1e-5, rtol=1e-4)
        assert torch.equal(following["predictions"][0], observation["predictions"][image])
        assert float(reward[0]) == pytest.approx(float(rewards[image]), abs=1e-6)


# ---- other people's agents ------------------------------------------------------------------------------------------


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gymnasium.Env:
    """The registered environment on its own scenes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return gymnasium.make("raysseg/CiSSNet-v0")


def test_it_passes_gymnasiums_own_checks(env: gymnasium.Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".*(render|infinity).*")
        check_env(env.unwrapped)


def test_an_agent_can_play_it(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=1)
    rewards, ends = [], []
    while not (ends and ends[-1]):
        assert env.observation_space.contains(observation)
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert not terminated
        assert type(reward) is float
        assert set(info) == {"context_share", "context_right", "accuracy"}
        rewards.append(reward)
        ends.append(truncated)
    assert len(ends) == 8
    assert all(np.isfinite(rewards))
    assert len(set(rewards)) > 1


def test_options_reach_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = gymnasium.make("raysseg/CiSSNet-v0", learning={"steps": 2})
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(2)] == [False, True]
    with pytest.raises(InputError, match=r"cissnet\.lerning.*did you mean 'learning'"):
        gymnasium.make("raysseg/CiSSNet-v0", lerning={"steps": 2})
    with pytest.raises(InputError, match="but the maps have"):
        gymnasium.make("raysseg/CiSSNet-v0", reward={"box": [96, 24]})
