"""RALIS' replay: whole episodes as they were played, and transitions that are places in them.

    add ──▶ one episode: a record per step ── copied once ──▶ its Arrow IPC stream in memory, the same bytes in a file
                │
                └── K transitions per step ──▶ `ReplayBuffer`: identifiers, priorities, versions, draws

    transition (t, k):   s_t,  candidate chosen of pool k at t,  r_t + γ r_{t+1} + … of n steps,  s_{t+n},  pool k at t + n

A transition's identifier is the first one of its episode + t·K + k and so says where its tensors are: states and
candidates are held once per step, for K transitions of that step and K of the one n before. Transitions go one by one,
episodes when none of their transitions is left.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raysseg.algorithms.ralis.steps import STEP_SCHEMA, Episode, StepShapes, to_binary
from raysseg.core.replay import ReplayBuffer, check_schema
from raysseg.core.settings import ReplaySettings
from raysseg.functional.double_q import discounted_sums

DRAW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("state_index", pa.int32(), nullable=False),
        pa.field("next_index", pa.int32(), nullable=False),
        pa.field("action", pa.binary(), nullable=False),
        pa.field("next_candidates", pa.binary()),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("terminated", pa.bool_(), nullable=False),
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("step", pa.int16(), nullable=False),
        pa.field("k", pa.int16(), nullable=False),
    ]
)
"""One drawn transition. `state_index` and `next_index` count the draw's states, −1 where the episode ends before; `action`
`[d_action]` and `next_candidates` `[N, d_action]`, null there, are float16 in C order; `reward` is the discounted sum of
the n steps' rewards.
"""

_PLACE_SCHEMA = pa.schema(
    [
        pa.field("segmenter_version", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """Drawn transitions and the states that they share.

    Args:
        records: of `DRAW_SCHEMA`, in the order of `id`: shuffle before minibatches are cut from it.
        states: float16 `[U, S, d_state]`, each distinct state once.
    """

    records: pa.RecordBatch
    states: np.ndarray


class StepReplay:
    """Keeps the newest transitions, K for each step of the episodes; a draw is a pure function of contents and generator.

    Args:
        settings: capacity in transitions, and how to draw; `shards` is not looked at.
        shapes: of every step's state and candidates.
        return_steps: n, steps whose rewards are summed.
        gamma: their discount, in [0, 1].
        centred: whether rewards count from their mean over the episodes held, at the same step.

    Source: RALIS, Sec. 3.4 (transitions of single regions); sharing their states and more steps than one are reconstructions.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        *,
        shapes: StepShapes,
        return_steps: int = 1,
        gamma: float = 1.0,
        centred: bool = False,
    ) -> None:
        self._shapes, self._return_steps, self._gamma, self._centred = shapes, return_steps, gamma, centred
        self._places = ReplayBuffer(settings, _PLACE_SCHEMA)
        self._episodes: dict[int, Episode] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def dropped(self) -> int:
        """Transitions that `drop_older` dropped since the run began."""
        return self._places.dropped

    @property
    def nbytes(self) -> int:
        """Bytes of all episodes and record batches held, without the index (36 bytes a transition)."""
        return self._places.nbytes + sum(episode.data.size for episode in self._episodes.values())

    def add(self, episode: pa.RecordBatch) -> None:
        """Adds the transitions of one whole episode, and lets the oldest go that exceed the capacity.

        Args:
            episode: of `STEP_SCHEMA`, its steps in order; it is copied.

        Raises:
            ValueError: the columns, their shapes or the order of the steps are others.
        """
        check_schema(episode, STEP_SCHEMA)
        if episode.num_rows == 0:
            return
        self._episodes[self._places.next_id] = Episode.copy_of(episode, self._shapes)
        versions = (episode.column(name).to_numpy() for name in _PLACE_SCHEMA.names)
        arrays = [pa.array(version.repeat(self._shapes.per_step)) for version in versions]
        self._places.add(pa.RecordBatch.from_arrays(arrays, schema=_PLACE_SCHEMA))
        self._let_go()

    def sample(self, count: int, generator: np.random.Generator) -> Draw:
        """Draws transitions, without replacement where there are enough; by priority as `ReplayBuffer` does.

        Args:
            count: how many, at least 1.
            generator: moves on by one draw.

        Raises:
            ValueError: the buffer is empty.
        """
        drawn = self._places.sample(count, generator)
        ids = drawn.column("id").to_numpy()
        firsts: np.ndarray = np.array(list(self._episodes), np.int64)
        episodes = list(self._episodes.values())
        lengths: np.ndarray = np.array([episode.steps for episode in episodes])
        starts = np.cumsum(lengths) - lengths
        owners = np.searchsorted(firsts, ids, side="right") - 1
        steps, pools = np.divmod(ids - firsts[owners], self._shapes.per_step)
        goes_on = steps + self._return_steps < lengths[owners]
        # All steps held are numbered one after the other, so that those after a step have the next numbers.
        here = starts[owners] + steps
        used, indices = np.unique(np.concatenate([here, here[goes_on] + self._return_steps]), return_inverse=True)
        next_indices: np.ndarray = np.full(count, -1)
        next_indices[goes_on] = indices[count:]

        returns = self._returns(episodes)
        states: np.ndarray = np.empty((len(used), *self._shapes.state), np.float16)
        parts: list[tuple[np.ndarray, ...]] = []
        for owner in np.unique(owners):
            # Identifiers ascend, and so do the owners: an episode's transitions and states are one piece of the draw.
            mine = _span(owners, owner, owner + 1)
            parts.append(episodes[owner].transitions(steps[mine], pools[mine], self._return_steps))
            shared = _span(used, starts[owner], starts[owner] + lengths[owner])
            np.take(episodes[owner].states, used[shared] - starts[owner], 0, out=states[shared], mode="clip")
        actions, candidates, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        columns = {
            "id": ids,
            "weight": drawn.column("weight"),
            "state_index": indices[:count],
            "next_index": next_indices,
            "action": to_binary(actions),
            "next_candidates": to_binary(candidates, goes_on),
            "reward": returns[here],
            "terminated": ~goes_on,
            "episode": numbers,
            "step": steps,
            "k": pools,
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in DRAW_SCHEMA]
        return Draw(records=pa.RecordBatch.from_arrays(arrays, schema=DRAW_SCHEMA), states=states)

    def _returns(self, episodes: list[Episode]) -> np.ndarray:
        """Returns the discounted sums of rewards from every step on, float32, episode after episode."""
        rewards = torch.zeros(len(episodes), max(episode.steps for episode in episodes))
        played: np.ndarray = np.zeros(rewards.shape, dtype=bool)
        for row, episode in enumerate(episodes):
            rewards[row, : episode.steps] = torch.tensor(episode.rewards)
            played[row, : episode.steps] = True
        held = torch.as_tensor(played)
        if self._centred:
            rewards = (rewards - rewards.sum(0) / held.sum(0)) * held
        return discounted_sums(rewards, self._return_steps, self._gamma)[held].numpy()

    def update_priorities(self, ids: np.ndarray, errors: np.ndarray) -> None:
        """Takes over the |temporal-difference errors| of drawn transitions, as `ReplayBuffer.update_priorities` does.

        Raises:
            ValueError: an identifier was never given.
            NonFiniteError: an error is not finite.
        """
        self._places.update_priorities(ids, errors)

    def drop_older(self, *, segmenter_version: int, policy_version: int) -> int:
        """Drops transitions made by an older segmenter, or by a policy older than `policy_version`; returns and
        counts how many.
        """
        dropped = self._places.drop_older(segmenter_version=segmenter_version, policy_version=policy_version)
        self._let_go()
        return dropped

    def _let_go(self) -> None:
        """Lets go of the episodes that no transition is left of."""
        ids = self._places.ids
        firsts: np.ndarray = np.array(list(self._episodes), np.int64)
        steps: np.ndarray = np.array([episode.steps for episode in self._episodes.values()], np.int64)
        left = np.searchsorted(ids, firsts + steps * self._shapes.per_step) - np.searchsorted(ids, firsts)
        for first in firsts[left == 0].tolist():
            del self._episodes[first]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the episodes and priorities that are not in the folder yet, and returns the rest as what JSON can hold.

        Raises:
            OSError: a file could not be written.
        """
        state = self._places.save(folder)
        entries = [episode.write(folder, first) for first, episode in self._episodes.items()]
        return {**state, "episodes": entries, "first_ids": list(self._episodes)}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Replaces everything by what `save` wrote and returned; a smaller capacity keeps the newest.

        Raises:
            InputError: a file is missing, truncated or changed, or holds steps of other shapes.
        """
        pairs = zip(state["first_ids"], state["episodes"], strict=True)
        episodes = {first: Episode.read(folder, entry, self._shapes) for first, entry in pairs}
        self._places.load(folder, state)
        self._episodes = episodes
        self._let_go()

    def close(self) -> None:
        """Lets go of all transitions."""
        self._places.close()
        self._episodes = {}


def _span(ascending: np.ndarray, first: int, stop: int) -> slice:
    """Returns where ascending integers `[n]` lie in the range from `first` to before `stop`."""
    return slice(int(np.searchsorted(ascending, first)), int(np.searchsorted(ascending, stop)))
