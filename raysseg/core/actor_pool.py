"""Orders to actors and answers from them, without ever waiting for one particular actor.

An order is a pure function of its content, so it may go to any actor, and again to another one where its actor died
or fell silent; the first answer counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from raysseg.errors import ActorsLostError

PING_INTERVAL = 0.5
"""Seconds between two questions whether a dead actor is back."""
REVIVAL_SECONDS = 120.0
"""Seconds that work waits for some actor to come back after all of them died."""

Weights = Mapping[str, tuple[int, list[ray.ObjectRef]]]
"""Module id to the number of the newest published weights and where they are; the list keeps Ray from fetching them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the driver asks of some actor: one of its functions with arguments that hold everything it needs."""

    number: int
    function: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of an order.

    Args:
        order: the order.
        result: what the actor's function returned, or None.
        error: what it raised, or None.
        lost: the actor died with the order; its result is gone.
    """

    order: Order
    result: Any = None
    error: Exception | None = None
    lost: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Performance:
    """An order on its way, with the newest weights; called on the actor.

    An exception that left the actor would make RLlib restart it, and the order would fail on the next one as well, so
    it comes back as a value.
    """

    function: str
    arguments: Mapping[str, Any]
    weights: Weights

    def __call__(self, runner: Any) -> tuple[Any, Exception | None]:
        try:
            runner.pull_weights(self.weights)
            return getattr(runner, self.function)(**self.arguments), None
        except Exception as error:
            return None, error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    order: Order
    actor: int
    since: float


