"""The replay buffer: transitions as they came over the wire, drawn uniformly or by priority, saved incrementally.

Prioritised drawing is proportional (Schaul et al. 2016, Eq. 1): P(i) = p_i^α / Σ p^α with p = |δ| + 1e-6, and transitions
that were never drawn have the largest p so far. The n places of a draw are one random offset and n equal steps along
the line of all p^α. So a transition is drawn n·P(i) times on the mean, exactly, and never twice unless n·P(i) > 1: the
importance weights need no correction for drawing without replacement. (The paper draws one place in each of the n
steps, App. B.2.1, which may take a transition on the border of two steps twice.)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.core import rollout
from raysseg.core.replay_rows import ReplayRows, drawn_schema
from raysseg.core.settings import ReplaySettings
from raysseg.errors import InputError, NonFiniteError

SMALLEST_PRIORITY = 1e-6
FIRST_PRIORITY = 1.0
"""Of transitions that came before any error was known."""


def replay_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of a draw: those of the transitions, `id` int64 and `weight` float32. Source: design."""
    drawn = drawn_schema(schema)
    return drawn.set(len(drawn) - 1, pa.field("weight", pa.float32(), nullable=False))


REPLAY_SCHEMA = replay_schema(rollout.TRANSITION_SCHEMA)


@dataclasses.dataclass(slots=True)
class ReplayNumbers:
    """What a replay buffer counts, wherever its transitions are held.

    Args:
        next_id: identifier of the next transition; none is ever given twice.
        largest: largest priority so far, or None before any error was known.
        dropped: transitions that were dropped, not those that made room for newer ones.

    Source: Schaul et al. 2016, Alg. 1 line 6 (new transitions get the largest priority).
    """

    next_id: int = 0
    largest: float | None = None
    dropped: int = 0

    @property
    def first_priority(self) -> float:
        """Priority of transitions that were never drawn."""
        return FIRST_PRIORITY if self.largest is None else self.largest

    def priorities(self, ids: np.ndarray, errors: np.ndarray, settings: ReplaySettings) -> np.ndarray | None:
        """Returns the priorities float64 `[n]` that errors give, or None where drawing is uniform; see `priorities_of`.

        Raises:
            ValueError: an identifier was never given.
            NonFiniteError: an error is not finite.
        """
        found = priorities_of(ids, errors, self.next_id)
        if settings.priority_exponent == 0:
            return None
        self.largest = max(self.largest or 0.0, *found.tolist())
        return found

    def state(self) -> dict[str, Any]:
        """Returns everything as what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> ReplayNumbers:
        """Returns what `state` gave, among other things in the dictionary."""
        return cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})


class ReplayBuffer:
    """Keeps the newest transitions in this process; a draw is a pure function of contents and generator.

    Args:
        settings: capacity and how to draw; `shards` is not looked at.
        schema: columns of a transition, among them `segmenter_version` and `policy_version`.

    Raises:
        ValueError: the schema lacks one of the two.

    Source: design (principle 3: one Arrow schema); EIL's paper names no replay buffer, so its use is a reconstruction.
    """

    def __init__(self, settings: ReplaySettings, schema: pa.Schema = rollout.TRANSITION_SCHEMA) -> None:
        self._settings, self._schema = settings, schema
        self._rows = self._no_rows()
        self._numbers = ReplayNumbers()

    def _no_rows(self) -> ReplayRows:
        return ReplayRows(self._settings.capacity, self._settings.priority_exponent, self._schema)

    def __len__(self) -> int:
        return self._rows.size()

    @property
    def dropped(self) -> int:
        """Transitions that `drop_older` dropped since the run began."""
        return self._numbers.dropped

    @property
    def next_id(self) -> int:
        """Identifier of the transition that is added next."""
        return self._numbers.next_id

    @property
    def ids(self) -> np.ndarray:
        """Identifiers of all transitions, int64 `[N]`, ascending; void after the next change."""
        return self._rows.ids()

    @property
    def nbytes(self) -> int:
        """Bytes of all record batches held, without the index (36 bytes a transition)."""
        return self._rows.nbytes()

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds transitions, numbers them consecutively, and lets the oldest go that exceed the capacity.

        Raises:
            ValueError: the batch has other columns than the buffer's schema.
        """
        check_schema(batch, self._schema)
        self._rows.add(batch, self._numbers.next_id, self._numbers.first_priority)
        self._numbers.next_id += batch.num_rows

    def sample(self, count: int, generator: np.random.Generator) -> pa.RecordBatch:
        """Draws transitions, without replacement where the buffer holds enough (prioritised: see the top of this file).

        Args:
            count: how many, at least 1.
            generator: moves on by one draw.

        Returns:
            The columns of `replay_schema`: the transitions' own, `id` (unique for ever) and `weight` in (0, 1], in the
            order of `id`.

        Raises:
            ValueError: the buffer is empty.
        """
        size, extent = len(self), self._rows.extent()
        drawn = self._rows.at(draw_places(count, extent, generator, self._settings))
        return with_weights(drawn, size, extent, self._settings)

    def update_priorities(self, ids: np.ndarray, errors: np.ndarray) -> None:
        """Takes over the |temporal-difference errors| of drawn transitions; nothing changes where drawing is uniform.

        Args:
            ids: int64 `[n]`, from `sample`; those that are gone meanwhile change nothing, and of one that occurs twice
                the last error counts.
            errors: float `[n]`.

        Raises:
            ValueError: an identifier was never given.
            NonFiniteError: an error is not finite.
        """
        priorities = self._numbers.priorities(ids, errors, self._settings)
        if priorities is not None:
            self._rows.update_priorities(ids, priorities)

    def drop_older(self, *, segmenter_version: int, policy_version: int) -> int:
        """Drops transitions made by an older segmenter, or by a policy older than `policy_version`; returns and
        counts how many.
        """
        dropped = self._rows.drop_older(segmenter_version, policy_version)
        self._numbers.dropped += dropped
        return dropped

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes what is not in the folder yet, and returns the rest as what JSON can hold.

        Raises:
            OSError: a file could not be written.
        """
        return {**self._rows.save(folder), **self._numbers.state()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Replaces everything by what `save` wrote and returned.

        Raises:
            InputError: a file is missing, truncated or changed, or the state is that of a sharded buffer.
        """
        check_shards(state, 0)
        self._rows.load(folder, state)
        self._numbers = ReplayNumbers.of(state)

    def close(self) -> None:
        """Lets go of all transitions."""
        self._rows = self._no_rows()


