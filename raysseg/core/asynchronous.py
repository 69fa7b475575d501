"""The asynchronous actor-learner loop: actors sample ahead, the learner updates, and nobody waits for one actor.

    actors ──rollouts──▶ replay ──records──▶ learner: update k under way, k + 1 queued, its records being made ready
      ▲                                         │
      └──── orders, each with the newest ◀──────┘ weights after update k, into the object store
            weights' reference

    who waits       for what                                  unblocked by
    ------------    --------------------------------------    --------------------------------------------------------
    an actor        an order                                  the driver, as soon as a slot is free; two orders may be
                                                              with an actor, so it does not wait for the driver's turn
    a slot          the update that its rollout paid for      the end of that update, with which its weights are published
                                                              (every `broadcast_interval` updates): the next order in the
                                                              slot carries the newest, and its actor pulls them before it
                                                              samples; also a dropped or a lost rollout
    weights         nobody                                    an actor pulls what is newer than its own, from its node's
                                                              object store, which fetches every object once
    the learner     its next work                             the driver, when rollouts have paid for it; one more work
                                                              order than it does is always with it
    a payment       `rollouts_per_update` new rollouts        any actors; when no rollout comes for longer than usual
                                                              (dead or silent actors), updates go on from replay at the
                                                              pace they had, where the method's plan lets them
    the driver      the first of: a rollout, an update, a     any of them; never one particular actor
                    dead actor that is back

So at most `rollouts_ahead` × living actors rollouts are under way or not yet learned from, which bounds the policy lag
while actors deliver; what is older than `max_policy_lag` is dropped and counted. A rollout that is lost with its actor
is ordered again under the same number, so what is played does not depend on who dies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import ray

from raysseg.core.actor_pool import ActorPool, Answer, Order
from raysseg.core.learner_client import Done, LearnerClient
from raysseg.core.settings import EngineSettings
from raysseg.core.telemetry import Telemetry
from raysseg.core.work import LearnerWork

UPDATES_AHEAD = 2
"""Work orders that may be with a remote learner: the one it does and the next one."""
PATIENCE = 3.0
"""How many usual intervals between rollouts pass before updates go on without new ones, while actors live."""
LEAST_PATIENCE = 0.5
"""Seconds that pass in any case, and all that pass while no actor lives."""
SLOWEST_PACE = 4.0
"""Longest time in seconds between two updates without new rollouts while no actor lives."""


class LearningPlan(Protocol):
    """What a method tells the loop: what actors play and what the learner learns."""

    goes_on_from_replay: bool
    """Whether updates may go on while no rollout comes, or each waits for those that pay for it."""

    def rollout_order(self, number: int, policy_version: int) -> Mapping[str, Any]:
        """Returns the arguments of the actor's `sample` for the n-th rollout of a phase."""

    def keep(self, rollout: pa.RecordBatch) -> None:
        """Takes a rollout that arrived in time."""

    def drop_older(self, policy_version: int) -> int:
        """Drops what is to be learned from of policies before this version; returns how many rollouts have to be played again
        for it, none where updates draw from replay.
        """

    def ready(self) -> bool:
        """Says whether there is anything to learn from."""

    def work(self, update: int) -> LearnerWork:
        """Draws the work of the n-th update of a phase."""

    def learned(self, update: int, records: pa.RecordBatch, numbers: dict[str, Any]) -> None:
        """Takes the numbers of the n-th update of a phase and the records it learned from."""

    def published(self, weights: ray.ObjectRef) -> None:
        """Takes the newest weights, which `weights` gives to orders from now on."""

    def weights(self) -> Mapping[str, tuple[int, list[ray.ObjectRef]]]:
        """Returns the newest weights of every module that actors use."""


Plan = TypeVar("Plan", bound=LearningPlan)