class ActorPool:
    """The remote actors of a run and the orders that are with them.

    Args:
        handles: actor number to handle; RLlib made the actors and Ray restarts them.
        stall_seconds: an order without an answer for this long may go to another actor as well.
        on_death: called with the number of orders that were with an actor when it died.
        clock: seconds that only grow.

    Source: design (promises under faults).
    """

    def __init__(
        self,
        handles: Mapping[int, ActorHandle],
        *,
        stall_seconds: float,
        on_death: Callable[[int], None] = lambda lost: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handles = dict(handles)
        self._stall_seconds = stall_seconds
        self._on_death = on_death
        self._clock = clock
        self._sent: dict[ray.ObjectRef, _Sent] = {}
        self._dead: dict[int, float] = {}
        self._pings: dict[ray.ObjectRef, int] = {}
        self._gone_since: float | None = None
        self._last_words = ""
        self._numbers = itertools.count()

    # ---- who is there -----------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Number of actors, the dead ones included."""
        return len(self._handles)

    @property
    def alive(self) -> int:
        """Number of actors that are not known to be dead."""
        return self.total - len(self._dead)

    @property
    def under_way(self) -> int:
        """Number of orders without an answer."""
        return len(self._sent)

    def next_number(self) -> int:
        """Returns a number that no order of this pool has had."""
        return next(self._numbers)

    # ---- one order at a time ----------------------------------------------------------------------------------------

    def least_busy(self, *, fewer_than: int, avoid: Iterable[int] = ()) -> int | None:
        """Returns the living actor with the fewest orders, or None where each has `fewer_than` or more."""
        load = Counter(sent.actor for sent in self._sent.values())
        avoided = set(avoid)
        free = [actor for actor in self._handles if actor not in self._dead and actor not in avoided]
        best = min(free, key=lambda actor: load[actor], default=None)
        return None if best is None or load[best] >= fewer_than else best

    def send(self, order: Order, weights: Weights, actor: int) -> None:
        """Sends an order to an actor; the answer comes from `receive`."""
        message = Performance(order.function, order.arguments, weights)
        ref = self._handles[actor].apply.remote(message)
        self._sent[ref] = _Sent(order=order, actor=actor, since=self._clock())

    def receive(self, timeout: float, *, also: Sequence[ray.ObjectRef] = ()) -> list[Answer]:
        """Returns all answers that are there, waiting at most `timeout` seconds for the first.

        Args:
            timeout: seconds; 0 only looks.
            also: other references whose arrival ends the waiting as well.

        Raises:
            ActorsLostError: all actors have been dead for longer than `REVIVAL_SECONDS`.
        """
        self._ask_the_dead()
        waiting = [*self._sent, *self._pings, *also]
        if not waiting:
            time.sleep(min(timeout, PING_INTERVAL))
            return []
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        answers: list[Answer] = []
        for ref in ready:
            if ref in self._pings:
                self._hear_ping(ref)
            elif ref in self._sent:
                answers.extend(self._open(ref))
        return answers

    def overdue(self) -> list[_Sent]:
        """Returns what has been under way for longer than `stall_seconds`, oldest first."""
        limit = self._clock() - self._stall_seconds
        return sorted((sent for sent in self._sent.values() if sent.since < limit), key=lambda sent: sent.since)

    def forget(self, numbers: Iterable[int]) -> None:
        """Stops waiting for the orders with these numbers; answers that still come are ignored."""
        unwanted = set(numbers)
        self._sent = {ref: sent for ref, sent in self._sent.items() if sent.order.number not in unwanted}

    def _open(self, ref: ray.ObjectRef) -> list[Answer]:
        sent = self._sent.pop(ref)
        try:
            result, error = ray.get(ref)
        except RayError as failure:
            self._last_words = str(failure)
            return [Answer(order=sent.order, lost=True), *self._bury(sent.actor)]
        return [Answer(order=sent.order, result=result, error=error)]

    def _bury(self, actor: int) -> list[Answer]:
        """Notes an actor's death and returns its other orders as lost."""
        theirs = [ref for ref, sent in self._sent.items() if sent.actor == actor]
        lost = [Answer(order=self._sent.pop(ref).order, lost=True) for ref in theirs]
        if actor not in self._dead:
            self._dead[actor] = self._clock()
            self._on_death(1 + len(lost))
        return lost

    def _ask_the_dead(self) -> None:
        """Pings dead actors; an actor that Ray has restarted answers, and works again."""
        now = self._clock()
        for actor, asked in self._dead.items():
            if now - asked >= PING_INTERVAL and actor not in self._pings.values():
                self._dead[actor] = now
                self._pings[self._handles[actor].ping.remote()] = actor
        if self.alive:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since > REVIVAL_SECONDS:
            raise ActorsLostError(
                f"All {self.total} actors are dead and none came back within {REVIVAL_SECONDS:.0f} s; "
                f"the last one said: {' '.join(self._last_words.split())[:500]}"
            )

    def _hear_ping(self, ref: ray.ObjectRef) -> None:
        actor = self._pings.pop(ref)
        try:
            ray.get(ref)
        except ActorDiedError as failure:
            self._last_words = str(failure)
        except RayError:
            return
        else:
            self._dead.pop(actor, None)

    # ---- many orders at once ----------------------------------------------------------------------------------------

    def map(self, function: str, arguments: Sequence[Mapping[str, Any]], weights: Weights) -> list[Any]:
        """Lets some actor do each of the orders and returns the results in the orders' sequence.

        Each actor has one order more than it works on, so it never waits for the driver; lost and overdue orders go
        to other actors.

        Raises:
            Exception: what an actor's function raised.
            ActorsLostError: no actor is left.
        """
        orders = [Order(number=self.next_number(), function=function, arguments=each) for each in arguments]
        results: dict[int, Any] = {}
        wanted = {order.number for order in orders}
        waiting = deque(orders)
        repeated: set[int] = set()
        while len(results) < len(orders):
            while waiting and (actor := self.least_busy(fewer_than=2)) is not None:
                self.send(waiting.popleft(), weights, actor)
            for answer in self.receive(timeout=0.5):
                number = answer.order.number
                if number not in wanted or number in results:
                    continue
                if answer.error is not None:
                    self.forget(wanted)
                    raise answer.error
                if answer.lost:
                    waiting.appendleft(answer.order)
                else:
                    results[number] = answer.result
            for sent in self.overdue():
                number = sent.order.number
                other = self.least_busy(fewer_than=1, avoid=[sent.actor])
                if other is not None and number not in results and number not in repeated:
                    repeated.add(number)
                    self.send(sent.order, weights, other)
        self.forget(wanted)
        return [results[order.number] for order in orders]