def check_schema(batch: pa.RecordBatch, schema: pa.Schema) -> None:
    """Raises ValueError where a record batch is not of the schema. Source: design."""
    if not batch.schema.equals(schema):
        raise ValueError(f"Replay takes transitions with the columns {schema.names}, of their types.")


def check_shards(state: dict[str, Any], shards: int) -> None:
    """Raises InputError where a state is that of another number of shards. Source: design."""
    saved = len(state.get("shards", ()))
    if saved != shards:
        raise InputError(
            f"The checkpoint's replay buffer has {saved} shards but replay.shards is {shards}: "
            f"continue the run with replay.shards: {saved}."
        )


def draw_places(count: int, extent: float, generator: np.random.Generator, settings: ReplaySettings) -> np.ndarray:
    """Draws the places of `count` transitions on the line of all of them, ascending.

    Args:
        count: at least 1.
        extent: the transitions, or the sum of their masses, as `ReplayRows.extent` gives it.
        generator: moves on by one draw.
        settings: whether drawing is uniform.

    Returns:
        int64 `[count]` in [0, extent), or float64 where drawing is by priority.

    Raises:
        ValueError: there is nothing to draw from.

    Source: Schaul et al. 2016, Eq. 1; the steps are those of systematic sampling.
    """
    if extent == 0:
        raise ValueError("The replay buffer is empty.")
    if settings.priority_exponent == 0:
        return np.sort(generator.choice(int(extent), size=count, replace=extent < count))
    return (np.arange(count) + generator.random()) * (extent / count)


def with_weights(drawn: pa.RecordBatch, size: int, extent: float, settings: ReplaySettings) -> pa.RecordBatch:
    """Replaces the masses of drawn transitions by their importance weights (N·P(i))^-β, divided by the largest of the draw.

    Args:
        drawn: with the columns of `drawn_schema`.
        size: N, all transitions there are.
        extent: the sum of their masses, or N where drawing is uniform.
        settings: β is `importance_exponent`.

    Returns:
        The columns of `replay_schema`.

    Source: Schaul et al. 2016, Sec. 3.4.
    """
    weights = (drawn.column("mass").to_numpy() * (size / extent)) ** -settings.importance_exponent
    column = pa.array((weights / weights.max()).astype(np.float32))
    return drawn.set_column(drawn.num_columns - 1, pa.field("weight", pa.float32(), nullable=False), column)


def priorities_of(ids: np.ndarray, errors: np.ndarray, next_id: int) -> np.ndarray:
    """Returns |error| + 1e-6, float64 `[n]`.

    Args:
        ids: int64 `[n]`.
        errors: float `[n]`.
        next_id: the first identifier that was never given.

    Raises:
        ValueError: an identifier was never given, or there is not one error for each.
        NonFiniteError: an error is not finite.

    Source: Schaul et al. 2016, Sec. 3.3.
    """
    if len(ids) != len(errors) or len(ids) == 0:
        raise ValueError(f"There are {len(errors)} errors for {len(ids)} transitions.")
    if ids.min() < 0 or ids.max() >= next_id:
        raise ValueError(f"The replay buffer never held the transition {ids[(ids < 0) | (ids >= next_id)][0]}.")
    if not np.isfinite(errors).all():
        wrong = ids[~np.isfinite(errors)].tolist()
        raise NonFiniteError(f"The temporal-difference errors of the transitions {wrong} are not finite.")
    return np.abs(np.asarray(errors, np.float64)) + SMALLEST_PRIORITY
