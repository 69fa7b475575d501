"""A transition carries decisions: at 512×512 it stays within 20 KB on the wire, and no dense tensor is in its schema."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from algorithms.tiny_eil import Bench, settings_of
from PIL import Image

from raysseg.algorithms.eil.env import EILVectorEnv
from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.settings import ReplaySettings
from raysseg.data import encode_map, synthetic_samples
from raysseg.data.synthetic import SyntheticSettings

SIDE = 512
LIMIT = 20_000


def sizes_of(maps: list[np.ndarray]) -> list[int]:
    """Returns the bytes on the wire of transitions whose M' are the maps, as the first steps of episodes."""
    columns = {
        "key": ["train-00000"],
        "row": [0],
        "seed": [2**61],
        "stage": [1],
        "step": [0],
        "labels": [None],
        "action": [np.array([0.5, 0.5], np.float32).tobytes()],
        "reward": [0.1],
        "reward_parts": [[0.05, 0.05]],
        "value": [0.1],
        "terminated": [False],
        "label_version": [1],
        "segmenter_version": [1],
        "policy_version": [1],
    }
    batches = [rollout.transitions({**columns, "next_labels": [encode_map(one)]}) for one in maps]
    replay = ReplayBuffer(ReplaySettings(capacity=len(batches)))
    for batch in batches:
        replay.add(batch)
    sizes = [rollout.wire_bytes(batch) for batch in batches]
    assert replay.nbytes == sum(sizes)
    return sizes


def test_labels_of_scenes_fit() -> None:
    scenes = synthetic_samples(
        SyntheticSettings(train_images=4, height=SIDE, width=SIDE, objects=10), splits=("train",)
    )
    maps = [one for scene in scenes for one in (scene.label, scene.scribble) if one is not None]
    assert len(maps) == 8
    assert all(len(np.unique(one)) > 2 for one in maps)
    assert max(sizes_of(maps)) <= LIMIT


@pytest.mark.parametrize("name", ["camvid", "acdc"])
def test_real_label_maps_fit(shared_data: Path, name: str) -> None:
    maps = []
    for path in sorted((shared_data / name / "train" / "labels").glob("*.png"))[::25]:
        with Image.open(path) as image:
            maps.append(np.array(image.resize((SIDE, SIDE), Image.Resampling.NEAREST)))
    assert len(maps) >= 10
    assert np.mean(sizes_of(maps)) <= LIMIT


def test_no_field_is_dense() -> None:
    for field in rollout.TRANSITION_SCHEMA:
        assert not pa.types.is_fixed_size_list(field.type), field.name
        assert not isinstance(field.type, pa.BaseExtensionType), field.name
        if pa.types.is_list(field.type):
            assert field.name == "reward_parts"
    binary = {field.name for field in rollout.TRANSITION_SCHEMA if pa.types.is_binary(field.type)}
    assert binary == {"labels", "action", "next_labels"}


def test_a_played_transition_is_a_fraction_of_its_observation(tmp_path: Path, store_uri: str) -> None:
    played = Bench(settings_of(), tmp_path, store_uri)
    batch = played.sample()
    assert isinstance(played.runner.env, EILVectorEnv)
    observation = played.runner.env.single_observation_space
    assert observation.shape is not None
    dense = 4 * int(np.prod(observation.shape))
    assert rollout.wire_bytes(batch) / batch.num_rows < dense / 10
    assert max(len(action) for action in batch.column("action").to_pylist()) == 4 * 2
