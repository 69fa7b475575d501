"""The replay buffer: what is kept, what is drawn, what is dropped, and what a checkpoint brings back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysseg.core import rollout
from raysseg.core.replay import ReplayBuffer
from raysseg.core.seeding import generator


def batch(first: int, count: int, *, segmenter: int = 0, policy: int = 0) -> pa.RecordBatch:
    """Returns transitions numbered `first`, `first + 1`, … in their column `row`."""
    return rollout.transitions(
        {
            "key": [f"image-{first + index}" for index in range(count)],
            "row": np.arange(first, first + count),
            "seed": np.zeros(count, int),
            "stage": np.ones(count, int),
            "step": np.zeros(count, int),
            "labels": [None] * count,
            "action": [b"1234"] * count,
            "next_labels": [b"map"] * count,
            "reward": np.zeros(count),
            "reward_parts": [None] * count,
            "value": [None] * count,
            "terminated": [False] * count,
            "label_version": np.zeros(count, int),
            "segmenter_version": np.full(count, segmenter),
            "policy_version": np.full(count, policy),
        }
    )


def rows(records: pa.RecordBatch) -> list[int]:
    return records.column("row").to_pylist()


def everything(buffer: ReplayBuffer) -> list[int]:
    return sorted(rows(buffer.sample(len(buffer), generator(0))))


def test_the_oldest_batches_go_first_when_it_is_full() -> None:
    buffer = ReplayBuffer(10)
    for first in range(0, 20, 4):
        buffer.add(batch(first, 4))
    assert everything(buffer) == list(range(8, 20)), "10 are asked for, whole batches of 4 are kept"


def test_a_batch_larger_than_the_capacity_stays_until_the_next() -> None:
    buffer = ReplayBuffer(2)
    buffer.add(batch(0, 5))
    assert len(buffer) == 5
    buffer.add(batch(5, 2))
    assert everything(buffer) == [5, 6]


def test_an_empty_batch_changes_nothing() -> None:
    buffer = ReplayBuffer(4)
    buffer.add(batch(0, 3))
    buffer.add(batch(3, 0))
    assert everything(buffer) == [0, 1, 2]


def test_drawing_depends_on_the_generator_alone() -> None:
    buffer, copy = ReplayBuffer(100), ReplayBuffer(100)
    for first in range(0, 60, 6):
        buffer.add(batch(first, 6))
        copy.add(batch(first, 6))
    drawn = buffer.sample(8, generator(3, "replay", 1))
    assert drawn.equals(copy.sample(8, generator(3, "replay", 1)))
    assert rows(drawn) != rows(buffer.sample(8, generator(3, "replay", 2)))
    assert drawn.schema.equals(rollout.TRANSITION_SCHEMA)


def test_drawing_is_uniform_and_without_replacement() -> None:
    buffer = ReplayBuffer(100)
    for first, count in ((0, 1), (1, 9), (10, 5)):
        buffer.add(batch(first, count))
    counts, source = np.zeros(15), np.random.default_rng(0)
    for _ in range(3000):
        picked = rows(buffer.sample(5, source))
        assert len(set(picked)) == 5
        counts[picked] += 1
    # 1000 expected each; the standard deviation of a binomial with p = 1/3 is about 26.
    assert np.abs(counts - 1000).max() < 5 * 26


def test_more_than_there_are_is_drawn_with_replacement() -> None:
    buffer = ReplayBuffer(100)
    buffer.add(batch(0, 3))
    picked = rows(buffer.sample(64, generator(0)))
    assert len(picked) == 64
    assert set(picked) == {0, 1, 2}


def test_an_empty_buffer_refuses_to_draw() -> None:
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(4).sample(1, generator(0))


def test_what_is_older_is_dropped_and_counted() -> None:
    buffer = ReplayBuffer(100)
    buffer.add(batch(0, 3, segmenter=1, policy=5))
    buffer.add(batch(3, 2, segmenter=2, policy=1))
    mixed = pa.Table.from_batches([batch(5, 2, segmenter=2, policy=3), batch(7, 4, segmenter=2, policy=4)])
    buffer.add(mixed.combine_chunks().to_batches()[0])
    assert buffer.drop_older(segmenter_version=2, policy_version=4) == 7
    assert everything(buffer) == [7, 8, 9, 10]
    assert buffer.dropped == 7
    assert buffer.drop_older(segmenter_version=2, policy_version=4) == 0
    assert buffer.drop_older(segmenter_version=3, policy_version=0) == 4
    assert (len(buffer), buffer.dropped) == (0, 11)


def test_a_checkpoint_brings_back_contents_order_and_counts() -> None:
    buffer, restored = ReplayBuffer(10), ReplayBuffer(10)
    for first in range(0, 12, 3):
        buffer.add(batch(first, 3, segmenter=first))
    buffer.drop_older(segmenter_version=4, policy_version=0)
    restored.set_state(buffer.get_state())
    assert (len(restored), restored.dropped, restored.nbytes) == (6, 6, buffer.nbytes)
    assert restored.sample(4, generator(1)).equals(buffer.sample(4, generator(1)))
    for one in (buffer, restored):
        one.add(batch(20, 6))
    assert everything(restored) == everything(buffer)


def test_an_empty_buffer_survives_a_checkpoint() -> None:
    restored = ReplayBuffer(10)
    restored.add(batch(0, 2))
    restored.set_state(ReplayBuffer(10).get_state())
    assert len(restored) == 0


def test_bytes_grow_with_what_it_holds() -> None:
    buffer = ReplayBuffer(100)
    buffer.add(batch(0, 4))
    once = buffer.nbytes
    buffer.add(batch(4, 4))
    assert buffer.nbytes == 2 * once > 0