class AsynchronousLoop(Generic[Plan]):
    """One phase of sampling and learning at the same time.

    Args:
        pool: the actors.
        learner: the learners.
        plan: the method's side.
        engine: pace, bounds and patience.
        telemetry: is told what happens.
        updates: number of updates in the phase.
        policy_version: updates that were done before the phase.
        modules: module ids whose weights actors need after an update.
        clock: seconds that only grow.

    Source: design.
    """

    def __init__(
        self,
        *,
        pool: ActorPool,
        learner: LearnerClient,
        plan: Plan,
        engine: EngineSettings,
        telemetry: Telemetry,
        updates: int,
        policy_version: int,
        modules: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self._pool, self._learner = pool, learner
        self._engine, self._telemetry, self._modules = engine, telemetry, modules
        self._updates, self._first_version, self._clock = updates, policy_version, clock
        self._next_number = 0
        self._again: list[int] = []
        self._outstanding: dict[int, Order] = {}
        self._repeated: set[int] = set()
        self._received = 0
        self._granted = 0.0
        self._sent = 0
        self._done = 0
        self._published = 0
        self._records: dict[int, pa.RecordBatch] = {}
        self._drawn: tuple[int, LearnerWork] | None = None
        self._published_at = {policy_version: clock()}
        self._last_arrival = self._last_progress = clock()
        self._interval: float | None = None

    @property
    def done(self) -> int:
        """Updates of this phase that are done."""
        return self._done

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, updates: int, *, should_stop: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """Does the next updates of the phase and returns their numbers.

        Args:
            updates: how many; no work is with the learner when they are done, actors go on.
            should_stop: where it says so, the updates that are with the learner are finished and no more are sent.

        Raises:
            ActorsLostError: all actors died and none came back.
            LearnerLostError: a learner died.
            NonFiniteError: a reward or a loss is not finite.
        """
        target = min(self._done + updates, self._updates)
        numbers: list[dict[str, Any]] = []
        while self._done < target:
            if should_stop():
                target = self._sent
            # What is done frees slots, so it comes before new orders, and new orders before any waiting.
            for done in self._learner.collect():
                numbers.append(self._finish(done))
            if self._done >= target:
                break
            self._give_orders()
            before = self._sent
            self._send_work(target)
            busy = self._learner.is_local and self._sent > before
            for answer in self._pool.receive(0.0 if busy else 0.25, also=self._learner.references):
                self._take(answer)
            self._repeat_overdue()
        return numbers

    def close(self) -> None:
        """Ends the phase: rollouts that are still under way are given up and counted as dropped."""
        self._pool.forget(order.number for order in self._outstanding.values())
        if self._outstanding:
            self._telemetry.dropped(len(self._outstanding))
        self._outstanding.clear()

    # ---- actors -----------------------------------------------------------------------------------------------------

    def _give_orders(self) -> None:
        """Orders rollouts while slots are free and the rest of the phase needs them."""
        per_actor = self._engine.rollouts_ahead
        with_learner = self._received - min(self._received, math.floor(self._done * self._price))
        # Fewer slots than an update takes would keep what has arrived waiting for what is never ordered.
        slots = max(math.ceil(self._price), per_actor * max(1, self._pool.alive))
        while len(self._outstanding) + with_learner < slots:
            needed = math.ceil(self._updates * self._price - self._granted) - self._received - len(self._outstanding)
            actor = self._pool.least_busy(fewer_than=min(2, per_actor)) if needed > 0 else None
            if actor is None:
                break
            number = self._again.pop() if self._again else self._next_number
            self._next_number = max(self._next_number, number + 1)
            self._outstanding[number] = self._send_order(number, actor)
        self._telemetry.orders_in_flight(len(self._outstanding))
        self._telemetry.actors(self._pool.alive, self._pool.total)

    def _send_order(self, number: int, actor: int) -> Order:
        version = self._first_version + self._published
        arguments = self.plan.rollout_order(number, version)
        order = Order(number=self._pool.next_number(), function="sample", arguments=arguments)
        self._pool.send(order, self.plan.weights(), actor)
        return order

    def _take(self, answer: Answer) -> None:
        """Takes a rollout, or orders it again where it was lost."""
        number = next((n for n, order in self._outstanding.items() if order.number == answer.order.number), None)
        if number is None:
            return
        if answer.error is not None:
            raise answer.error
        del self._outstanding[number]
        self._repeated.discard(number)
        if answer.lost:
            self._again.append(number)
            return
        batch: pa.RecordBatch = answer.result
        version = batch.column("policy_version")[0].as_py()
        lag = self._first_version + self._done - version
        now = self._clock()
        if self._engine.max_policy_lag is not None and lag > self._engine.max_policy_lag:
            self._telemetry.dropped(1)
            self._again.append(number)
            return
        self.plan.keep(batch)
        self._received += 1
        gap = now - self._last_arrival
        self._interval = gap if self._interval is None else 0.8 * self._interval + 0.2 * gap
        self._last_arrival = self._last_progress = now
        self._telemetry.rollout(batch.num_rows, lag, now - self._published_at.get(version, now))

    def _repeat_overdue(self) -> None:
        """Gives orders of silent actors to others as well; the order that answers counts, the other is forgotten."""
        for sent in self._pool.overdue():
            number = next((n for n, order in self._outstanding.items() if order is sent.order), None)
            other = self._pool.least_busy(fewer_than=2, avoid=[sent.actor])
            if number is not None and number not in self._repeated and other is not None:
                self._repeated.add(number)
                self._outstanding[number] = self._send_order(number, other)

    # ---- the learner ------------------------------------------------------------------------------------------------

    @property
    def _price(self) -> float:
        return self._engine.rollouts_per_update

    def _is_paid(self) -> bool:
        """Says whether the next update may be sent; grants it where no rollout has come for too long."""
        short = (self._sent + 1) * self._price - self._received - self._granted
        if short <= 1e-9:
            return True
        if not self.plan.goes_on_from_replay or self._interval is None or self._learner.under_way:
            return False
        pace, now = self._interval * self._price, self._clock()
        patience = max(PATIENCE * pace, LEAST_PATIENCE)
        if not self._pool.alive:
            patience, pace = LEAST_PATIENCE, min(pace, SLOWEST_PACE)
        if now - self._last_arrival < patience or now - self._last_progress < pace:
            return False
        self._granted += short
        self._last_progress = now
        return True

    def _send_work(self, target: int) -> None:
        """Sends work while the learner has room for it and rollouts have paid for it."""
        room = 1 if self._learner.is_local else UPDATES_AHEAD
        while self._sent < target and self._learner.under_way < room and self.plan.ready() and self._is_paid():
            if self._engine.max_policy_lag is not None:
                dropped = self.plan.drop_older(self._first_version + self._done - self._engine.max_policy_lag)
                self._received -= dropped
                self._telemetry.dropped(dropped)
                if not self.plan.ready():
                    return
            update = self._sent
            work = self._drawn[1] if self._drawn is not None and self._drawn[0] == update else self.plan.work(update)
            self._drawn = None
            if self._engine.prefetch and not work.minibatches and update + 1 < self._updates:
                self._drawn = (update + 1, self.plan.work(update + 1))
                work.upcoming = self._drawn[1].records
            assert work.records is not None
            self._records[update] = work.records
            last = update + 1 == self._updates
            publish = self._modules if last or (update + 1) % self._engine.broadcast_interval == 0 else ()
            self._learner.send(update, work, publish=publish)
            self._sent += 1
            if self._learner.is_local:
                return

    def _finish(self, done: Done) -> dict[str, Any]:
        """Takes the numbers of an update and frees the slots that it used."""
        numbers = done.numbers
        self.plan.learned(done.number, self._records.pop(done.number), numbers)
        self._done = done.number + 1
        if done.weights is not None:
            self.plan.published(done.weights)
            self._published = self._done
            self._published_at[self._first_version + self._done] = self._clock()
        return numbers

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Returns where the phase stands; rollouts under way are ordered again after a resume."""
        return {
            "next_number": self._next_number,
            "again": sorted([*self._again, *self._outstanding]),
            "received": self._received,
            "granted": self._granted,
            "done": self._done,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_state` gave; actors get all weights anew."""
        self._next_number, self._again = state["next_number"], list(state["again"])
        self._received, self._granted = state["received"], state["granted"]
        self._done = self._sent = self._published = state["done"]
        self._published_at = {self._first_version + self._done: self._clock()}
