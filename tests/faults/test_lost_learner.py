"""Learners in processes of their own that are killed."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

import pytest
from faults.conftest import Laboratory, Script

from raysseg.algorithms.eil.algorithm import EIL
from raysseg.errors import LearnerLostError

pytestmark = pytest.mark.slow

Make = Callable[..., Laboratory]


def learner_processes(algorithm: EIL) -> list[int]:
    """Returns the learners' process ids."""
    return [result.get() for result in algorithm.learner_group.foreach_learner(lambda learner: os.getpid())]


def test_a_run_goes_on_by_itself_without_its_learner(make_laboratory: Make, ray_session: None) -> None:
    undisturbed, disturbed = make_laboratory("undisturbed"), make_laboratory("disturbed")
    changes = {"eil__exploration__updates_per_stage": 6, "engine__checkpoint_interval": 2}
    undisturbed.run(**changes)
    iterations: list[int] = []

    def script() -> Script:
        algorithm = yield
        while algorithm.record["phase"] != "explore" or algorithm.record["update"] < 3:
            iterations.append(algorithm.iteration)
            algorithm = yield
        iterations.append(algorithm.iteration)
        os.kill(learner_processes(algorithm)[0], signal.SIGKILL)
        while True:
            algorithm = yield
            iterations.append(algorithm.iteration)

    disturbed.run(
        script(), **changes, engine__num_env_runners=1, engine__num_learners=1, engine__max_learner_restarts=1
    )
    again = [one for one, following in itertools.pairwise(iterations) if following <= one]
    assert len(again) == 1, "it went back once, to a checkpoint"
    assert disturbed.metrics() == undisturbed.metrics()
    assert disturbed.labels() == undisturbed.labels()
    assert disturbed.played() == list(range(6))
    said = [sentence for sentence in disturbed.notes.sentences if "died: " in sentence]
    assert len(said) == 1
    assert "(1 of 1 times)" in said[0]
    assert any(sentence.startswith("resumed at iteration") for sentence in disturbed.notes.sentences)


def test_one_of_two_learners_dies_and_then_the_other(make_laboratory: Make, ray_session: None) -> None:
    lab = make_laboratory()
    victims: list[int] = []

    def script() -> Script:
        algorithm = yield
        for rank in (1, 0):
            reached = algorithm.iteration
            while algorithm.record["phase"] != "explore" or algorithm.iteration < reached + 3:
                algorithm = yield
            victims.append(learner_processes(algorithm)[rank])
            os.kill(victims[-1], signal.SIGKILL)
            algorithm = yield

    with pytest.raises(LearnerLostError, match="A learner or replay shard died") as failure:
        lab.run(
            script(),
            engine__mode="asynchronous",
            engine__num_env_runners=1,
            engine__num_learners=2,
            engine__max_learner_restarts=1,
            engine__checkpoint_interval=2,
            eil__exploration__updates_per_stage=30,
        )
    assert len(set(victims)) == 2
    assert "\n" not in str(failure.value)
    assert sum("goes on from its newest checkpoint" in sentence for sentence in lab.notes.sentences) == 1
    updates = [row["update"] for row in lab.metrics() if row["phase"] == "explore"]
    assert updates == list(range(1, len(updates) + 1)), "the run went on where its checkpoint was"
    assert len(updates) >= 6
