"""Asynchronous EIL on real actors and a remote learner, and the bytes of every message of such a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from algorithms.tiny_eil import build, play, settings_of
from end_to_end.conftest import metrics, summary, variant

from raysseg.core.actor_pool import ActorPool, Performance
from raysseg.core.learner_client import LearnerClient
from raysseg.data import open_dataset

Train = Callable[..., Path]

AHEAD = {"engine__mode": "asynchronous", "engine__num_env_runners": 2, "eil__exploration__updates_per_stage": 8}


@pytest.mark.parametrize("learners", [0, 1])
def test_actors_sample_ahead_and_every_rollout_is_played_once(train: Train, tmp_path: Path, learners: int) -> None:
    run = train(tmp_path / "run", engine__num_learners=learners, engine__write_rollouts=True, **AHEAD)
    rows = [row for row in metrics(run) if row["phase"] == "explore"]
    assert sum(row["phase_over"] for row in rows) == summary(run)["stages"][-1]["stage"]
    assert [row["update"] for row in rows if row["phase_over"]] == [8, 8]
    assert all(np.isfinite(row["assessor_loss"]) for row in rows)
    tables = [pq.read_table(path) for path in sorted((variant(run) / "rollouts").glob("*.parquet"))]
    seeds = np.concatenate([table.column("seed").to_numpy() for table in tables])
    assert len(seeds) == len(np.unique(seeds)), "no rollout is played twice"
    # A slow machine may grant an update without a new rollout; more than one for each is never played.
    assert 2 * 4 * 4 <= len(seeds) <= 2 * 8 * 4, "stages × updates × episodes of a rollout"
    versions = np.concatenate([table.column("policy_version").to_numpy() for table in tables])
    assert len(np.unique(versions)) > 2, "actors pulled weights again and again"
    lines = [json.loads(line) for line in (variant(run) / "timings.jsonl").read_text().splitlines()]
    engine = [line for line in lines if "policy_lag_mean" in line]
    assert engine, "an iteration in which rollouts arrived says how old their policy was"
    assert all(line["actors_alive"] == 2 and line["policy_lag_max"] >= line["policy_lag_mean"] for line in engine)
    assert all(0 < line["learner_busy_share"] <= 1 for line in engine)


def test_nothing_dense_crosses_a_process_boundary(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, rows_of_message = 160, 4
    sizes: dict[str, list[int]] = {"orders": [], "answers": [], "work": [], "weights": []}
    send, take = ActorPool.send, ActorPool._open
    learn, put = LearnerClient.send, ray.put

    def bytes_of(value: Any) -> int:
        return len(ray.cloudpickle.dumps(value))

    def count_order(self: ActorPool, order: Any, weights: Any, actor: int) -> None:
        sizes["orders"].append(bytes_of(Performance(order.function, order.arguments, weights)))
        send(self, order, weights, actor)

    def count_answer(self: ActorPool, ref: Any) -> list[Any]:
        answers = take(self, ref)
        sizes["answers"] += [bytes_of(answer.result) for answer in answers]
        return answers

    def count_work(self: LearnerClient, number: int, work: Any, **options: Any) -> None:
        sizes["work"].append(bytes_of(work))
        learn(self, number, work, **options)

    def count_put(value: Any, **options: Any) -> Any:
        sizes["weights"].append(bytes_of(value))
        return put(value, **options)

    monkeypatch.setattr(ActorPool, "send", count_order)
    monkeypatch.setattr(ActorPool, "_open", count_answer)
    monkeypatch.setattr(LearnerClient, "send", count_work)
    settings = settings_of(
        **AHEAD,
        engine__num_learners=1,
        engine__num_cpus_per_env_runner=0.5,
        data__synthetic__height=side,
        data__synthetic__width=side,
        training__augmentation__crop=[side, side],
    )
    store_uri = open_dataset(settings.data, tmp_path / "data").uri
    algorithm = build(settings, tmp_path / "run", store_uri)
    monkeypatch.setattr(ray, "put", count_put)
    try:
        play(algorithm)
    finally:
        algorithm.stop()
    one_map = side * side
    assert len(sizes["orders"]) > 20
    assert max(sizes["orders"]) < one_map / 4, "an order is rows, seeds and versions"
    assert max(sizes["work"]) < one_map, "work is decisions: two drawn batches of transitions at most"
    assert max(sizes["answers"]) < rows_of_message * one_map / 2, "answers are compressed label maps and numbers"
    assert sizes["weights"] == [], "weights go from the learner into the object store, not through the driver"
