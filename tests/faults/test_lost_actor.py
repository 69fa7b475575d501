"""Actors that die or fall silent, as real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from faults.conftest import (
    LONGEST,
    Laboratory,
    Script,
    learner_weights,
    processes,
    wait_until,
)

from raysseg.algorithms.eil.algorithm import EIL
from raysseg.core.algorithm import SegmentationAlgorithm

pytestmark = pytest.mark.slow

Make = Callable[..., Laboratory]

AHEAD = {"engine__mode": "asynchronous", "engine__rollouts_ahead": 2, "engine__stall_seconds": 1000.0}
GOES_ON_SECONDS = 5.0
"""The promise; without any actor the loop goes on after about half a second."""


def test_the_learner_goes_on_without_its_only_actor(make_laboratory: Make, ray_session: None) -> None:
    lab = make_laboratory()
    learned: dict[int, float] = {}
    seen: dict[str, float] = {}
    noticed: list[int] = []

    def look(algorithm: EIL) -> None:
        learned[algorithm.policy_version] = learner_weights(algorithm)

    def script() -> Script:
        algorithm = yield
        while algorithm.record["phase"] != "explore":
            algorithm = yield
        (actor, process), *_ = processes(algorithm).items()
        while algorithm.record["update"] < 5:
            algorithm = yield
        seen["with it"] = yield from lab.hold(algorithm, actor, process)
        lab.close_the_door()
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        algorithm = yield
        seen["seconds"] = time.monotonic() - killed
        while lab.telemetry()[-1]["actors_alive"] == 1:
            time.sleep(0.1)
            algorithm = yield
        noticed.append(algorithm.policy_version)
        while algorithm.policy_version < noticed[0] + 4:
            algorithm = yield
        lab.open_the_door()
        wait_until(lambda: len(lab.log("started")) == 2, "the actor's return")

    lab.run(script(), look=look, **AHEAD, engine__num_env_runners=1, eil__exploration__updates_per_stage=60)

    assert noticed, "four more updates were done after that, while no actor lived"
    assert seen["seconds"] < GOES_ON_SECONDS
    last = lab.telemetry()[-1]
    assert 1 <= seen["with it"] <= last["rollouts_lost"] <= 2, "an actor has at most two orders"
    assert last["actor_deaths"] == 1
    assert lab.metrics()[-1]["phase"] == "evaluate"
    assert [row["update"] for row in lab.metrics() if row["phase"] == "explore"] == list(range(1, 61))

    before, after = (row["process"] for row in lab.log("started"))
    played = lab.log("sample")
    assert {row["process"] for row in played} == {before, after}
    for row in played:
        assert row["weights"] == learned.get(row["version"], row["weights"])
    assert any(row["process"] == after and row["version"] in learned for row in played)
    numbers = lab.played()
    assert numbers == list(range(len(numbers))), "what was lost was played again, nothing twice"
    assert len(numbers) > 10, "most updates were paid for"


def test_deaths_in_step_change_no_number(
    make_laboratory: Make, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"eil__exploration__updates_per_stage": 4, "engine__inference_batch_size": 1}
    undisturbed, disturbed = make_laboratory("undisturbed"), make_laboratory("disturbed")
    with monkeypatch.context() as patch:
        # One process that does the orders of two actors, one after the other.
        patch.setattr(SegmentationAlgorithm, "num_actors", property(lambda algorithm: 2))
        undisturbed.run(**changes)

    disturbed.die_once_in("sample", "infer", "evaluate")
    disturbed.run(**changes, engine__num_env_runners=2)

    assert disturbed.deaths_left() == []
    assert disturbed.metrics() == undisturbed.metrics()
    assert disturbed.labels() == undisturbed.labels()
    assert disturbed.played() == undisturbed.played() == list(range(8))
    last = disturbed.telemetry()[-1]
    assert last["actor_deaths"] == 3
    assert 3 <= last["rollouts_lost"] <= 6, "the order that each was in, and at most the one behind it"


def test_nobody_waits_for_a_silent_actor(make_laboratory: Make, ray_session: None) -> None:
    lab = make_laboratory()
    stopped: list[int] = []
    missed = threading.Event()

    def let_go() -> None:
        missed.set()
        os.kill(stopped[0], signal.SIGCONT)

    watch = threading.Timer(LONGEST, let_go)
    resumed: list[float] = []

    def script() -> Script:
        algorithm = yield
        while algorithm.record["phase"] != "explore" or algorithm.record["update"] < 3:
            algorithm = yield
        stopped.append(processes(algorithm)[1])
        watch.start()
        os.kill(stopped[0], signal.SIGSTOP)
        for _ in range(8):
            algorithm = yield
        os.kill(stopped[0], signal.SIGCONT)
        resumed.append(time.time())
        processes(algorithm)
        while algorithm.record["update"] < 24:
            algorithm = yield
        # Silent to the end: neither scoring nor the end of the run waits for it.
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        lab.run(
            script(),
            **{**AHEAD, "engine__stall_seconds": 0.5},
            engine__num_env_runners=2,
            engine__inference_batch_size=2,
            eil__exploration__updates_per_stage=24,
        )
    finally:
        watch.cancel()
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
    assert not missed.is_set(), "the run waited for the silent actor"
    numbers = lab.played()
    assert numbers == list(range(len(numbers))), "an order that two actors played counts once"
    assert any(row["process"] == stopped[0] and row["seconds"] > resumed[0] for row in lab.log("sample"))
    assert lab.telemetry()[-1]["actor_deaths"] == 0
    assert lab.telemetry()[-1]["rollouts_lost"] == 0
