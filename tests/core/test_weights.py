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
from raysseg.core.weights import load_weights, weights_bytes
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
        assert needed < weights_bytes({name: packed[name]}) < 1.01 * needed
    assert any(key.startswith("target_searcher.") for key in learner.module["operators"].state_dict())


def test_publishing_changes_nothing_and_copies_nothing(learner_and_actor: tuple[Any, Any]) -> None:
    learner, _ = learner_and_actor
    module = learner.module["operators"]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    parameters = list(module.parameters())
    first = learner.publish_weights(("operators",))
    places = [value.data_ptr() for value in module.state_dict().values()]
    second = learner.publish_weights(("operators",))
    assert all(np.shares_memory(first["operators"][kind], second["operators"][kind]) for kind in ("float32", "int64"))
    assert places == [value.data_ptr() for value in module.state_dict().values()]
    assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.data_ptr() % 64 == 0


def test_a_learner_goes_on_learning_after_it_published(tmp_path: Path, store_uri: str) -> None:
    plain, publishing = (Bench(settings_of(), tmp_path, store_uri) for _ in range(2))
    actor = plain.config.get_multi_rl_module_spec(inference_only=True).build()
    records, expected = plain.sample(), []
    for update in range(3):
        expected.append(plain.learn(records, update=update))
        learner = publishing.learner
        load_weights(actor, learner.publish_weights(BOTH))
        before = actor["operators"].state_dict()["searcher.last.weight"].clone()
        assert publishing.learn(records, update=update) == expected[-1]
        assert not torch.equal(learner.module["operators"].searcher.last.weight, before), "the actor's are its own"
        assert torch.equal(actor["operators"].searcher.last.weight, before)


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
