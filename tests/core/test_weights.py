"""Weights packed for actors: exact, with statistics, without what actors do not need, straight from read-only memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from algorithms.tiny_eil import Bench, settings_of

from raysseg.core.modules import SEGMENTER
from raysseg.core.weights import load_weights, pack_weights, weights_bytes
from raysseg.errors import InputError

MakeBench = Callable[..., Bench]
BOTH = (SEGMENTER, "operators")


@pytest.fixture
def learner_and_actor(tmp_path: Path, store_uri: str) -> tuple[Any, Any]:
    """A learner with weights and statistics of its own, and an actor's networks."""
    bench = Bench(settings_of(), tmp_path, store_uri)
    with torch.no_grad():
        for number, module in enumerate(bench.learner.module.values()):
            for value in module.state_dict().values():
                value.add_(3 if value.dtype == torch.int64 else 0.1 + number)
    return bench.learner, bench.config.get_multi_rl_module_spec(inference_only=True).build()


def test_actors_get_exactly_the_learners_weights_through_the_object_store(
    learner_and_actor: tuple[Any, Any], ray_session: None
) -> None:
    learner, actor = learner_and_actor
    packed = ray.get(ray.put(learner.publish_weights(BOTH)))
    assert not packed["operators"]["float32"].flags.writeable, "the arrays lie in shared memory"
    load_weights(actor, packed)
    counters = 0
    for name in BOTH:
        expected = learner.module[name].state_dict()
        own = actor[name].state_dict()
        assert own
        for key, value in own.items():
            assert torch.equal(value, expected[key]), key
            counters += value.dtype == torch.int64
    assert counters > 10, "the batch normalisation's counters come along"


def test_weights_are_few_arrays_without_what_actors_never_use(learner_and_actor: tuple[Any, Any]) -> None:
    learner, actor = learner_and_actor
    packed = learner.publish_weights(BOTH)
    assert {name: set(arrays) for name, arrays in packed.items()} == {
        name: {"float32", "int64", "layout"} for name in BOTH
    }
    for name in BOTH:
        needed = sum(value.numel() * value.element_size() for value in actor[name].state_dict().values())
        assert weights_bytes({name: packed[name]}) == needed + 4
    assert any(key.startswith("target_searcher.") for key in learner.module["operators"].state_dict())
    whole = pack_weights({"operators": learner.module["operators"]}, inference_only=False)
    assert weights_bytes(whole) > 1.9 * weights_bytes({"operators": packed["operators"]})


def test_what_was_published_stays_when_the_learner_goes_on(learner_and_actor: tuple[Any, Any]) -> None:
    learner, _ = learner_and_actor
    packed = learner.publish_weights(("operators",))
    before = packed["operators"]["float32"].copy()
    with torch.no_grad():
        for value in learner.module["operators"].parameters():
            value.add_(1.0)
    np.testing.assert_array_equal(packed["operators"]["float32"], before)


def test_only_what_was_asked_for_is_published_and_changed(learner_and_actor: tuple[Any, Any]) -> None:
    learner, actor = learner_and_actor
    assert learner.publish_weights(()) == {}
    before = {key: value.clone() for key, value in actor[SEGMENTER].state_dict().items()}
    packed = learner.publish_weights(("operators",))
    assert list(packed) == ["operators"]
    load_weights(actor, packed)
    for key, value in actor[SEGMENTER].state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_of_another_network_are_refused(
    learner_and_actor: tuple[Any, Any], tmp_path: Path, store_uri: str
) -> None:
    learner, _ = learner_and_actor
    other = Bench(settings_of(eil__operators__hidden_units=16), tmp_path, store_uri)
    with pytest.raises(InputError, match="'operators' have other names or shapes"):
        load_weights(other.learner.module, learner.publish_weights(("operators",)))
    without = Bench(settings_of(eil__policy="none"), tmp_path, store_uri)
    with pytest.raises(InputError, match="'operators' came, but the modules here are segmenter"):
        load_weights(without.learner.module, learner.publish_weights(("operators",)))
