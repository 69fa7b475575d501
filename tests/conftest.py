"""What all tests share: one thread for torch, one Ray per worker process, and the real data where it is to be had."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Ray's workers are nice to all other processes, here the other worker of the tests, and would wait for it for minutes.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray reads it in this form

OBJECT_STORE_BYTES = 2 << 30
"""Of each worker process; Ray would take a third of the memory for each."""


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Frees what a file of tests held: two workers and their Ray actors have to fit into one machine."""
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; skips the test where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("RAYSSEG_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"the real data is not here (looked for the folder {path.name} beside the checkout)")
    return path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests of this worker process."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        ignore_reinit_error=True,
    )
    yield
    ray.shutdown()
