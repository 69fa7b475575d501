"""The asynchronous loop in simulated time: bounds, pace, drops, deaths, silence and resuming."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest

from raysseg.core.actor_pool import Answer, Order
from raysseg.core.asynchronous import AsynchronousLoop
from raysseg.core.learner_client import Done
from raysseg.core.settings import EngineSettings
from raysseg.core.telemetry import Telemetry
from raysseg.core.work import LearnerWork


class World:
    """Actors and a remote learner that take a fixed time for everything, and a clock that only they move."""

    def __init__(self, *, actors: int = 2, rollout: float = 1.0, update: float = 0.5) -> None:
        self.now = 0.0
        self.rollout_seconds, self.update_seconds = rollout, update
        self.queues: dict[int, list[Order]] = {number: [] for number in range(1, actors + 1)}
        self.free_at = dict.fromkeys(self.queues, 0.0)
        self.finish: dict[int, float] = {}
        self.dead: set[int] = set()
        self.silent: set[int] = set()
        self.sent_to: list[tuple[int, int]] = []
        self.answers: list[Answer] = []
        self.work: list[tuple[int, float, Any]] = []
        self.learner_free = 0.0
        self.idle = 0.0
        self.numbers = itertools.count()

    def clock(self) -> float:
        return self.now

    # ---- what the loop asks of the pool

    @property
    def total(self) -> int:
        return len(self.queues)

    @property
    def alive(self) -> int:
        return self.total - len(self.dead)

    def next_number(self) -> int:
        return next(self.numbers)

    def least_busy(self, *, fewer_than: int, avoid: Any = ()) -> int | None:
        free = [one for one in self.queues if one not in self.dead and one not in set(avoid)]
        best = min(free, key=lambda one: len(self.queues[one]), default=None)
        return None if best is None or len(self.queues[best]) >= fewer_than else best

    def send(self, order: Order, weights: Any, actor: int) -> None:
        self.queues[actor].append(order)
        self.sent_to.append((actor, order.number))
        start = max(self.now, self.free_at[actor])
        self.free_at[actor] = self.finish[order.number] = start + self.rollout_seconds

    def overdue(self) -> list[Any]:
        return [
            Sent(order=order, actor=actor)
            for actor in sorted(self.silent)
            for order in self.queues[actor]
            if self.finish[order.number] + 5 < self.now
        ]

    def forget(self, numbers: Any) -> None:
        unwanted = set(numbers)
        for actor, queue in self.queues.items():
            self.queues[actor] = [order for order in queue if order.number not in unwanted]

    def receive(self, timeout: float, *, also: Any = ()) -> list[Answer]:
        """Moves the clock to the next thing that happens, or by the timeout."""
        ends = [self.finish[queue[0].number] for one, queue in self.queues.items() if queue and one not in self.silent]
        ends += [end for _, end, _ in self.work]
        step = min([end for end in ends if end > self.now], default=self.now + timeout)
        self.now = max(self.now, min(step, self.now + timeout)) if timeout else self.now
        answers, self.answers = self.answers, []
        for actor, queue in self.queues.items():
            while actor not in self.silent and queue and self.finish[queue[0].number] <= self.now + 1e-9:
                order = queue.pop(0)
                answers.append(Answer(order=order, result=rollout_of(order.arguments)))
        return answers

    def kill(self, actor: int) -> None:
        self.dead.add(actor)
        self.answers += [Answer(order=order, lost=True) for order in self.queues[actor]]
        self.queues[actor].clear()

    # ---- what the loop asks of the learner

    is_local = False

    @property
    def under_way(self) -> int:
        return len(self.work)

    @property
    def references(self) -> list[Any]:
        return []

    def learn(self, number: int, work: LearnerWork, *, publish: tuple[str, ...] = ()) -> None:
        start = max(self.now, self.learner_free)
        self.idle += start - self.learner_free if number else 0.0
        self.learner_free = start + self.update_seconds
        self.work.append((number, self.learner_free, "weights" if publish else None))

    def collect(self, timeout: float = 0.0) -> list[Done]:
        done = [one for one in self.work if one[1] <= self.now + 1e-9]
        self.work = self.work[len(done) :]
        return [Done(number=number, numbers={"loss": 0.0}, weights=weights) for number, _, weights in done]


@dataclasses.dataclass
class Sent:
    order: Order
    actor: int


class Learner:
    """The world's learner under the client's names."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.send, self.collect, self.is_local = world.learn, world.collect, False

    @property
    def under_way(self) -> int:
        return self.world.under_way

    @property
    def references(self) -> list[Any]:
        return []


