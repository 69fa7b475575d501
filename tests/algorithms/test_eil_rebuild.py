"""The learner rebuilds exactly what the actor saw: rewards recomputed from decisions are those that were shipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import IMAGES, Bench

from raysseg.algorithms.eil.actions import pack_actions, quantise_mask, unpack_actions
from raysseg.algorithms.eil.env import REWARD_STREAM
from raysseg.algorithms.eil.rewards import REWARDS, Transition
from raysseg.core import rollout
from raysseg.core.learner import Preparation
from raysseg.data.label_store import LabelRow
from raysseg.errors import NonFiniteError
from raysseg.functional.random import mix

MakeBench = Callable[..., Bench]
SURE = {"eil__operators__searcher_bias": -1.0}


def recomputed(bench: Bench, records: Any) -> np.ndarray:
    """Returns the rewards `[B]` of the learner's own states."""
    options = bench.settings.eil
    batch = bench.learner.prepare_operators(Preparation(kind="operators", records=records))
    state, following, actions = bench.learner._rebuild(batch)
    assert following is not None
    for stage in set(records.column("stage").to_pylist()):
        mine = np.array(records.column("stage")) == stage
        inferred = bench.learner.builder.infer(state, actions, int(stage))
        assert torch.equal(inferred[mine], following.labels[mine]), "the action does not give the map that was shipped"
    transition = Transition(
        builder=bench.learner.builder,
        segmenter=bench.learner._segmenter_module().online,
        state=state,
        following=following,
        seeds=mix(batch.seeds, REWARD_STREAM, 0),
    )
    return REWARDS[options.reward](transition).reward.numpy()


def over_the_wire(records: Any) -> Any:
    (back,) = rollout.from_bytes(rollout.to_bytes([records]))
    return back


CASES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "virtual": {"eil__virtual_steps": 2},
    "summed": {"eil__reward": "summed_reliability"},
    "held-out": {"eil__virtual_steps": 2, "eil__reward": "held_out"},
    "whole-images": {"eil__exploration__augment": False},
    "crops": {"training__augmentation": {"crop": [32, 40]}},
    "padded": {"training__augmentation": {"crop": [64, 56]}},
    "per-class": {"eil__action": "per_class"},
    "grow": {"eil__action_semantics": "grow"},
    "mask": {"eil__action": "mask", "eil__operators__fusion": "planes", "eil__operators__searcher_bias": 0.5},
    "uncached": {"engine__cache_mib": 0},
    "random": {"eil__policy": "random"},
    "two-steps": {"eil__exploration__episode_steps": 2, "eil__terminal_bootstrap": True},
}


@pytest.mark.parametrize("case", CASES)
def test_rewards_can_be_recomputed_from_decisions(bench: MakeBench, case: str) -> None:
    one = bench(**{**SURE, **CASES[case]})
    records = over_the_wire(one.sample())
    shipped = np.array(records.column("reward"))
    np.testing.assert_allclose(recomputed(one, records), shipped, atol=1e-5)
    assert np.abs(shipped).max() > 1e-4, "a reward of 0 would prove nothing"
    steps = records.column("step").to_pylist()
    assert steps == ([0] * 4 + [1] * 4 if case == "two-steps" else [0] * 4)
    stored = [one is None for one in records.column("labels").to_pylist()]
    assert stored == [step == 0 for step in steps]


def test_a_later_stage_starts_from_its_label_version(bench: MakeBench) -> None:
    one = bench(**SURE, eil__stages=3)
    batch = one.infer()
    one.runner.workspace.label_store.write(
        1,
        [
            LabelRow(key=key, label=label)
            for key, label in zip(batch.column("key").to_pylist(), batch.column("label").to_pylist(), strict=True)
        ],
    )
    first, second = one.sample(stage=2, label_version=0), one.sample(stage=2, label_version=1)
    assert first.column("next_labels").to_pylist() != second.column("next_labels").to_pylist()
    assert set(second.column("label_version").to_pylist()) == {1}
    np.testing.assert_allclose(recomputed(one, over_the_wire(second)), second.column("reward").to_numpy(), atol=1e-5)


def test_replayed_transitions_of_several_batches_rebuild_alike(bench: MakeBench) -> None:
    from raysseg.core.replay import ReplayBuffer
    from raysseg.core.seeding import generator
    from raysseg.core.settings import ReplaySettings

    one = bench(**SURE)
    buffer = ReplayBuffer(ReplaySettings(capacity=100))
    for seed in range(3):
        buffer.add(one.sample(seed=seed, policy_version=seed))
    drawn = buffer.sample(6, generator(0))
    assert len(set(drawn.column("policy_version").to_pylist())) > 1
    np.testing.assert_allclose(recomputed(one, drawn), drawn.column("reward").to_numpy(), atol=1e-5)


def test_the_same_order_gives_the_same_transitions(bench: MakeBench) -> None:
    one = bench(eil__exploration__uniform_share=0.5)
    assert one.sample(seed=3).equals(one.sample(seed=3))
    assert not one.sample(seed=3).equals(one.sample(seed=4))


def test_a_transition_carries_decisions_and_no_tensors(bench: MakeBench) -> None:
    one = bench(**SURE)
    records = one.sample()
    dense = one.runner.env.observation_space.shape
    assert rollout.wire_bytes(records) / len(records) < 1000 < 4 * np.prod(dense[1:])


@pytest.mark.parametrize("kind", ["object_ground", "mask"])
def test_actions_survive_packing(kind: str) -> None:
    actions = torch.rand(3, 12 if kind == "mask" else 2, generator=torch.Generator().manual_seed(0))
    if kind == "mask":
        assert (quantise_mask(actions) - actions).abs().max() <= 0.5 / 255 + 1e-6
        actions = quantise_mask(actions)
    packed = pack_actions(actions, kind)
    assert torch.equal(unpack_actions(packed, kind, actions.shape[1]), actions)


def test_an_action_that_is_not_finite_names_its_samples(bench: MakeBench) -> None:
    one = bench()
    with torch.no_grad():
        one.runner.operators.searcher.last.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="The action is not finite in stage 1 at policy version 3") as error:
        one.sample(policy_version=3)
    assert str(error.value).endswith("train-00000, train-00001, train-00002, train-00003.")


def test_a_reward_that_is_not_finite_is_refused(bench: MakeBench) -> None:
    one = bench()
    with torch.no_grad():
        next(one.runner.segmenter.online.decoder.parameters())[:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"is not finite in stage 1.*train-00000"):
        one.sample()


def test_an_assessor_that_is_not_finite_stops_with_its_samples(bench: MakeBench) -> None:
    one = bench()
    records = one.sample()
    with torch.no_grad():
        one.learner._operators().assessor.head[-1].bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"assessor_loss at operator update 7 is nan; its samples are train-00000"):
        one.learn(records, update=7)


def test_the_driver_and_the_actor_may_split_the_images_anyhow(bench: MakeBench) -> None:
    one = bench(**SURE)
    seeds = np.arange(IMAGES)
    context = {"stage": 1, "label_version": 0, "thresholds": None, "truth": True}

    def labels(parts: list[np.ndarray]) -> list[bytes]:
        batches = [one.runner.infer(rows=rows, context={**context, "seeds": seeds[rows]}) for rows in parts]
        return [label for batch in batches for label in batch.column("label").to_pylist()]

    whole = labels([np.arange(IMAGES)])
    assert labels(list(np.arange(IMAGES).reshape(-1, 1))) == whole
    assert labels([np.arange(3), np.arange(3, IMAGES)]) == whole
