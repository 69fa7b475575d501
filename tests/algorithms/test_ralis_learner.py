"""RALIS' learner: what one update of the query network changes, against equations worked out by hand, and that it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from algorithms.tiny_ralis import CLASSES, same_weights, settings_of, weights_of

from raysseg.algorithms.ralis.config import RALISConfig
from raysseg.algorithms.ralis.learner import RALISLearner, StepBatch
from raysseg.algorithms.ralis.module import QUERY, START, QueryModule
from raysseg.algorithms.ralis.replay import StepReplay
from raysseg.algorithms.ralis.steps import StepShapes, step_records
from raysseg.core.seeding import generator
from raysseg.core.work import LearnerWork
from raysseg.errors import NonFiniteError
from raysseg.functional.double_q import double_q_targets

K, N, STEPS = 3, 4, 3
EVERYTHING = STEPS * K
"""Transitions of one episode."""
PLAIN = {"name": "sgd", "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


class LearnerBench:
    """A learner without Ray, and a replay of made-up episodes in the shapes of the small settings."""

    def __init__(self, folder: Path, store_uri: str, **changes: Any) -> None:
        settings = settings_of(**{"ralis__learning__optimiser": PLAIN, **changes})
        self.options = settings.ralis
        config = RALISConfig().apply(settings, run_dir=str(folder), store_uri=store_uri)
        self.learner = RALISLearner(config=config, module_spec=config.get_multi_rl_module_spec())
        self.learner.build()
        network = self.options.network(CLASSES)
        self.shapes = StepShapes(
            state=(network["state_size"], network["state_features"]), candidates=(K, N, network["action_features"])
        )
        learning = self.options.learning
        self.replay = StepReplay(
            learning.replay, shapes=self.shapes, return_steps=learning.return_steps, gamma=learning.gamma
        )

    @property
    def module(self) -> QueryModule:
        """The query network and its target."""
        return self.learner.module[QUERY].unwrapped()

    def add(self, number: int, reward: Callable[[np.ndarray], float], *, steps: int = STEPS) -> None:
        """Adds an episode of random states and choices; a step's reward is a function of its chosen features `[K, F]`."""
        draws = generator(number, "made-up")
        state = draws.random((steps, *self.shapes.state)).astype(np.float16)
        candidates = draws.random((steps, *self.shapes.candidates)).astype(np.float16)
        chosen = draws.integers(0, N, (steps, K))
        rewards = [reward(candidates[t, np.arange(K), chosen[t]].astype(np.float32)) for t in range(steps)]
        self.replay.add(
            step_records(
                {
                    "episode": [number] * steps,
                    "step": range(steps),
                    "terminated": [False] * (steps - 1) + [True],
                    "reward": rewards,
                    "miou": [0.5] * steps,
                    "epsilon": [0.1] * steps,
                    "mean_q": [None] * steps,
                    "rows": [[0] * K] * steps,
                    "regions": [[0] * K] * steps,
                    "chosen": list(chosen),
                    "state": state,
                    "candidates": candidates,
                    "segmenter_version": [0] * steps,
                    "policy_version": [0] * steps,
                }
            )
        )

    def draw(self, count: int, seed: int = 0) -> Any:
        """Draws transitions from the replay."""
        return self.replay.sample(count, generator(seed, "draw"))

    def learn(
        self, draw: Any, *, minibatches: tuple[int, ...] = (), first: int = 0, total: int = 100
    ) -> dict[str, Any]:
        """Does one work order."""
        sizes = minibatches or (draw.records.num_rows,)
        context = {"states": draw.states, "first_update": first, "total_updates": total}
        return self.learner.update(
            training_data=LearnerWork(kind="query", records=draw.records, context=context, minibatches=sizes)
        )

    def batch(self, draw: Any) -> StepBatch:
        """Reads a draw as the learner does."""
        return StepBatch.read(draw.records, draw.states, self.shapes.candidates[1:], torch.device("cpu"))


@pytest.fixture
def bench(tmp_path: Path, game_store: str) -> Callable[..., LearnerBench]:
    """Makes a learner with changes to the small settings."""
    return lambda **changes: LearnerBench(tmp_path, game_store, **changes)


