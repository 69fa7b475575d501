"""A small dataset, and a learner on it without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from algorithms.tiny_eil import Bench, settings_of

from raysseg.data import open_dataset


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight training and four validation scenes."""
    return open_dataset(settings_of().data, tmp_path_factory.mktemp("data")).uri


@pytest.fixture
def bench(tmp_path: Path, store_uri: str) -> Callable[..., Bench]:
    """Makes a learner and an actor of a small segmenter, untrained, with changes to its settings."""
    return lambda **changes: Bench(settings_of(**{"eil__policy": "none", **changes}), tmp_path, store_uri)
