"""Work orders: what the learner refuses, and which rows of every minibatch go to which learner."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from raysseg.core import rollout
from raysseg.core.work import LearnerWork, cut_minibatches, share_of


def test_work_needs_a_kind_and_records() -> None:
    records = rollout.order(np.arange(2), np.arange(2))
    LearnerWork(kind="segmenter", records=records).validate()
    for incomplete in (LearnerWork(records=records), LearnerWork(kind="segmenter")):
        with pytest.raises(ValueError, match="needs a kind and records"):
            incomplete.validate()


def test_work_must_hold_the_records_that_its_minibatches_say() -> None:
    records = rollout.order(np.arange(5), np.arange(5))
    LearnerWork(kind="segmenter", records=records, minibatches=(3, 2)).validate()
    for sizes in ((3, 3), (5, 0), (4,)):
        with pytest.raises(ValueError, match="has 5 records"):
            LearnerWork(kind="segmenter", records=records, minibatches=sizes).validate()


def test_minibatches_never_cross_an_epoch() -> None:
    assert cut_minibatches(16, 3, [8, 16]) == (3, 3, 2, 3, 3, 2)
    assert cut_minibatches(16, 3) == (3, 3, 3, 3, 3, 1)
    assert cut_minibatches(4, 8, [4]) == (4,)
    assert cut_minibatches(0, 8) == ()


def test_one_learner_gets_everything() -> None:
    work = LearnerWork(kind="segmenter", records=rollout.order(np.arange(2), np.arange(2)), context={"version": 3})
    ((part, extra),) = work.shard(1)
    assert part is work
    assert extra == {}
    (minibatch,) = work.own_minibatches()
    assert minibatch.records.equals(work.records)
    assert not minibatch.share.is_split


@pytest.mark.parametrize("world", [2, 3])
def test_learners_get_their_rows_of_every_minibatch(world: int) -> None:
    sizes = (5, 1, 4, 2)
    records = rollout.order(np.arange(12), np.arange(100, 112))
    work = LearnerWork(kind="segmenter", records=records, minibatches=sizes, context={"version": 3}, upcoming=records)
    parts = [part for part, _ in work.shard(world)]
    seen = []
    for part in parts:
        part.validate()
        assert (part.kind, part.context, part.minibatches) == (work.kind, work.context, sizes)
        seen.append(part.own_minibatches())
    first = 0
    for number, total in enumerate(sizes):
        rows = list(range(first, first + total))
        mine = [one[number].records.column("row").to_pylist() for one in seen]
        shares = [one[number].share for one in seen]
        first += total
        assert {one[number].stop for one in seen} == {first}
        if total < world:
            assert mine == [rows] * world
            assert not any(share.is_split for share in shares)
        else:
            assert list(itertools.chain(*mine)) == rows
            assert max(map(len, mine)) - min(map(len, mine)) <= 1
            assert all(share.is_split and share.total == total for share in shares)
            assert [rows[share.start : share.stop] for share in shares] == mine
    upcoming = [part.upcoming.column("row").to_pylist() for part in parts]
    assert list(itertools.chain(*upcoming)) == list(range(12))


def test_a_part_travels_without_the_other_parts() -> None:
    records = rollout.order(np.arange(1000), np.arange(1000))
    (part, _), _ = LearnerWork(kind="operators", records=records).shard(2)
    assert len(pickle.dumps(part.records)) < 0.6 * len(pickle.dumps(records))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_pieces_cover_a_share_equally_often_on_all_learners(total: int, parts: int, world: int) -> None:
    shares = [share_of(total, part, world) for part in range(world)]
    pieces = [share.pieces(parts, world) for share in shares]
    assert len({len(one) for one in pieces}) == 1
    assert 1 <= len(pieces[0]) <= parts
    for share, own in zip(shares, pieces, strict=True):
        assert [row for piece in own for row in range(piece.start, piece.stop)] == list(range(share.start, share.stop))
        assert {piece.total for piece in own} == {total}
    together = [sum(own[number].count for own in pieces) for number in range(len(pieces[0]))]
    assert min(together) > 1 or total == 1, "batch normalisation needs two rows"
