"""The replay buffer spread over Ray actors: the driver numbers transitions and draws places, the shards hold the rows.

    driver ── record batch, one shard after the other ──▶ shard 0 … n-1 ── their lines of places, end to end ──┐
      ▲                                                                                                        │
      └── rows at the places that fall to each shard ◀── one draw over the whole line ─────────────────────────┘

Adding and taking over errors do not wait; the shards answer with the new lengths of their lines, which the next draw
looks at. No call waits longer than `patience` for a shard. One that died or is silent is replaced by an empty one, and what it
held is counted in `dropped`; the driver knows how much that is, as every shard's size follows from what it was sent.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from raysseg.core import rollout
from raysseg.core.replay import (
    ReplayBuffer,
    ReplayNumbers,
    check_schema,
    check_shards,
    draw_places,
    with_weights,
)
from raysseg.core.replay_files import files_of
from raysseg.core.replay_shard import ReplayShard
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError

START_SECONDS = 60.0
"""How long a shard's process may take to start."""
FILE_SECONDS = 600.0
"""How long a shard may take to save or load everything."""
MOST_UNANSWERED = 32
"""Changes on their way to one shard before the driver waits for it."""


class ShardedReplay:
    """A `ReplayBuffer` in `settings.shards` actors, each with its part of the capacity; the oldest go first in each.

    Args:
        settings: `shards` is at least 1.
        note: is told in one sentence when a shard was lost.
        patience: seconds a shard has for an answer before it counts as lost.

    Raises:
        InputError: there are more shards than transitions to hold.

    Source: design.
    """

    def __init__(
        self, settings: ReplaySettings, *, note: Callable[[str], None] = warnings.warn, patience: float = 10.0
    ) -> None:
        count = settings.shards
        if settings.capacity < count:
            raise InputError(
                f"replay.shards is {count} but replay.capacity is {settings.capacity}; each shard must hold at least one."
            )
        self._settings, self._note, self._patience = settings, note, patience
        self._capacities = [settings.capacity // count + (index < settings.capacity % count) for index in range(count)]
        self._turn = 0
        self._numbers = ReplayNumbers()
        self._sizes, self._lengths = [0] * count, [0.0] * count
        self._unanswered: list[list[ray.ObjectRef]] = [[] for _ in range(count)]
        self._shards = [self._start(index) for index in range(count)]
        self._started = [shard.size.remote() for shard in self._shards]
        # All of them, or where the first batches go would depend on the clock.
        self._running(count)

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def dropped(self) -> int:
        """Transitions that `drop_older` dropped and that lost shards held, since the run began."""
        return self._numbers.dropped

    @property
    def nbytes(self) -> int:
        """Bytes of all record batches held, without the index (36 bytes a transition)."""
        return sum(self._ask({index: shard.nbytes.remote() for index, shard in self._filled()}).values())

    # ---- what a replay buffer does ----------------------------------------------------------------------------------

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds transitions to the next shard in turn; does not wait for it.

        Raises:
            ValueError: the batch is not of `TRANSITION_SCHEMA`.
        """
        check_schema(batch, rollout.TRANSITION_SCHEMA)
        if batch.num_rows == 0:
            return
        index = self._next_shard()
        data = rollout.to_bytes([batch])
        numbers = self._numbers
        self._send(index, self._shards[index].add.remote(data, numbers.next_id, numbers.first_priority))
        numbers.next_id += batch.num_rows
        self._sizes[index] = min(self._sizes[index] + batch.num_rows, self._capacities[index])

    def sample(self, count: int, generator: np.random.Generator) -> pa.RecordBatch:
        """Draws from all shards as from one buffer, as `ReplayBuffer.sample` does; rows come in the order of the shards.

        Raises:
            ValueError: the buffer is empty, or all that was in it was lost.
        """
        while True:
            extents = self._extents()
            ends = np.cumsum(extents)
            places = draw_places(count, ends[-1], generator, self._settings)
            owners = np.minimum(np.searchsorted(ends, places, side="right"), np.flatnonzero(extents)[-1])
            asked = {
                int(index): self._shards[index].at.remote(places[owners == index] - (ends[index] - extents[index]))
                for index in np.unique(owners)
            }
            drawn = self._ask(asked)
            if len(drawn) == len(asked):
                parts = [part for index in sorted(drawn) for part in rollout.from_bytes(drawn[index])]
                joined = pa.Table.from_batches(parts).combine_chunks()
                return with_weights(joined.to_batches()[0], len(self), float(ends[-1]), self._settings)

    def update_priorities(self, ids: np.ndarray, errors: np.ndarray) -> None:
        """Takes over the |temporal-difference errors| of drawn transitions, as `ReplayBuffer.update_priorities` does.

        Raises:
            ValueError: an identifier was never given.
            NonFiniteError: an error is not finite.
        """
        priorities = self._numbers.priorities(ids, errors, self._settings)
        if priorities is not None:
            for index, shard in self._filled():
                self._send(index, shard.update_priorities.remote(ids, priorities))

    def drop_older(self, *, segmenter_version: int, policy_version: int) -> int:
        """Drops transitions made by an older segmenter, or by a policy older than `policy_version`; returns and
        counts how many.
        """
        answers = self._ask(
            {index: shard.drop_older.remote(segmenter_version, policy_version) for index, shard in self._filled()}
        )
        total = 0
        for index, (dropped, length) in answers.items():
            self._sizes[index] -= dropped
            self._answered(index, length)
            total += dropped
        self._numbers.dropped += total
        return total

    def save(self, folder: Path) -> dict[str, Any]:
        """Lets every shard write what is not in the folder yet, and returns the rest as what JSON can hold.

        Raises:
            OSError: a file could not be written.
            InputError: a file that a shard wrote on its node cannot be seen from here.
        """
        folder = folder.resolve()
        states: list[dict[str, Any]] = []
        while len(states) < len(self._shards):
            asked = {index: shard.save.remote(folder) for index, shard in enumerate(self._shards)}
            answers = self._ask(asked, FILE_SECONDS)
            states = [answers[index] for index in sorted(answers)]
        for entry in (entry for state in states for entry in files_of(state)):
            if not (folder / entry["file"]).is_file():
                raise InputError(
                    f"A replay shard wrote {entry['file']} to {folder} on its node, but it cannot be seen from here: "
                    "with replay.shards the run's folder must be on storage that all nodes share."
                )
        return {"shards": states, "sizes": list(self._sizes), "turn": self._turn, **self._numbers.state()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Replaces everything by what `save` wrote and returned.

        Raises:
            InputError: a file is missing, truncated or changed, or the state is that of another number of shards.
        """
        check_shards(state, len(self._shards))
        self._turn, self._numbers = state["turn"], ReplayNumbers.of(state)
        self._sizes = [min(size, most) for size, most in zip(state["sizes"], self._capacities, strict=True)]
        folder = folder.resolve()
        pairs = zip(self._shards, state["shards"], strict=True)
        asked = {index: shard.load.remote(folder, part) for index, (shard, part) in enumerate(pairs)}
        for index, length in self._ask(asked, FILE_SECONDS).items():
            self._answered(index, length)

    def close(self) -> None:
        """Ends the shards' processes."""
        for shard in self._shards:
            with contextlib.suppress(RayError):
                ray.kill(shard)
        self._sizes = [0] * len(self._shards)

    # ---- shards -----------------------------------------------------------------------------------------------------

    def _start(self, index: int) -> ActorHandle:
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        return ray.remote(**options)(ReplayShard).remote(self._capacities[index], self._settings.priority_exponent)

    def _running(self, least: int) -> list[ray.ObjectRef]:
        """Returns which of `_started` have; waits for as many as `least`."""
        ready, _ = ray.wait(self._started, num_returns=len(self._started), timeout=0)
        if len(ready) < least:
            ready, _ = ray.wait(self._started, num_returns=least, timeout=START_SECONDS)
        if len(ready) < least:
            raise RuntimeError(
                f"Only {len(ready)} of the replay's {len(self._shards)} shards have started within {START_SECONDS:.0f} s."
            )
        return list(ready)

    def _filled(self) -> list[tuple[int, ActorHandle]]:
        return [(index, self._shards[index]) for index, size in enumerate(self._sizes) if size]

    def _next_shard(self) -> int:
        """Returns the next shard in turn whose process runs."""
        running = self._running(1)
        while self._started[self._turn % len(self._shards)] not in running:
            self._turn += 1
        self._turn += 1
        return (self._turn - 1) % len(self._shards)

    def _send(self, index: int, change: ray.ObjectRef) -> None:
        """Remembers a change that a shard will answer with the length of its line, and waits where there are too many."""
        self._unanswered[index].append(change)
        if len(self._unanswered[index]) > MOST_UNANSWERED:
            self._ask({index: self._unanswered[index].pop(0)})

    def _answered(self, index: int, length: float) -> None:
        """Takes over the length of a shard's line after all that was sent to it."""
        self._lengths[index] = length
        self._unanswered[index].clear()

    def _extents(self) -> np.ndarray:
        """Returns the length `[shards]` of every shard's line of places."""
        if self._settings.priority_exponent == 0:
            return np.array(self._sizes)
        newest = {index: changes[-1] for index, changes in enumerate(self._unanswered) if changes}
        for index, length in self._ask(newest).items():
            self._answered(index, length)
        return np.array(self._lengths)

    def _ask(self, calls: dict[int, ray.ObjectRef], seconds: float | None = None) -> dict[int, Any]:
        """Returns the answers of the shards that gave one in time, and replaces the others.

        Raises:
            Exception: what a shard raised.
        """
        if not calls:
            return {}
        seconds = self._patience if seconds is None else seconds
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
        answers: dict[int, Any] = {}
        for index, call in calls.items():
            try:
                answers[index] = ray.get(call, timeout=self._patience if call in ready else 0)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                self._replace(index, "does not answer" if isinstance(error, TimeoutError) else "has died")
        return answers

    def _replace(self, index: int, why: str) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._shards[index])
        lost, self._sizes[index] = self._sizes[index], 0
        self._numbers.dropped += lost
        self._answered(index, 0.0)
        self._shards[index] = self._start(index)
        self._started[index] = self._shards[index].size.remote()
        self._note(
            f"Replay shard {index} of {len(self._shards)} {why}: the {lost} transitions it held are lost and counted as "
            "dropped, and an empty one takes its place."
        )


Replay: TypeAlias = ReplayBuffer | ShardedReplay


def make_replay(settings: ReplaySettings, *, note: Callable[[str], None] = warnings.warn) -> Replay:
    """Returns the replay buffer that the settings describe: in this process, or in `shards` actors.

    Args:
        settings: how transitions are kept and drawn.
        note: is told in one sentence when a shard was lost.

    Raises:
        InputError: there are more shards than transitions to hold.

    Source: design.
    """
    return ShardedReplay(settings, note=note) if settings.shards else ReplayBuffer(settings)