def rollout_of(arguments: Mapping[str, Any]) -> pa.RecordBatch:
    values = {"number": [arguments["number"]], "policy_version": [arguments["policy_version"]]}
    return pa.RecordBatch.from_pydict(values)


class Plan:
    """Keeps what it is given; counts what the loop asks for."""

    goes_on_from_replay = True

    def __init__(self) -> None:
        self.kept: list[pa.RecordBatch] = []
        self.ordered: list[tuple[int, int]] = []
        self.lags: list[int] = []
        self.upcoming: list[Any] = []
        self.oldest = 0
        self.publications = 0
        self.version = 0

    def rollout_order(self, number: int, policy_version: int) -> dict[str, int]:
        self.ordered.append((number, policy_version))
        return {"number": number, "policy_version": policy_version}

    def keep(self, rollout: pa.RecordBatch) -> None:
        self.kept.append(rollout)
        self.lags.append(self.version - rollout.column("policy_version")[0].as_py())

    def drop_older(self, policy_version: int) -> int:
        self.oldest = policy_version
        return 0

    def ready(self) -> bool:
        return bool(self.kept)

    def work(self, update: int) -> LearnerWork:
        work = LearnerWork(kind="operators", records=self.kept[-1], context={"update": update})
        self.upcoming.append(work)
        return work

    def learned(self, update: int, records: pa.RecordBatch, numbers: dict[str, Any]) -> None:
        self.version += 1

    def published(self, weights: Any) -> None:
        self.publications += 1

    def weights(self) -> dict[str, Any]:
        return {}

    def numbers(self) -> list[int]:
        return [batch.column("number")[0].as_py() for batch in self.kept]


def make(world: World, updates: int = 40, **engine: Any) -> AsynchronousLoop[Plan]:
    settings = EngineSettings(mode="asynchronous", num_env_runners=world.total, **engine)
    return AsynchronousLoop(
        pool=world,  # type: ignore[arg-type]
        learner=Learner(world),  # type: ignore[arg-type]
        plan=Plan(),
        engine=settings,
        telemetry=Telemetry(clock=world.clock),
        updates=updates,
        policy_version=0,
        modules=("operators",),
        clock=world.clock,
    )


def test_every_rollout_is_played_once_and_pays_for_one_update() -> None:
    world = World()
    loop = make(world)
    assert len(loop.run(40)) == 40
    assert sorted(loop.plan.numbers()) == list(range(40))
    assert loop.plan.publications == 40


def test_the_learner_is_busy_when_actors_keep_up() -> None:
    world = World(actors=4, rollout=1.0, update=0.5)
    make(world, updates=200).run(200)
    assert world.idle / world.learner_free < 0.05


def test_one_actor_that_is_just_fast_enough_keeps_the_learner_busy() -> None:
    world = World(actors=1, rollout=0.4, update=0.5)
    make(world, updates=100).run(100)
    assert world.idle / world.learner_free < 0.05


def test_slots_bound_what_is_ahead_and_so_the_lag() -> None:
    for ahead in (1, 2, 4):
        world = World(actors=3, rollout=0.1, update=1.0)
        loop = make(world, updates=30, rollouts_ahead=ahead)
        most = 0
        for _ in range(30):
            loop.run(1)
            in_hand = len(loop.plan.kept) - loop.done + sum(map(len, world.queues.values()))
            most = max(most, in_hand)
        assert most <= 3 * ahead
        assert max(loop.plan.lags) <= 3 * ahead


def test_rollouts_that_are_too_old_are_dropped_counted_and_played_again() -> None:
    world = World(actors=4, rollout=3.0, update=0.5)
    loop = make(world, updates=20, max_policy_lag=1, rollouts_ahead=1)
    loop.run(20)
    assert max(loop.plan.lags) <= 1
    dropped = loop._telemetry.get_state()["rollouts_dropped"]
    assert dropped > 0
    assert len(loop.plan.ordered) - len(loop.plan.kept) >= dropped
    assert sorted(set(loop.plan.numbers())) == list(range(20))


def test_several_rollouts_can_pay_for_one_update_and_one_for_several() -> None:
    for price, rollouts in ((2.0, 20), (0.5, 5), (1.5, 15)):
        loop = make(World(), updates=10, rollouts_per_update=price)
        loop.run(10)
        assert len(loop.plan.kept) == rollouts


def test_weights_are_published_every_few_updates() -> None:
    loop = make(World(), updates=10, broadcast_interval=4)
    loop.run(10)
    assert loop.plan.publications == 3, "after 4, 8 and the last"
    assert {version for _, version in loop.plan.ordered} <= {0, 4, 8}


