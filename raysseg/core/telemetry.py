"""What the actors, the replay and the learner are doing: counts since the run began, rates and means per iteration."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ray
from ray.util import metrics

FIELDS: dict[str, str] = {
    "actors_alive": "Actors that take orders now.",
    "actors_total": "Actors that the run was given.",
    "actor_deaths": "Deaths of actors since the run began.",
    "rollouts_per_second": "Rollouts that arrived per second.",
    "transitions_per_second": "Transitions that arrived per second.",
    "policy_lag_mean": "Policy versions between the acting and the newest policy when a rollout arrived; mean.",
    "policy_lag_max": "Policy versions between the acting and the newest policy when a rollout arrived; largest.",
    "learner_busy_share": "Share of the time between updates' ends that the learner spent in updates, 0 to 1.",
    "learner_idle_share": "Share of the time between updates' ends that the learner waited for work, 0 to 1.",
    "learner_prepare_share": "Share of the updates' time that they waited for records to be made ready, 0 to 1.",
    "rollouts_dropped": "Rollouts dropped because their policy was too old, since the run began.",
    "rollouts_lost": "Rollouts in flight when their actor died, since the run began.",
    "weights_age_seconds": "Age of the weights that made a rollout, in seconds, when it arrived; mean.",
    "replay_size": "Transitions in the replay buffer.",
    "orders_in_flight": "Orders that actors were given and have not answered.",
}
"""Every field of a snapshot and what it means; rates, means and shares are over the time since the last snapshot."""

TOTALS = ("actor_deaths", "rollouts_dropped", "rollouts_lost")
"""The fields that only grow: counts since the run began, kept in checkpoints."""

PREFIX = "raysseg_"
TAG_KEYS = ("run", "variant", "seed")


@dataclass(slots=True, kw_only=True)
class _Window:
    """What happened since the last snapshot."""

    start: float
    transitions: int = 0
    lags: list[int] = field(default_factory=list)
    weights_ages: list[float] = field(default_factory=list)
    busy: float = 0.0
    idle: float = 0.0
    prepare: float = 0.0


class Telemetry:
    """Takes what the driver's loop sees and makes one snapshot of it per iteration; one object per run, not for threads.

    Args:
        clock: seconds that only grow.

    Source: design (what is measured).
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._totals: dict[str, int] = dict.fromkeys(TOTALS, 0)
        self._levels: dict[str, float] = {}
        self._window = _Window(start=clock())
        self._latest: dict[str, float] = {}

    # ---- what the loop says -----------------------------------------------------------------------------------------

    def actors(self, alive: int, total: int) -> None:
        """Says how many remote actors take orders, of how many that the run was given."""
        self._levels |= {"actors_alive": float(alive), "actors_total": float(total)}

    def actor_died(self, count: int = 1) -> None:
        """Counts deaths of actors."""
        self._totals["actor_deaths"] += count

    def rollout(self, transitions: int, lag: int, weights_age: float) -> None:
        """Counts one rollout that arrived.

        Args:
            transitions: its rows.
            lag: policy versions between the policy that acted and the newest one.
            weights_age: seconds since the weights that acted were made.
        """
        self._window.transitions += transitions
        self._window.lags.append(lag)
        self._window.weights_ages.append(weights_age)

    def dropped(self, count: int) -> None:
        """Counts rollouts that were dropped because their policy was too old."""
        self._totals["rollouts_dropped"] += count

    def lost(self, count: int) -> None:
        """Counts rollouts that were in flight when their actor died."""
        self._totals["rollouts_lost"] += count

    def orders_in_flight(self, count: int) -> None:
        """Says how many orders have no answer yet."""
        self._levels["orders_in_flight"] = float(count)

    def update(self, busy_seconds: float, idle_seconds: float, prepare_seconds: float) -> None:
        """Counts the time of one learner update.

        Args:
            busy_seconds: in the update.
            idle_seconds: between the end of the update before and the start of this one.
            prepare_seconds: part of `busy_seconds` that the update waited for records to be made ready.
        """
        self._window.busy += busy_seconds
        self._window.idle += idle_seconds
        self._window.prepare += prepare_seconds

    def replay(self, size: int) -> None:
        """Says how many transitions the replay buffer holds."""
        self._levels["replay_size"] = float(size)

    # ---- what comes of it -------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, float]:
        """Returns the fields of `FIELDS` that have data, and begins a new window.

        Totals are always there and levels (actors, orders, replay) from the first time they were said; a mean or a
        share without data in the window is absent. A rate without rollouts is 0.
        """
        window, now = self._window, self._clock()
        self._window = _Window(start=now)
        found = {**self._levels, **{name: float(count) for name, count in self._totals.items()}}
        elapsed = now - window.start
        if elapsed > 0:
            found["rollouts_per_second"] = len(window.lags) / elapsed
            found["transitions_per_second"] = window.transitions / elapsed
        if window.lags:
            found["policy_lag_mean"] = sum(window.lags) / len(window.lags)
            found["policy_lag_max"] = float(max(window.lags))
            found["weights_age_seconds"] = sum(window.weights_ages) / len(window.weights_ages)
        if window.busy + window.idle > 0:
            found["learner_busy_share"] = window.busy / (window.busy + window.idle)
            found["learner_idle_share"] = window.idle / (window.busy + window.idle)
        if window.busy > 0:
            found["learner_prepare_share"] = window.prepare / window.busy
        self._latest = {name: found[name] for name in FIELDS if name in found}
        return dict(self._latest)

    def export(self, tags: Mapping[str, str]) -> None:
        """Shows the last snapshot to Ray's metrics agent, and through it to Prometheus; does nothing without Ray.

        Args:
            tags: `run`, `variant` and `seed`.
        """
        if ray.is_initialized():
            _instruments(ray.get_runtime_context().get_worker_id()).show(self._latest, dict(tags))

    def get_state(self) -> dict[str, int]:
        """Returns the totals, for a checkpoint."""
        return dict(self._totals)

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from the totals of a checkpoint."""
        self._totals = {name: int(state[name]) for name in TOTALS}


class _Instruments:
    """The process's gauges and counters at Ray; totals are counters, everything else gauges."""

    def __init__(self) -> None:
        self._gauges = {
            name: metrics.Gauge(PREFIX + name, description=text, tag_keys=TAG_KEYS)
            for name, text in FIELDS.items()
            if name not in TOTALS
        }
        self._counters = {
            name: metrics.Counter(PREFIX + name, description=FIELDS[name], tag_keys=TAG_KEYS) for name in TOTALS
        }
        self._counted: dict[tuple[str, ...], float] = {}

    def show(self, snapshot: Mapping[str, float], tags: dict[str, str]) -> None:
        """Sets the gauges, and raises the counters to the snapshot's totals."""
        for name, value in snapshot.items():
            if name in self._gauges:
                self._gauges[name].set(value, tags=tags)
                continue
            key = (name, *(tags[each] for each in TAG_KEYS))
            more = value - self._counted.get(key, 0.0)
            if more > 0:
                self._counters[name].inc(more, tags=tags)
                self._counted[key] = value


@functools.lru_cache(maxsize=1)
def _instruments(worker_id: str) -> _Instruments:
    """Returns the instruments of one connection to Ray.

    They outlive a run's `Telemetry`: a run that goes on from its checkpoint in the same process must not count its
    old totals twice.
    """
    return _Instruments()


def progress_fields(snapshot: Mapping[str, float]) -> dict[str, str | float]:
    """Returns what the progress display says about remote actors; nothing where there are none.

    Args:
        snapshot: from `Telemetry.snapshot`.

    Returns:
        `actors` (alive/all), `lag` (mean), `busy` (the learner's share, 0 to 1) and, once there are any, `drops`
        (dropped and lost rollouts).
    """
    total = snapshot.get("actors_total", 0.0)
    if not total:
        return {}
    found: dict[str, str | float] = {"actors": f"{snapshot['actors_alive']:.0f}/{total:.0f}"}
    for short, name in (("lag", "policy_lag_mean"), ("busy", "learner_busy_share")):
        if name in snapshot:
            found[short] = snapshot[name]
    drops = snapshot.get("rollouts_dropped", 0.0) + snapshot.get("rollouts_lost", 0.0)
    if drops:
        found["drops"] = drops
    return found
