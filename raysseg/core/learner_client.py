"""The driver's side of the learners: work goes out, numbers and weights come back; a learner that dies is noticed at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.rllib.core.learner.learner_group import LearnerGroup

from raysseg.core.telemetry import Telemetry
from raysseg.core.work import LearnerWork
from raysseg.errors import LearnerLostError

COLLECTIVE_SECONDS = 10.0
"""Seconds in which the death of a learner is known after the others saw their connection to it break."""


def lost_process(error: RayActorError) -> LearnerLostError:
    """Returns one sentence about a learner, or another process that holds a part of the run's state, that died."""
    return LearnerLostError(f"A learner or replay shard died: {' '.join(str(error).split())[:300]}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished update.

    Args:
        number: of the update, as it was sent.
        numbers: what the learner measured.
        weights: where the published weights are, or None where none were asked for.
    """

    number: int
    numbers: dict[str, Any]
    weights: ray.ObjectRef | None


class LearnerClient:
    """Sends work to all learners of a run, in this process or in others.

    Args:
        learner_group: RLlib's group; it made the learners and puts them on their devices.
        telemetry: is told how busy they are.

    Source: design (learner groups come from RLlib; its own asynchronous update does not say which result belongs to
    which work, and brings the weights through the driver).
    """

    def __init__(self, learner_group: LearnerGroup, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._local = learner_group._learner
        self._remote = [] if self._local is not None else list(learner_group._worker_manager.actors().values())
        self._waiting: list[tuple[int, list[ray.ObjectRef], ray.ObjectRef | None]] = []
        self._done: list[Done] = []

    @property
    def is_local(self) -> bool:
        """Whether the learner lives in this process, so that an update is over when `send` returns."""
        return self._local is not None

    @property
    def under_way(self) -> int:
        """Number of updates that were sent and are not done."""
        return len(self._waiting)

    @property
    def references(self) -> list[ray.ObjectRef]:
        """What to wait for: one reference of every learner's oldest update."""
        return list(self._waiting[0][1]) if self._waiting else []

    def update(self, work: LearnerWork) -> dict[str, Any]:
        """Does one work order and returns its numbers.

        Raises:
            LearnerLostError: a learner died.
            NonFiniteError: a loss is not finite.
        """
        self.send(0, work)
        while True:
            for done in self.collect(timeout=None):
                return done.numbers

    def send(self, number: int, work: LearnerWork, *, publish: tuple[str, ...] = ()) -> None:
        """Sends one work order to all learners.

        Args:
            number: comes back with the result.
            work: what to do; every learner gets its own part.
            publish: module ids whose weights after this update go into the object store.
        """
        work.validate()
        if self._local is not None:
            numbers, packed = self._local.update_and_publish(work, publish)
            self._finish(number, numbers, ray.put(packed) if publish else None)
            return
        refs: list[ray.ObjectRef] = []
        weights = None
        for rank, (part, _) in enumerate(work.shard(len(self._remote))):
            # Two return values: the weights go from the learner into the object store, and never through the driver.
            call = self._remote[rank].update_and_publish.options(num_returns=2)
            numbers_ref, weights_ref = call.remote(part, publish if rank == 0 else ())
            refs.append(numbers_ref)
            if publish and rank == 0:
                weights = weights_ref
        self._waiting.append((number, refs, weights))

    def collect(self, timeout: float | None = 0.0) -> list[Done]:
        """Returns what is done, in the order it was sent, waiting at most `timeout` seconds (None: as long as it takes)
        for the first.

        Raises:
            LearnerLostError: a learner died.
            NonFiniteError: a loss is not finite.
        """
        done, self._done = self._done, []
        while self._waiting:
            number, refs, weights = self._waiting[0]
            answers = self._get(refs, timeout=timeout if not done else 0.0)
            if answers is None:
                break
            self._waiting.pop(0)
            self._finish(number, answers[0], weights)
            done.append(self._done.pop())
        return done

    def _finish(self, number: int, numbers: dict[str, Any], weights: ray.ObjectRef | None) -> None:
        """Takes the numbers of an update apart: what was learned, and how long it took."""
        timing = numbers["timing"]
        self._telemetry.update(timing["busy_seconds"], timing["idle_seconds"], timing["prepare_seconds"])
        learned = {name: value for name, value in numbers.items() if name != "timing"}
        self._done.append(Done(number=number, numbers=learned, weights=weights))

    def publish(self, modules: tuple[str, ...]) -> ray.ObjectRef:
        """Puts the modules' present weights into the object store and returns where they are."""
        if self._local is not None:
            return ray.put(self._local.publish_weights(modules))
        ref = self._remote[0].publish_weights.remote(modules)
        self._get([ref], timeout=None, fetch=False)
        return ref

    def _get(self, refs: Sequence[ray.ObjectRef], *, timeout: float | None, fetch: bool = True) -> list[Any] | None:
        """Returns the answers of all learners, or None where they are not all there in time.

        When one learner dies the others wait for it in a collective, so the first failure counts and nobody is waited
        for.
        """
        left = list(refs)
        try:
            while left:
                ready, left = ray.wait(left, num_returns=1, timeout=timeout, fetch_local=fetch)
                if not ready:
                    return None
                if fetch:
                    ray.get(ready)
            return ray.get(list(refs)) if fetch else []
        except RayTaskError as error:
            self._look_for_death(refs)
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayActorError as error:
            raise lost_process(error) from None

    @staticmethod
    def _look_for_death(refs: Sequence[ray.ObjectRef]) -> None:
        """Raises `LearnerLostError` where one learner's failure is that another one died in the middle of a collective."""
        if len(refs) == 1:
            return
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=COLLECTIVE_SECONDS)[0]:
            try:
                ray.get(ref)
            except RayTaskError:
                continue
            except RayActorError as error:
                raise lost_process(error) from None
