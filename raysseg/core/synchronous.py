"""The synchronous actor-learner loop: all actors play one rollout each, then the learner updates, in turn.

    driver ── orders ──▶ actors ── rollouts ──▶ replay ──▶ learner ── weights ──▶ the next orders

The actors wait for the learner and the learner for the slowest actor. In return a run is a pure function of its seed
and of the number of actors, and one remote actor with one remote learner gives the numbers of serial mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol

import pyarrow as pa

from raysseg.core.asynchronous import Plan
from raysseg.core.settings import EngineSettings
from raysseg.core.telemetry import Telemetry
from raysseg.core.work import LearnerWork


class Engine(Protocol):
    """What the loop needs of the driver."""

    telemetry: Telemetry
    policy_version: int

    @property
    def num_actors(self) -> int:
        """Number of processes that take orders."""

    def map_runners(self, function: str, orders: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Gives every order to some actor and returns the results in the orders' sequence."""

    def learn(self, work: LearnerWork) -> dict[str, Any]:
        """Lets the learners do one work order."""

    def publish(self, *modules: str) -> None:
        """Puts the modules' weights where actors pull them."""


class SynchronousLoop(Generic[Plan]):
    """One phase of sampling and learning in turn.

    Args:
        driver: actors, learners and versions.
        plan: the method's side.
        engine: the largest policy lag of what is learned from.
        updates: number of updates in the phase.
        done: how many of them are done.
        modules: module ids whose weights actors need after an update.

    Source: design.
    """

    def __init__(
        self, driver: Engine, plan: Plan, engine: EngineSettings, *, updates: int, done: int, modules: tuple[str, ...]
    ) -> None:
        self.plan = plan
        self.done = done
        self._driver, self._engine, self._updates, self._modules = driver, engine, updates, modules

    def run(self, updates: int, *, should_stop: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """Does the next updates of the phase and returns their numbers, fewer but one where `should_stop` says so."""
        numbers: list[dict[str, Any]] = []
        driver, lag = self._driver, self._engine.max_policy_lag
        while len(numbers) < updates and self.done < self._updates and not (numbers and should_stop()):
            first = self.done * driver.num_actors
            orders = [
                self.plan.rollout_order(number, driver.policy_version)
                for number in range(first, first + driver.num_actors)
            ]
            rollouts: list[pa.RecordBatch] = driver.map_runners("sample", orders)
            for rollout in rollouts:
                self.plan.keep(rollout)
                driver.telemetry.rollout(rollout.num_rows, 0, 0.0)
            if lag is not None:
                self.plan.drop_older(driver.policy_version - lag)
            work = self.plan.work(self.done)
            learned = driver.learn(work)
            assert work.records is not None
            self.plan.learned(self.done, work.records, learned)
            driver.publish(*self._modules)
            self.done += 1
            numbers.append(learned)
        return numbers

    def close(self) -> None:
        """Ends the phase; nothing is under way."""

    def get_state(self) -> dict[str, Any]:
        """Returns nothing: how many updates are done says all."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_state` gave."""
