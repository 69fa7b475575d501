"""The machines that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.machines import Machines, start, why_not


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two hosts and a laptop, running; skips where the machine does not allow it."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no hosts to log in to: {reason}")
    with start(tmp_path_factory.mktemp("machines")) as running:
        yield running