def by_hand(made: LearnerBench, draw: Any, *, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns targets and values `[B]` of a draw, one transition at a time."""
    module, targets, values = made.module, [], []
    for row in draw.records.to_pylist():
        state = torch.tensor(draw.states[row["state_index"]]).float()[None]
        action = torch.tensor(np.frombuffer(row["action"], np.float16).astype(np.float32))[None, None]
        with torch.no_grad():
            values.append(module.query.eval()(state, action)[0, 0])
            target = torch.tensor(row["reward"])
            if not row["terminated"]:
                after = torch.tensor(draw.states[row["next_index"]]).float()[None]
                pool = torch.tensor(np.frombuffer(row["next_candidates"], np.float16).astype(np.float32)).view(1, N, -1)
                chooser, judge = (module.query, module.target_query)[:: 1 if rule == "standard" else -1]
                best = chooser(after, pool)[0].argmax()
                learning = made.options.learning
                target = target + learning.gamma**learning.return_steps * judge(after, pool)[0, best]
            targets.append(target)
    return torch.stack(targets), torch.stack(values)


@pytest.mark.parametrize(("rule", "count"), [("standard", 1), ("paper", 1), ("standard", 2)])
def test_errors_and_loss_are_those_of_the_equations(bench: Callable[..., LearnerBench], rule: str, count: int) -> None:
    # Normalised by itself, a value is the same whatever it is computed with.
    made = bench(
        ralis__learning__double_q=rule,
        ralis__learning__return_steps=count,
        ralis__learning__gamma=0.9,
        ralis__learning__normalisation="layer",
    )
    for number in range(3):
        made.add(number, lambda features: float(features.sum()))
    # A target that differs from its network.
    with torch.no_grad():
        for parameter in made.module.target_query.parameters():
            parameter.mul_(1.3)
    draw = made.draw(27, seed=1)
    targets, values = by_hand(made, draw, rule=rule)
    numbers = made.learn(draw)
    torch.testing.assert_close(torch.tensor(numbers["errors"]), (targets - values).abs(), rtol=1e-4, atol=1e-5)
    assert numbers["q_loss"] == pytest.approx(float((targets - values).square().mean()), rel=1e-4)
    assert numbers["q_value"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert numbers["q_target"] == pytest.approx(float(targets.mean()), rel=1e-4)


def test_both_rules_differ_where_the_networks_do() -> None:
    rewards, ended = torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    online, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 3.0]])
    found = [double_q_targets(rewards, ended, online, target, gamma=1.0, rule=rule) for rule in ("standard", "paper")]
    assert [one.item() for one in found] == [3.0, 1.0]


def test_a_batch_of_last_steps_has_rewards_as_targets(bench: Callable[..., LearnerBench]) -> None:
    made = bench()
    for number in range(4):
        made.add(number, lambda features: 2.5, steps=1)
    draw = made.draw(8)
    assert draw.records.column("next_candidates").null_count == 8
    assert made.batch(draw).next_candidates is None
    numbers = made.learn(draw)
    assert numbers["q_target"] == pytest.approx(2.5)
    assert all(math.isfinite(error) for error in numbers["errors"])


def test_states_that_transitions_share_pass_once(bench: Callable[..., LearnerBench]) -> None:
    made = bench()
    made.add(0, lambda features: 1.0)
    batch = made.batch(made.draw(EVERYTHING))
    assert batch.states.shape == (STEPS, *made.shapes.state)
    assert batch.states.dtype == torch.float32
    assert len(batch.index) == EVERYTHING
    assert len(batch.going_on) == len(batch.next_index) == EVERYTHING - K
    assert batch.next_candidates is not None
    assert batch.next_candidates.shape == (EVERYTHING - K, *made.shapes.candidates[1:])


def test_hard_targets_are_copies_every_so_many_updates(bench: Callable[..., LearnerBench]) -> None:
    made = bench(ralis__learning__target_interval=5)
    made.add(0, lambda features: 3.0)
    draw = made.draw(8)
    for update in range(11):
        before = weights_of(made.module.target_query)
        made.learn(draw, minibatches=(8,), first=update)
        after = weights_of(made.module.target_query)
        copied = same_weights(after, weights_of(made.module.query))
        assert copied == ((update + 1) % 5 == 0), f"update {update}"
        assert copied or same_weights(before, after)
    one = bench(ralis__learning__target_interval=2)
    one.add(0, lambda features: 3.0)
    one.learn(one.draw(8), minibatches=(4, 4), first=2)
    assert same_weights(weights_of(one.module.target_query), weights_of(one.module.query)), "minibatches count"


def test_soft_targets_move_by_a_share(bench: Callable[..., LearnerBench]) -> None:
    made = bench(ralis__learning__target="soft", ralis__learning__target_rate=0.25)
    made.add(0, lambda features: 3.0)
    before = weights_of(made.module.target_query)
    made.learn(made.draw(8))
    query = weights_of(made.module.query)
    for name, value in weights_of(made.module.target_query).items():
        moved = before[name].lerp(query[name], 0.25) if value.is_floating_point() else query[name]
        torch.testing.assert_close(value, moved, msg=name)


def test_weights_of_priorities_scale_the_gradient(bench: Callable[..., LearnerBench]) -> None:
    changes = []
    for weight in (1.0, 0.25):
        made = bench()
        made.add(0, lambda features: 3.0)
        made.learn(made.draw(8))
        draw = made.draw(8, seed=1)
        place = draw.records.schema.get_field_index("weight")
        weights = pa.array([weight] * 8, pa.float32())
        records = draw.records.set_column(place, draw.records.schema.field(place), weights)
        before = weights_of(made.module.query)
        made.learn(dataclasses.replace(draw, records=records))
        parameters = dict(made.module.query.named_parameters())
        changes.append({name: before[name] - parameters[name].detach() for name in parameters})
    assert any(change.abs().max() > 1e-3 for change in changes[0].values())
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], change / 4, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("normalisation", ["batch", "layer"])
def test_it_learns_which_candidate_pays(bench: Callable[..., LearnerBench], normalisation: str) -> None:
    made = bench(
        ralis__learning__gamma=0.0,
        ralis__learning__normalisation=normalisation,
        ralis__learning__optimiser={"name": "adam", "learning_rate": 0.003, "schedule": "cosine"},
        ralis__learning__replay={"capacity": 100_000},
        ralis__per_step=K,
    )
    for number in range(100):
        # One chosen feature decides; the reward is a step's, so that K transitions share it.
        made.add(number, lambda features: 10.0 * float(features[:, 7].mean()))
    first = None
    for update in range(50):
        numbers = made.learn(made.draw(64, seed=update), minibatches=(16,) * 4, first=4 * update, total=200)
        first = first or numbers["q_loss"]
    assert numbers["q_loss"] < first / 4
    draws = generator(99, "test")
    candidates = torch.tensor(draws.random((200, N, made.shapes.candidates[2]))).float()
    state = torch.tensor(draws.random((1, *made.shapes.state))).float()
    with torch.no_grad():
        chosen = made.module.query.eval()(state, candidates).argmax(1)
    gained = candidates[torch.arange(200), chosen, 7].mean()
    assert gained > 0.7, "a random choice has 0.5, the best of four 0.8"


def test_a_loss_that_is_not_finite_names_its_episodes(bench: Callable[..., LearnerBench]) -> None:
    made = bench()
    made.add(5, lambda features: 1.0, steps=1)
    with torch.no_grad():
        made.module.query.last.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"loss is nan; its transitions are those of step 0 of episode 5\.$"):
        made.learn(made.draw(3))


def test_phases_start_with_the_weights_that_were_kept(bench: Callable[..., LearnerBench]) -> None:
    made = bench()
    learner = made.learner
    online = learner.module["segmenter"].unwrapped().online
    start = learner.module[START].unwrapped()
    with torch.no_grad():
        online.decoder.head.bias.fill_(1.0)
    learner.capture_segmenter("network")
    with torch.no_grad():
        online.decoder.head.bias.fill_(2.0)
    learner.capture_segmenter("origin")
    kept = weights_of(online)
    optimiser = learner.get_optimizer("segmenter", "segmenter")
    online.decoder.head.bias.grad = torch.ones_like(online.decoder.head.bias)
    optimiser.step()
    assert len(optimiser.state) > 0
    assert not same_weights(weights_of(online), kept)
    learner.restart_segmenter(from_origin=True)
    assert len(optimiser.state) == 0
    assert same_weights(weights_of(online), kept)
    assert same_weights(weights_of(learner.module["segmenter"].unwrapped().teacher), kept)
    assert start.network.decoder.head.bias.unique().tolist() == [1.0]
