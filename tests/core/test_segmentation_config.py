"""The RLlib configuration: what the settings become, and what is refused before any actor starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from algorithms.tiny_eil import settings_of

from raysseg.algorithms.eil.config import EILConfig
from raysseg.core.modules import SEGMENTER
from raysseg.errors import InputError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, and no Ray to ask for one elsewhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def test_the_engine_becomes_rllibs_keys(tmp_path: Path, store_uri: str, no_gpu: None) -> None:
    settings = settings_of(
        seed=7, engine__num_env_runners=3, engine__num_cpus_per_env_runner=0.5, engine__num_learners=1
    )
    config = EILConfig().apply(settings, run_dir=str(tmp_path), store_uri=store_uri)
    assert (config.num_env_runners, config.num_cpus_per_env_runner, config.num_learners) == (3, 0.5, 1)
    assert (config.num_gpus_per_learner, config.seed) == (0.0, 7)
    assert config.labels_uri == f"{tmp_path}/labels"
    config.validate()


def test_data_is_read_into_the_run_where_no_store_is_given(tmp_path: Path) -> None:
    config = EILConfig().apply(settings_of(), run_dir=str(tmp_path))
    assert Path(config.store_uri).is_relative_to(tmp_path / "data")


@pytest.mark.parametrize(
    "engine",
    [
        {"engine__num_gpus_per_learner": 1.0},
        {"engine__num_env_runners": 2, "engine__num_gpus_per_env_runner": 0.25},
    ],
)
def test_more_gpus_than_exist_are_refused(
    tmp_path: Path, store_uri: str, no_gpu: None, engine: dict[str, float]
) -> None:
    with pytest.raises(InputError, match=r"asks for (1|0\.5) GPUs .* but 0 exist"):
        EILConfig().apply(settings_of(**engine), run_dir=str(tmp_path), store_uri=store_uri)


def test_gpus_of_the_cluster_count(
    tmp_path: Path, store_uri: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    settings = settings_of(engine__num_env_runners=4, engine__num_gpus_per_env_runner=0.5)
    config = EILConfig().apply(settings, run_dir=str(tmp_path), store_uri=store_uri)
    assert config.num_gpus_per_env_runner == 0.5
    with pytest.raises(InputError, match=r"asks for 3 GPUs .* but 2 exist"):
        EILConfig().apply(settings_of(engine__num_gpus_per_learner=3.0), run_dir=str(tmp_path), store_uri=store_uri)


def test_auto_takes_the_gpu_of_this_machine(
    tmp_path: Path, store_uri: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert EILConfig().apply(settings_of(), run_dir=str(tmp_path), store_uri=store_uri).num_gpus_per_learner == 1.0


def test_a_remote_learner_needs_a_remote_actor() -> None:
    with pytest.raises(InputError, match="needs at least one remote actor"):
        settings_of(engine__num_learners=1)


def test_modules_are_built_from_the_seed_alone(tmp_path: Path, store_uri: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        config = EILConfig().apply(settings_of(seed=seed), run_dir=str(tmp_path), store_uri=store_uri)
        torch.rand(3)
        module = config.get_multi_rl_module_spec().build()
        return torch.cat([parameter.detach().flatten() for parameter in module[SEGMENTER].online.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_pretrained_weights_that_are_not_there_are_refused(tmp_path: Path, store_uri: str) -> None:
    config = EILConfig().apply(
        settings_of(training__pretrained=str(tmp_path)), run_dir=str(tmp_path), store_uri=store_uri
    )
    with pytest.raises(InputError, match=r"online\.safetensors is not in that folder"):
        config.segmenter_spec().build()


def test_an_impossible_combination_names_its_section_without_reciting_it() -> None:
    with pytest.raises(InputError) as error:
        settings_of(engine__mode="asynchronous")
    assert str(error.value).startswith("In the section 'engine' of ")
    assert "num_env_runners is 0" in str(error.value)
    assert "{" not in str(error.value)
