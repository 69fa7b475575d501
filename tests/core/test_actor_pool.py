"""Orders and answers: who gets what, what happens when an actor dies, fails or falls silent."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raysseg.core import actor_pool
from raysseg.core.actor_pool import ActorPool, Order
from raysseg.errors import ActorsLostError


class Runner:
    """An actor that does what RLlib's actors offer: `apply` and `ping`."""

    def __init__(self) -> None:
        self.weights: Any = None

    def apply(self, function: Callable[[Any], Any]) -> Any:
        return function(self)

    def ping(self) -> str:
        return "pong"

    def pull_weights(self, weights: Any) -> None:
        self.weights = weights

    def double(self, *, value: int) -> int:
        return 2 * value

    def process(self, *, value: int) -> int:
        return os.getpid()

    def fail(self, *, value: int) -> int:
        raise ValueError(f"no {value}")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def last_weights(self) -> Any:
        return self.weights

    def first_time(self, *, marker: str, then: str, value: int) -> int:
        """Dies or sleeps the first time that the marker is not there."""
        if value == 0 and not Path(marker).exists():
            Path(marker).touch()
            if then == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return value


Make = Callable[..., ActorPool]


@pytest.fixture
def make_pool(ray_session: None) -> Iterator[Make]:
    # Actors cannot import this file, so its class travels by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = []

    def make(count: int = 2, restarts: int = -1, **options: Any) -> ActorPool:
        remote = ray.remote(num_cpus=0, max_restarts=restarts)(Runner)
        handles = {number: remote.remote() for number in range(1, count + 1)}
        made.extend(handles.values())
        ray.get([handle.ping.remote() for handle in handles.values()])
        return ActorPool(handles, **{"stall_seconds": 60.0, **options})

    yield make
    for handle in made:
        ray.kill(handle)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_results_come_in_the_orders_sequence_whoever_gave_them(make_pool: Make) -> None:
    pool = make_pool()
    orders = [{"value": value} for value in range(20)]
    assert pool.map("double", orders, {}) == [2 * value for value in range(20)]
    assert len(set(pool.map("process", orders, {}))) == 2
    assert pool.under_way == 0


def test_the_weights_come_with_the_order(make_pool: Make) -> None:
    pool, where = make_pool(count=1), ray.put("new")
    assert pool.map("last_weights", [{}], {"segmenter": (3, [where])})[0]["segmenter"][0] == 3


def test_what_an_actor_raises_reaches_the_driver_and_the_actor_goes_on(make_pool: Make) -> None:
    pool = make_pool(count=1)
    before = pool.map("process", [{"value": 0}], {})
    with pytest.raises(ValueError, match="no 1"):
        pool.map("fail", [{"value": 1}, {"value": 2}], {})
    assert pool.map("process", [{"value": 0}], {}) == before
    assert pool.map("double", [{"value": 4}], {}) == [8], "an answer of the failed orders is not taken for this one"


def test_orders_of_a_dead_actor_go_to_others_and_are_counted(make_pool: Make, tmp_path: Path) -> None:
    lost: list[int] = []
    pool = make_pool(on_death=lost.append)
    orders = [{"marker": str(tmp_path / "died"), "then": "die", "value": value} for value in range(6)]
    assert pool.map("first_time", orders, {}) == list(range(6))
    assert lost == [2], "the order that killed it and the one behind it"
    deadline = time.monotonic() + 30
    while pool.alive < 2 and time.monotonic() < deadline:
        pool.receive(0.2)
    assert pool.alive == pool.total == 2, "Ray restarts the actor and a ping finds it"


def test_a_silent_actor_holds_nobody(make_pool: Make, tmp_path: Path) -> None:
    pool = make_pool(stall_seconds=0.5)
    orders = [{"marker": str(tmp_path / "silent"), "then": "sleep", "value": value} for value in range(6)]
    start = time.monotonic()
    assert pool.map("first_time", orders, {}) == list(range(6))
    assert time.monotonic() - start < 45, "the sleep of 60 s was not waited for"
    assert pool.alive == 2


def test_when_all_actors_are_gone_the_driver_says_so(make_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "REVIVAL_SECONDS", 1.0)
    pool = make_pool(restarts=0)
    with pytest.raises(ActorsLostError, match="All 2 actors are dead"):
        pool.map("die", [{}] * 4, {})
    assert pool.alive == 0


def test_the_least_busy_living_actor_is_next(make_pool: Make, tmp_path: Path) -> None:
    pool = make_pool()
    sleep = {"marker": str(tmp_path / "silent"), "then": "sleep", "value": 0}
    pool.send(Order(number=pool.next_number(), function="first_time", arguments=sleep), {}, 1)
    assert pool.least_busy(fewer_than=2) == 2
    assert pool.least_busy(fewer_than=2, avoid=[2]) == 1
    assert pool.least_busy(fewer_than=1, avoid=[2]) is None
    number = pool.next_number()
    pool.send(Order(number=number, function="double", arguments={"value": 1}), {}, 2)
    answers = []
    while not answers:
        answers = pool.receive(1.0)
    assert [(answer.order.number, answer.result) for answer in answers] == [(number, 2)]
