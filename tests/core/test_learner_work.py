"""Work orders: what the learner refuses, and that one learner gets all of it."""

from __future__ import annotations

import numpy as np
import pytest

from raysseg.core import rollout
from raysseg.core.work import LearnerWork


def test_work_needs_a_kind_and_records() -> None:
    records = rollout.order(np.arange(2), np.arange(2))
    LearnerWork(kind="segmenter", records=records).validate()
    for incomplete in (LearnerWork(records=records), LearnerWork(kind="segmenter")):
        with pytest.raises(ValueError, match="needs a kind and records"):
            incomplete.validate()


def test_one_learner_gets_everything_and_two_are_refused() -> None:
    work = LearnerWork(kind="segmenter", records=rollout.order(np.arange(2), np.arange(2)), context={"version": 3})
    ((part, extra),) = work.shard(1)
    assert part is work
    assert extra == {}
    with pytest.raises(ValueError, match="2 learners"):
        work.shard(2)
