"""Reading ahead: the same results with and without it, nothing stale, nothing lost, and errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from algorithms.tiny_eil import Bench, settings_of

from raysseg.core import rollout
from raysseg.core.learner import Preparation
from raysseg.core.prefetch import Prefetcher, tensors_of
from raysseg.core.work import LearnerWork
from raysseg.data.label_store import LabelRow
from raysseg.errors import InputError

CPU = torch.device("cpu")


class Recorder:
    """A `prepare` that says what it was asked for, in which thread, and never runs twice at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: list[str] = []
        self.running = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, job: int) -> torch.Tensor:
        self.running += 1
        assert self.running == 1
        self.gate.wait(10)
        self.asked.append(job)
        self.threads.append(threading.current_thread().name)
        if job < 0:
            raise InputError(f"job {job} cannot be read")
        self.running -= 1
        return torch.tensor(float(job))


@pytest.mark.parametrize("depth", [0, 1, 3, 10])
def test_jobs_come_in_order_each_prepared_once(depth: int) -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, depth, CPU)
    assert [int(value) for value in prefetch.each(range(6))] == list(range(6))
    assert prepare.asked == list(range(6))
    here = threading.current_thread().name
    assert {name == here for name in prepare.threads[1:]} == {depth == 0}
    prefetch.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_no_more_is_made_ready_than_was_asked_for(depth: int) -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, depth, CPU)
    jobs = prefetch.each(range(6))
    next(jobs)
    prefetch.close()
    assert prepare.asked == list(range(len(prepare.asked)))
    assert len(prepare.asked) <= 1 + depth


def test_the_next_job_is_made_ready_while_one_is_in_use() -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, 1, CPU)
    jobs = prefetch.each([1, 2])
    next(jobs)
    done = threading.Event()
    prefetch._begun[0][1].add_done_callback(lambda _: done.set())
    assert done.wait(10), "the second job needs nobody to ask for it"
    assert prepare.asked == [1, 2]
    assert int(next(jobs)) == 2
    prefetch.close()


def test_what_was_begun_for_another_job_is_never_used() -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, 1, CPU)
    prefetch.begin(5)
    assert int(prefetch.take(7)) == 7
    assert int(prefetch.take(5)) == 5, "what was dropped is prepared again"
    assert prepare.asked[-2:] == [7, 5]
    prefetch.begin(8)
    assert int(prefetch.take(8)) == 8
    assert prepare.asked.count(8) == 1, "what was begun for this very job is used"
    prefetch.close()


def test_an_error_reaches_the_caller_and_the_next_job_is_unharmed() -> None:
    for depth in (0, 2):
        prepare = Recorder()
        prefetch = Prefetcher(prepare, depth, CPU)
        jobs = prefetch.each([1, -2, 3])
        assert int(next(jobs)) == 1
        with pytest.raises(InputError, match="job -2 cannot be read"):
            next(jobs)
        prepare.running = 0
        assert int(prefetch.take(3)) == 3
        prefetch.close()


def test_a_caller_that_stops_half_way_leaves_nothing_behind() -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, 2, CPU)
    jobs = prefetch.each(range(5))
    next(jobs)
    jobs.close()
    assert [int(value) for value in prefetch.each([7, 8])] == [7, 8]
    prefetch.close()


def test_waiting_is_counted_and_reading_apart_is_not_beside_it() -> None:
    prepare = Recorder()
    prefetch = Prefetcher(prepare, 1, CPU)
    prepare.gate.clear()
    prefetch.begin(1)
    release = threading.Timer(0.2, prepare.gate.set)
    release.start()
    assert prefetch.now(lambda: prepare.running) == 0, "what runs in the background has ended"
    assert prefetch.waited == 0.0
    prefetch.take(1)
    assert prefetch.waited > 0.0
    prefetch.close()


def test_all_tensors_of_a_preparation_are_found() -> None:
    one, two, three = (torch.tensor(float(number)) for number in range(3))
    nested = {"a": [one, (two, None)], "b": Preparation(kind="x", records=None, version=three)}  # type: ignore[arg-type]
    found = list(tensors_of(nested))
    assert len(found) == 3
    assert all(any(tensor is other for other in found) for tensor in (one, two, three))


# ---- in the learner ---------------------------------------------------------------------------------------------------

MakeBench = Callable[..., Bench]