def test_rare_publications_hold_nobody() -> None:
    seconds = {}
    for interval in (1, 8):
        world = World(actors=1, rollout=1.0, update=0.5)
        make(world, updates=40, broadcast_interval=interval, rollouts_ahead=2).run(40)
        seconds[interval] = world.now
    assert seconds[8] <= 1.05 * seconds[1]


def test_the_next_records_travel_with_the_work() -> None:
    loop = make(World(), updates=6)
    loop.run(6)
    first, second = loop.plan.upcoming[0], loop.plan.upcoming[1]
    assert first.upcoming is second.records
    assert Counter(work.context["update"] for work in loop.plan.upcoming) == Counter(range(6)), "each is drawn once"
    without = make(World(), updates=6, prefetch=0)
    without.run(6)
    assert all(work.upcoming is None for work in without.plan.upcoming)


def test_orders_of_a_dead_actor_are_given_again() -> None:
    world = World(actors=2)
    loop = make(world)
    loop.run(5)
    world.kill(1)
    loop.run(35)
    assert sorted(loop.plan.numbers()) == list(range(40))
    assert all(actor == 2 for actor, _ in world.sent_to[-20:])


def test_the_learner_goes_on_when_all_actors_are_dead() -> None:
    world = World(actors=2, rollout=20.0, update=0.5)
    loop = make(world)
    loop.run(4)
    for actor in (1, 2):
        world.kill(actor)
    before = world.now
    loop.run(1)
    assert world.now - before < 5
    loop.run(8)
    assert world.now - before < 9 * 5, "and at no less than the slowest pace"


def test_where_rollouts_are_part_of_the_method_none_is_granted() -> None:
    world = World(actors=4, rollout=60.0, update=0.5)
    loop = make(world, updates=12, rollouts_ahead=1)
    loop.plan.goes_on_from_replay = False
    loop.run(12)
    assert sorted(loop.plan.numbers()) == list(range(12))


@pytest.mark.parametrize(("actors", "ahead", "price"), [(1, 2, 4.0), (1, 1, 2.0), (2, 1, 4.0)])
def test_an_update_that_takes_more_rollouts_than_there_are_slots_is_paid_all_the_same(
    actors: int, ahead: int, price: float
) -> None:
    world = World(actors=actors)
    loop = make(world, updates=3, rollouts_ahead=ahead, rollouts_per_update=price)
    loop.plan.goes_on_from_replay = False
    assert len(loop.run(3, should_stop=lambda: world.now > 100)) == 3
    assert sorted(loop.plan.numbers()) == list(range(3 * int(price)))


def test_a_silent_actor_holds_nobody() -> None:
    world = World(actors=3)
    loop = make(world)
    loop.run(6)
    world.silent.add(2)
    before = world.now
    loop.run(34)
    assert world.now - before < 34
    repeated = {number for number, count in Counter(n for n, _ in loop.plan.ordered).items() if count > 1}
    assert repeated
    assert len(loop.plan.numbers()) == len(set(loop.plan.numbers())), "the order that answers counts once"


def test_what_an_actor_raises_stops_the_loop() -> None:
    world = World()
    loop = make(world)
    loop.run(3)
    order = next(iter(loop._outstanding.values()))
    world.answers.append(Answer(order=order, error=ValueError("not finite")))
    with pytest.raises(ValueError, match="not finite"):
        loop.run(3)


def test_a_request_to_stop_finishes_what_the_learner_has() -> None:
    world = World()
    loop = make(world)
    numbers = loop.run(40, should_stop=lambda: loop.done >= 7)
    assert 7 <= len(numbers) <= 9
    assert world.under_way == 0


def test_a_resumed_phase_plays_what_was_lost_and_no_more() -> None:
    world = World()
    loop = make(world)
    loop.run(15)
    state = loop.get_state()
    resumed = make(World())
    resumed.set_state(state)
    resumed.plan.kept = list(loop.plan.kept)
    resumed.run(25)
    assert resumed.done == 40
    assert sorted(resumed.plan.numbers()) == list(range(40))


def test_what_is_under_way_at_the_end_is_given_up_and_counted() -> None:
    world = World(actors=4)
    loop = make(world, updates=40)
    loop.run(10)
    under_way = len(loop._outstanding)
    assert under_way > 0
    loop.close()
    assert loop._telemetry.get_state()["rollouts_dropped"] == under_way
    assert not any(world.queues.values())
