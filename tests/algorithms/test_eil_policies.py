"""Every policy does what its name says, and none of them touches a scribble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import IMAGES, Bench, maps_of

from raysseg.algorithms.eil.rewards import Transition, paper_reward
from raysseg.data.codec import decode_map
from raysseg.functional.random import mix, uniform

Train = Callable[..., tuple[Any, list[dict[str, Any]]]]
MakeBench = Callable[..., Bench]
PLAIN = {"training__augmentation": {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": None}}


def scribbles_of(algorithm: Any) -> np.ndarray:
    return np.stack([algorithm.store.scribble(key) for key in algorithm.train_keys])


def maps_in(batch: Any) -> np.ndarray:
    return np.stack([decode_map(one) for one in batch.column("label").to_pylist()])


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("searcher", {"eil__gate": "none"}),
        ("searcher", {"eil__otherwise": "reinfer"}),
        ("random", {"eil__gate": "none"}),
        ("random", {}),
        ("fixed", {"eil__thresholds": 0.0, "eil__window": "image"}),
        ("quantile", {"eil__quantile": 0.5}),
        ("moving_quantile", {"eil__quantile": 0.5}),
        ("greedy", {"eil__greedy_candidates": 4}),
        ("oracle", {}),
    ],
)
def test_scribbles_stay_and_labels_spread(trained: Train, policy: str, changes: dict[str, Any]) -> None:
    algorithm, records = trained(eil__policy=policy, **changes)
    scribbles = scribbles_of(algorithm)
    given = scribbles != 255
    assert algorithm.label_store.versions() == [1, 2]
    for version in (1, 2):
        maps = maps_of(algorithm, version)
        np.testing.assert_array_equal(maps[given], scribbles[given])
        assert set(np.unique(maps)) <= {0, 1, 2, 3, 4, 255}
        rows = [record for record in records if record["phase"] == "infer" and record["stage"] == version]
        assert rows[0]["labelled_share"] == pytest.approx((maps != 255).mean())
    explores = {record["stage"] for record in records if record["phase"] == "explore"}
    assert explores == ({1, 2} if policy == "searcher" or (policy == "random" and not changes) else set())


def test_the_oracle_is_always_right_and_reaches_far(trained: Train) -> None:
    algorithm, records = trained(eil__policy="oracle")
    truth = np.stack([algorithm.store.label(key) for key in algorithm.train_keys])
    for version in (1, 2):
        maps = maps_of(algorithm, version)
        labelled = (maps != 255) & (scribbles_of(algorithm) == 255)
        assert labelled.mean() > 0.05
        np.testing.assert_array_equal(maps[labelled], truth[labelled])
    rows = [record for record in records if record["phase"] == "infer"]
    assert [row["label_precision"] for row in rows] == [1.0, 1.0]
    assert [row["class_mean_precision"] for row in rows] == [1.0, 1.0]
    assert rows[1]["labelled_share"] > rows[0]["labelled_share"]


def test_none_keeps_the_scribbles_and_full_learns_the_truth(trained: Train) -> None:
    labelled = {}
    for policy in ("none", "full"):
        algorithm, records = trained(eil__policy=policy, **PLAIN)
        assert algorithm.label_store.versions() == []
        rows = [record for record in records if record["phase"] == "refine"]
        assert len(rows) == 2
        labelled[policy] = {row["labelled_pixels"] for row in rows}
        shares = [record["labelled_share"] for record in records if record["phase"] == "evaluate"]
        assert len(set(shares[1:])) == 1
        assert shares[-1] * 48 * 48 in labelled[policy]
    assert labelled["full"] == {48.0 * 48.0}
    assert labelled["none"] == {float((scribbles_of(algorithm) != 255).sum() / IMAGES)}


def test_fixed_thresholds_decide_what_is_adopted(bench: MakeBench) -> None:
    shares = []
    for thresholds in (0.0, 0.6, 0.95, 1.0):
        columns = bench(eil__policy="fixed", eil__thresholds=thresholds).infer().to_pydict()
        shares.append(sum(columns["new"]))
        assert columns["action"] == [pytest.approx([thresholds] * 2)] * IMAGES
        assert columns["value"] == [None] * IMAGES
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4
    assert shares[-1] == 0


def test_one_fixed_threshold_for_objects_one_for_ground(bench: MakeBench) -> None:
    one = bench(eil__policy="fixed", eil__thresholds=[1.0, 0.0])
    labels = maps_in(one.infer())
    scribbles = one.runner.workspace.train.labels(torch.arange(IMAGES), 0).numpy()
    assert set(np.unique(labels[scribbles == 255])) == {0, 255}, "objects need more than 1, the ground more than 0"


@pytest.mark.parametrize(("reading", "share"), [("top", 0.75), ("bottom", 0.25)])
def test_quantile_thresholds_are_those_of_the_confidences(
    trained: Train, bench: MakeBench, reading: str, share: float
) -> None:
    one = bench(eil__policy="quantile")
    state = one.runner.workspace_state(torch.arange(IMAGES), 0)
    changes = {"eil__quantile": 0.75, "eil__quantile_reading": reading, "eil__stages": 1}
    algorithm, _ = trained(eil__policy="quantile", **changes)
    for label in range(5):
        confidences = state.confidence[state.classes == label].numpy()
        if len(confidences) > 100:
            # Histogram bins are 1e-4 wide.
            assert algorithm.quantiles[label] == pytest.approx(np.quantile(confidences, share), abs=2e-3)
    assert any((state.classes == label).sum() > 100 for label in range(1, 5))


def test_moving_quantiles_move_by_their_momentum(trained: Train) -> None:
    seen: dict[float, list[float]] = {}
    for momentum in (0.0, 0.75):
        algorithm, records = trained(eil__policy="moving_quantile", eil__quantile_momentum=momentum)
        rows = [record["threshold_mean"] for record in records if record["phase"] == "infer"]
        seen[momentum] = rows[0]
        assert algorithm.quantiles == pytest.approx(rows[1])
        seen[momentum + 10] = rows[1]
    assert seen[0.0] == pytest.approx(seen[0.75]), "there is nothing before the first stage"
    assert seen[10.0] == pytest.approx(seen[10.0])
    assert max(abs(one - other) for one, other in zip(seen[10.0], seen[10.75], strict=True)) > 1e-3


def test_random_thresholds_differ_between_images_and_stages(bench: MakeBench) -> None:
    one = bench(eil__policy="random", eil__gate="none")
    first, second = (np.array(one.infer(stage=stage).column("action").to_pylist()) for stage in (1, 2))
    assert first.shape == (IMAGES, 2)
    assert len(np.unique(first)) == 2 * IMAGES
    assert not np.intersect1d(first, second).size
    assert first.min() >= 0
    assert first.max() < 1


def test_greedy_takes_the_best_of_its_candidates(bench: MakeBench) -> None:
    values = {}
    for count in (1, 6):
        one = bench(eil__policy="greedy", eil__greedy_candidates=count)
        batch = one.infer()
        state = one.runner.workspace_state(torch.arange(IMAGES), 0)
        actions = torch.tensor(batch.column("action").to_pylist())
        teacher = one.runner.segmenter.teacher
        following = one.builder.advance(teacher, state, one.builder.infer(state, actions, 1))
        seeds = torch.zeros(IMAGES, dtype=torch.int64)
        rewards = paper_reward(
            Transition(builder=one.builder, segmenter=teacher, state=state, following=following, seeds=seeds)
        ).reward
        values[count] = np.array(batch.column("value").to_pylist())
        np.testing.assert_allclose(values[count], rewards.numpy(), atol=1e-5)
        accepted = np.array(batch.column("accepted").to_pylist())
        np.testing.assert_array_equal(accepted, values[count] > 0)
    assert (values[6] >= values[1] - 1e-6).all()
    assert (values[6] > values[1] + 1e-6).any()


def test_the_assessor_decides_at_the_gate(bench: MakeBench) -> None:
    shares = {}
    for gate in ("positive", "none"):
        one = bench(eil__gate=gate, eil__operators__searcher_bias=-4.0)
        last = one.runner.operators.assessor.head[-1]
        for bias in (-1e4, 1e4):
            with torch.no_grad():
                last.bias.fill_(bias)
            batch = one.infer()
            shares[gate, bias] = np.mean(batch.column("accepted").to_pylist())
            changed = np.array(batch.column("new").to_pylist()) > 0
            np.testing.assert_array_equal(changed, batch.column("accepted").to_pylist())
            assert min(batch.column("proposed").to_pylist()) > 0
    assert shares == {("positive", -1e4): 0.0, ("positive", 1e4): 1.0, ("none", -1e4): 1.0, ("none", 1e4): 1.0}


def test_inference_takes_the_teacher_and_exploration_the_segmenter(bench: MakeBench) -> None:
    one = bench(eil__operators__searcher_bias=-1.0)
    inferred, rewards = maps_in(one.infer()), one.sample().column("reward").to_numpy()
    with torch.no_grad():
        for parameter in one.runner.segmenter.teacher.parameters():
            parameter.mul_(0.5)
    assert not np.array_equal(maps_in(one.infer()), inferred)
    np.testing.assert_array_equal(one.sample().column("reward").to_numpy(), rewards)
    with torch.no_grad():
        for parameter in one.runner.segmenter.online.parameters():
            parameter.mul_(0.5)
    assert not np.array_equal(one.sample().column("reward").to_numpy(), rewards)


def test_uniform_actions_are_those_of_the_seeds(bench: MakeBench) -> None:
    one = bench(eil__policy="random")
    batch = one.sample(seed=5)
    played = np.stack([np.frombuffer(action, np.float32) for action in batch.column("action").to_pylist()])
    seeds = mix(torch.tensor(np.array(batch.column("seed"))), 0)
    np.testing.assert_array_equal(played, uniform(seeds, 2).numpy())