def segmenter_numbers(bench: Bench) -> tuple[Any, torch.Tensor]:
    records = rollout.order(np.arange(8), np.arange(8))
    numbers = [bench.train_segmenter(records, first_update=update) for update in (0, 2)]
    return numbers, torch.cat([one.detach().flatten() for one in bench.learner._segmenter_module().parameters()])


def test_the_segmenter_learns_the_same_with_and_without(bench: MakeBench) -> None:
    plain, ahead = (segmenter_numbers(bench(engine__prefetch=depth)) for depth in (0, 3))
    assert plain[0] == ahead[0]
    assert torch.equal(plain[1], ahead[1])


def operators(tmp_path: Path, store_uri: str, depth: int) -> Bench:
    return Bench(settings_of(engine__prefetch=depth, eil__operators__searcher_bias=-1.0), tmp_path, store_uri)


def learn(bench: Bench, orders: list[tuple[pa.RecordBatch, pa.RecordBatch | None]]) -> list[Any]:
    answers = []
    for update, (records, upcoming) in enumerate(orders):
        context = {"update": update, "total_updates": 10, "seed": 0}
        work = LearnerWork(kind="operators", records=records, upcoming=upcoming, context=context)
        numbers, _ = bench.learner.update_and_publish(work, ())
        numbers.pop("timing")
        answers.append(numbers)
    return answers


def counted(bench: Bench) -> list[pa.RecordBatch]:
    """Lets the learner note which transitions it reads."""
    read, prepare = [], bench.learner.prepare_operators

    def note(preparation: Preparation) -> Any:
        read.append(preparation.records)
        return prepare(preparation)

    bench.learner.prepare_operators = note
    return read


def test_announced_transitions_are_read_once_and_give_the_same(tmp_path: Path, store_uri: str) -> None:
    answers = []
    for depth in (0, 1):
        bench = operators(tmp_path, store_uri, depth)
        batches = [bench.sample(seed=seed) for seed in range(3)]
        read = counted(bench)
        copies = [rollout.from_bytes(rollout.to_bytes([one]))[0] for one in batches]
        answers.append(learn(bench, list(zip(batches, [*copies[1:], None], strict=True))))
        assert len(read) == 3
    assert answers[0] == answers[1]


def test_an_announcement_that_was_wrong_costs_nothing_but_time(tmp_path: Path, store_uri: str) -> None:
    plain, misled = (operators(tmp_path, store_uri, depth) for depth in (0, 1))
    batches = [plain.sample(seed=seed) for seed in range(3)]
    version = batches[1].schema.get_field_index("label_version")
    other_version = batches[1].set_column(version, batches[1].schema.field(version), pa.array([1] * 4, pa.int32()))
    truth = plain.learner.workspace.train.labels(torch.arange(8), -1).numpy()
    keys = plain.learner.workspace.train.keys
    plain.learner.workspace.label_store.write(
        1, [LabelRow(key=key, label=one) for key, one in zip(keys, truth, strict=True)]
    )
    expected = learn(plain, [(batches[0], None), (batches[1], None)])
    for wrong in (batches[2], other_version, batches[1].slice(0, 3)):
        again = operators(tmp_path, store_uri, 1)
        assert learn(again, [(batches[0], wrong), (batches[1], None)]) == expected
    work = LearnerWork(kind="operators", records=batches[0], upcoming=batches[1])
    work.context = {"update": 0, "total_updates": 10, "seed": 0}
    misled.learner.update_and_publish(work, ())
    segmenter = misled.train_segmenter(rollout.order(np.arange(8), np.arange(8)))
    fresh = operators(tmp_path, store_uri, 0)
    assert segmenter == fresh.train_segmenter(rollout.order(np.arange(8), np.arange(8)))


def test_a_map_that_cannot_be_read_stops_the_update_that_needs_it(tmp_path: Path, store_uri: str) -> None:
    bench = operators(tmp_path, store_uri, 1)
    good, bad = bench.sample(seed=0), bench.sample(seed=1)
    column = bad.schema.get_field_index("next_labels")
    torn = [one[:-3] for one in bad.column(column).to_pylist()]
    bad = bad.set_column(column, bad.schema.field(column), pa.array(torn, pa.binary()))
    expected = learn(operators(tmp_path, store_uri, 0), [(good, None)])
    assert learn(bench, [(good, bad)]) == expected, "an announcement is not needed yet"
    with pytest.raises(InputError, match="damaged"):
        learn(bench, [(bad, None)])
