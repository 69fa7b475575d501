"""One small dataset and one segmenter that has learned something from its scribbles, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from algorithms import tiny_ralis
from algorithms.tiny_eil import Bench, build, play, settings_of

from raysseg.algorithms.eil.algorithm import EIL
from raysseg.core.modules import SEGMENTER
from raysseg.data import open_dataset


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight training and four validation scenes."""
    return open_dataset(settings_of().data, tmp_path_factory.mktemp("data")).uri


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, store_uri: str, ray_session: None) -> str:
    """The folder of a segmenter after 40 epochs on the scribbles, sure enough of itself for labels to spread."""
    folder = tmp_path_factory.mktemp("pretrained")
    settings = settings_of(
        training__pretrain_epochs=40, training__teacher_interval="update", eil__stages=0, eil__policy="none"
    )
    algorithm = build(settings, folder, store_uri)
    play(algorithm)
    algorithm.export_module().export(folder / SEGMENTER)
    algorithm.stop()
    return str(folder / SEGMENTER)


@pytest.fixture
def bench(tmp_path: Path, store_uri: str, pretrained: str) -> Callable[..., Bench]:
    """Makes a learner and an actor with changes to the small settings, from the pre-trained segmenter."""

    def make(**changes: Any) -> Bench:
        return Bench(settings_of(training__pretrained=pretrained, **changes), tmp_path, store_uri)

    return make


@pytest.fixture
def trained(tmp_path: Path, store_uri: str, pretrained: str) -> Callable[..., tuple[EIL, list[dict[str, Any]]]]:
    """Trains a variant to its end from the pre-trained segmenter; gives the algorithm and its records."""
    runs = []

    def train(**changes: Any) -> tuple[EIL, list[dict[str, Any]]]:
        settings = settings_of(training__pretrained=pretrained, **changes)
        algorithm = build(settings, tmp_path / f"run-{len(runs)}", store_uri)
        runs.append(algorithm)
        return algorithm, play(algorithm)

    yield train
    for algorithm in runs:
        algorithm.stop()


@pytest.fixture(scope="session")
def game_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The scenes on which labelling is played."""
    return open_dataset(tiny_ralis.settings_of().data, tmp_path_factory.mktemp("game")).uri


@pytest.fixture
def game_bench(tmp_path: Path, game_store: str) -> Callable[..., tiny_ralis.GameBench]:
    """Makes an actor with changes to the small settings."""
    made: list[Path] = []

    def make(**changes: Any) -> tiny_ralis.GameBench:
        made.append(tmp_path / f"game-{len(made)}")
        return tiny_ralis.GameBench(tiny_ralis.settings_of(**changes), made[-1], game_store)

    return make
