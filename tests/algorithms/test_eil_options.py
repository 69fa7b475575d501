"""Every option of EIL changes what it is named after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import IMAGES, Bench

from raysseg.core.learner import Preparation
from raysseg.core.work import share_of
from raysseg.data.codec import decode_map
from raysseg.functional.ddpg import explore
from raysseg.functional.random import mix

Train = Callable[..., tuple[Any, list[dict[str, Any]]]]
MakeBench = Callable[..., Bench]
ALL = torch.arange(IMAGES)


def state_and_map(bench: Bench, action: float | list[float], stage: int = 1, labels: torch.Tensor | None = None) -> Any:
    """Returns the teacher's state of all whole images and the map that one action gives them."""
    state = bench.runner.workspace_state(ALL, 0)
    if labels is not None:
        state = bench.builder.relabel(state, labels)
    size = bench.settings.eil.action_size(5)
    actions = torch.tensor(action, dtype=torch.float32).expand(IMAGES, size)
    return state, bench.builder.infer(state, actions, stage)


def labelled(labels: torch.Tensor) -> torch.Tensor:
    return labels < 254


def rewards(bench: Bench, seed: int = 0) -> np.ndarray:
    """Returns the rewards of four episodes played with thresholds of 0.3, free of what the operators say."""
    bench.runner.operators.searcher.last.weight.data.zero_()
    bench.runner.operators.searcher.last.bias.data.fill_(float(np.log(0.3 / 0.7)))
    return bench.sample(seed=seed, noise_std=0.0, uniform_share=0.0).column("reward").to_numpy()


def near(labels: torch.Tensor, window: int, shape: str) -> torch.Tensor:
    """Whether a pixel is in the window of some label of each class, bool `[B, K, H, W]`, by moving the map to every offset."""
    radius, (height, width) = window // 2, labels.shape[-2:]
    planes = torch.nn.functional.pad(torch.stack([labels == label for label in range(5)], 1), [radius] * 4)
    result = torch.zeros(len(labels), 5, height, width, dtype=torch.bool)
    for down in range(window):
        for right in range(window):
            if shape == "square" or (down - radius) ** 2 + (right - radius) ** 2 <= radius**2:
                result |= planes[:, :, down : down + height, right : right + width]
    return result


# ---- the window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 9, "image"])
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_labels_spread_over_the_window_and_no_further(bench: MakeBench, window: Any, shape: str) -> None:
    one = bench(eil__window=window, eil__window_shape=shape)
    state, labels = state_and_map(one, 0.0)
    new = labelled(labels) & ~labelled(state.scribbles)
    if window == "image":
        present = torch.stack([(state.labels == label).flatten(1).any(1) for label in range(5)], 1)
        reach = present[torch.arange(IMAGES)[:, None, None], state.classes.long()]
    else:
        reach = near(state.labels, window, shape).gather(1, state.classes.long()[:, None])[:, 0]
    assert torch.equal(new, reach & ~labelled(state.scribbles))
    assert bool(new.any()) is (window != 1)


def test_a_disc_lies_inside_its_square(bench: MakeBench) -> None:
    square, disc = (labelled(state_and_map(bench(eil__window_shape=shape), 0.0)[1]) for shape in ("square", "disc"))
    assert bool((disc <= square).all())
    assert disc.sum() < square.sum()


def test_a_ladder_has_its_own_window_in_each_stage(bench: MakeBench) -> None:
    ladder = bench(eil__window=[5, 13])
    for stage, side in ((1, 5), (2, 13)):
        fixed = bench(eil__window=side)
        assert torch.equal(state_and_map(ladder, 0.2, stage)[1], state_and_map(fixed, 0.2, stage)[1])
    assert [ladder.settings.eil.radius_of(stage) for stage in (1, 2)] == [5, 17]
    assert bench(eil__window=["image", 5]).settings.eil.radius_of(2) is None


def test_without_class_wise_windows_every_class_spreads_from_every_label(bench: MakeBench) -> None:
    narrow, wide = (state_and_map(bench(eil__window_class_wise=flag), 0.0)[1] for flag in (True, False))
    assert bool((labelled(narrow) <= labelled(wide)).all())
    assert labelled(wide).sum() > labelled(narrow).sum()


def test_the_anchor_says_from_which_map_the_window_is_measured(bench: MakeBench) -> None:
    grown = {}
    for anchor in ("current", "scribbles"):
        one = bench(eil__window_anchor=anchor)
        _, first = state_and_map(one, 0.0)
        _, second = state_and_map(one, 0.0, 2, first)
        grown[anchor] = int(labelled(second).sum() - labelled(first).sum())
    assert grown["current"] > 0
    assert grown["scribbles"] == 0, "the same window around the scribbles reaches nothing new"


# ---- what is adopted, and what the rest holds -------------------------------------------------------------------------


def test_otherwise_says_what_a_pixel_holds_that_adopts_nothing(bench: MakeBench) -> None:
    for otherwise, kept in (("keep", True), ("reinfer", False)):
        one = bench(eil__otherwise=otherwise)
        state, first = state_and_map(one, 0.0)
        _, second = state_and_map(one, 1.0, 2, first)
        assert torch.equal(second, first if kept else state.scribbles)


def test_grow_reads_the_thresholds_as_override_and_grow(bench: MakeBench) -> None:
    one = bench(eil__action_semantics="grow")
    state, _ = state_and_map(one, 0.0)
    wrong = torch.where(labelled(state.scribbles) | (state.classes == 0), state.scribbles, 0).to(torch.uint8)
    _, grown = state_and_map(one, [1.0, 0.0], labels=wrong)
    assert torch.equal(grown[labelled(wrong)], wrong[labelled(wrong)])
    assert bool((labelled(grown) & ~labelled(wrong)).any())
    _, overridden = state_and_map(one, [0.0, 1.0], labels=wrong)
    assert torch.equal(labelled(overridden), labelled(wrong))
    assert not torch.equal(overridden, wrong)
    for reading, adopts in ((one, False), (bench(), True)):
        _, labels = state_and_map(reading, [0.0, 1.0])
        assert bool((labelled(labels) & ~labelled(state.scribbles)).any()) is adopts, (
            "objects are new only by their class"
        )


@pytest.mark.parametrize(("action", "size"), [("shared", 1), ("object_ground", 2), ("per_class", 5), ("mask", 144)])
def test_every_action_is_played_learned_from_and_inferred_with(bench: MakeBench, action: str, size: int) -> None:
    fusion = "planes" if action == "mask" else "hidden"
    one = bench(eil__action=action, eil__operators__fusion=fusion, eil__gate="none")
    assert one.runner.env.single_action_space.shape == (size,)
    records = one.sample()
    before = [value.clone() for value in one.learner._operators().searcher.parameters()]
    numbers = one.learn(records)
    assert all(np.isfinite(number).all() for name, number in numbers.items() if name != "timing")
    assert numbers["action_sensitivity"] > 0
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, one.learner._operators().searcher.parameters(), strict=True)
    ]
    assert np.mean(moved) > 0.9
    played = np.array(one.infer().column("action").to_pylist())
    assert played.shape == (IMAGES, size)
    assert 0 <= played.min() < played.max() <= 1


def test_thresholds_per_class_hold_for_their_class(bench: MakeBench) -> None:
    one = bench(eil__action="per_class")
    state, labels = state_and_map(one, [1.0, 0.0, 1.0, 1.0, 1.0])
    new = labels[labelled(labels) & ~labelled(state.scribbles)]
    assert new.unique().tolist() == [1]


def test_a_mask_of_ones_adopts_and_of_zeros_does_not(bench: MakeBench) -> None:
    one = bench(eil__action="mask", eil__operators__fusion="planes")
    state = one.runner.workspace_state(ALL, 0)
    nothing, everything = (one.builder.infer(state, torch.full((IMAGES, 144), value), 1) for value in (0.0, 1.0))
    assert torch.equal(nothing, state.scribbles)
    assert torch.equal(everything, state_and_map(bench(), 0.0)[1])


# ---- the reward -------------------------------------------------------------------------------------------------------


def test_each_distance_and_sharpness_pays_otherwise(bench: MakeBench) -> None:
    seen = {
        str(changes): rewards(bench(**changes))
        for changes in (
            {"eil__distance": "cosine"},
            {"eil__distance": "l1"},
            {"eil__distance": "l2"},
            {"eil__distance": "inner"},
            {"eil__delta": 3.0},
        )
    }
    names = list(seen)
    for index, name in enumerate(names):
        assert np.isfinite(seen[name]).all()
        for other in names[index + 1 :]:
            assert np.abs(seen[name] - seen[other]).max() > 1e-4, (name, other)


def test_virtual_steps_pay_for_features_too(bench: MakeBench) -> None:
    seen = {}
    for steps in (0, 1, 2):
        one = bench(eil__virtual_steps=steps)
        seen[steps] = rewards(one)
        parts = np.array(one.sample().column("reward_parts").to_pylist())
        assert bool((np.abs(parts[:, 1]) > 1e-6).any()) is (steps > 0), "features stay where the segmenter is frozen"
    assert np.abs(seen[0] - seen[1]).max() > 1e-5
    assert np.abs(seen[1] - seen[2]).max() > 1e-5


def test_each_scope_and_rate_of_the_virtual_step_differs(bench: MakeBench) -> None:
    seen = []
    for changes in (
        {},
        {"eil__virtual_scope": "all"},
        {"eil__virtual_learning_rate": 0.3},
        {"eil__virtual_clip_norm": 0.01},
        {"eil__virtual_clip_norm": None, "eil__virtual_learning_rate": 0.3},
    ):
        one = bench(eil__virtual_steps=1, **changes)
        state = one.runner.workspace_state(ALL, 0)
        following = one.builder.advance(one.runner.segmenter.teacher, state, state_and_map(one, 0.3)[1])
        seen.append(following.features)
    for index, first in enumerate(seen):
        for second in seen[index + 1 :]:
            assert (first - second).abs().max() > 1e-6


def test_the_head_alone_moves_probabilities_and_no_features(bench: MakeBench) -> None:
    one = bench(eil__virtual_steps=1, eil__virtual_scope="head", eil__virtual_learning_rate=0.3)
    state = one.runner.workspace_state(ALL, 0)
    following = one.builder.advance(one.runner.segmenter.teacher, state, state_and_map(one, 0.3)[1])
    torch.testing.assert_close(following.features, state.features)
    assert (following.probabilities - state.probabilities).abs().max() > 1e-3


# ---- what the operators learn from ------------------------------------------------------------------------------------


def test_gamma_and_the_terminal_state_decide_the_target(bench: MakeBench) -> None:
    targets, mean = {}, 0.0
    for gamma in (0.0, 0.5, 0.9):
        one = bench(eil__gamma=gamma)
        records = one.sample()
        mean = float(np.mean(records.column("reward").to_numpy()))
        targets[gamma] = one.learn(records)["target"] - mean
    assert targets[0.0] == pytest.approx(0.0, abs=1e-6)
    assert targets[0.9] != 0
    assert targets[0.5] == pytest.approx(targets[0.9] * 0.5 / 0.9, rel=1e-3)
    for bootstrap in (False, True):
        one = bench(eil__terminal_bootstrap=bootstrap)
        records = one.sample(stage=2)
        assert set(records.column("terminated").to_pylist()) == {not bootstrap}
        gained = one.learn(records)["target"] - float(np.mean(records.column("reward").to_numpy()))
        assert (abs(gained) > 1e-5) is bootstrap


def test_noise_and_uniform_actions_are_what_exploration_adds(bench: MakeBench) -> None:
    one = bench()
    quiet, again = (one.sample(noise_std=0.0).column("action").to_pylist() for _ in range(2))
    assert quiet == again
    loud = one.sample(noise_std=0.3).column("action").to_pylist()
    uniform = one.sample(uniform_share=1.0).column("action").to_pylist()
    plain = torch.from_numpy(np.stack([np.frombuffer(one, np.float32) for one in quiet]))
    seeds = mix(torch.tensor(np.array(one.orders().column("seed"))), 0)
    for played, noise, share in ((loud, 0.3, 0.0), (uniform, 0.1, 1.0)):
        expected = explore(plain, seeds, noise_std=noise, uniform_share=share)
        np.testing.assert_array_equal(np.stack([np.frombuffer(one, np.float32) for one in played]), expected.numpy())
        assert played != quiet


def test_augmentation_can_be_switched_off(bench: MakeBench) -> None:
    for augment in (True, False):
        one = bench(eil__exploration__augment=augment, eil__exploration__noise_std=0.0)
        first, second = (one.sample(seed=seed).column("next_labels").to_pylist() for seed in (0, 1))
        assert (first == second) is not augment


def test_targets_follow_at_kappa(bench: MakeBench) -> None:
    for kappa in (0.25, 1.0):
        one = bench(eil__exploration__kappa=kappa)
        module, records = one.learner._operators(), one.sample()
        old = [value.clone() for value in module.target_assessor.parameters()]
        one.learn(records)
        for target, start, now in zip(
            module.target_assessor.parameters(), old, module.assessor.parameters(), strict=True
        ):
            torch.testing.assert_close(target, (1 - kappa) * start + kappa * now)


@pytest.mark.parametrize("name", ["searcher", "assessor"])
def test_each_operator_has_its_own_optimiser(bench: MakeBench, name: str) -> None:
    def moved(**optimiser: Any) -> dict[str, float]:
        settings = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1e-3, "schedule": "constant"}
        one = bench(**{f"eil__exploration__{name}_optimiser": {**settings, **optimiser}})
        module, records = one.learner._operators(), one.sample()
        networks = {"searcher": module.searcher, "assessor": module.assessor}
        old = {key: [value.detach().clone() for value in network.parameters()] for key, network in networks.items()}
        one.learn(records, update=5, total_updates=10)
        return {
            key: float(torch.cat([(new.detach() - before).flatten() for new, before in pairs]).norm())
            for key, pairs in (
                (key, zip(network.parameters(), old[key], strict=True)) for key, network in networks.items()
            )
        }

    plain, slow, late, clipped = moved(), moved(learning_rate=1e-4), moved(schedule="cosine"), moved(clip_norm=1e-3)
    assert slow[name] == pytest.approx(plain[name] / 10, rel=1e-2)
    assert late[name] == pytest.approx(plain[name] / 2, rel=1e-2), "half way, the cosine is at a half"
    assert clipped[name] == pytest.approx(1e-6, rel=0.1)
    if name == "searcher":
        assert slow["assessor"] == pytest.approx(plain["assessor"], rel=1e-3)


def test_the_searcher_climbs_the_assessor(bench: MakeBench) -> None:
    one = bench(eil__exploration__searcher_optimiser={"name": "sgd", "momentum": 0.0, "learning_rate": 1e-4})
    module, records = one.learner._operators(), one.sample()
    batch = one.learner.prepare_operators(Preparation(kind="operators", records=records))
    planes = one.learner._rebuild(batch)[0].planes()

    def value() -> float:
        with torch.no_grad():
            return float(module.assessor.eval()(planes, module.searcher.train()(planes)).mean())

    before = value()
    for _ in range(3):
        one.learner._step_searcher(share_of(len(planes), 0, 1), planes, 0.0)
    assert value() > before


# ---- the operators' networks ------------------------------------------------------------------------------------------


def sizes(bench: Bench) -> tuple[int, int]:
    module = bench.runner.operators
    return tuple(sum(value.numel() for value in network.parameters()) for network in (module.searcher, module.assessor))


def test_operators_are_built_as_asked(bench: MakeBench) -> None:
    plain = sizes(bench())
    assert sizes(bench(eil__operators__backbone="resnet34"))[0] > plain[0]
    small = sizes(bench(eil__operators__hidden_units=16))
    assert (small[0], small[1] < plain[1]) == (plain[0], True)
    actions = [
        np.mean(bench(eil__operators__searcher_bias=bias).infer().column("action").to_pylist())
        for bias in (-2.0, 0.0, 2.0)
    ]
    assert actions == sorted(actions)
    assert actions[2] - actions[0] > 0.3


@pytest.mark.parametrize(("fusion", "bends"), [("hidden", True), ("linear", False), ("planes", True)])
def test_only_linear_fusion_is_affine_in_the_action(bench: MakeBench, fusion: str, bends: bool) -> None:
    one = bench(eil__operators__fusion=fusion)
    assessor = one.runner.operators.assessor.eval()
    planes = one.runner.workspace_state(ALL, 0).planes()
    with torch.no_grad():
        low, middle, high = (assessor(planes, torch.full((IMAGES, 2), value)) for value in (0.0, 0.5, 1.0))
    assert (high - low).abs().max() > 1e-3
    assert bool(((low + high) / 2 - middle).abs().max() > 1e-4) is bends


def test_an_assessor_may_start_at_zero(bench: MakeBench) -> None:
    for start, zero in (("kaiming", False), ("zero", True)):
        values = bench(eil__operators__assessor_start=start).infer().column("value").to_pylist()
        assert (values == [0.0] * IMAGES) is zero


# ---- how much of it ---------------------------------------------------------------------------------------------------


def test_numbers_of_stages_updates_and_transitions(trained: Train) -> None:
    changes = {
        "eil__stages": 1,
        "eil__exploration__updates_per_stage": 3,
        "eil__exploration__rollout_batch_size": 3,
        "eil__exploration__replay__capacity": 4,
        "engine__updates_per_iteration": 1,
    }
    algorithm, records = trained(**changes)
    rows = [record for record in records if record["phase"] == "explore"]
    assert [row["replay_size"] for row in rows] == [3, 4, 4], "4 are asked for; the oldest go first, one by one"
    assert {record["stage"] for record in records} == {0, 1}
    assert algorithm.policy_version == 3


def test_an_epoch_of_updates_is_the_default(trained: Train) -> None:
    algorithm, _ = trained(eil__exploration__updates_per_stage=None, eil__exploration__batch_size=3, eil__stages=1)
    assert algorithm.policy_version == -(-IMAGES // 3)


def test_transitions_of_an_older_segmenter_are_dropped(trained: Train) -> None:
    _, records = trained()
    rows = [record for record in records if record["phase"] == "explore"]
    assert [row["replay_dropped"] for row in rows] == [0, 8]
    assert [row["replay_size"] for row in rows] == [8, 8]


def test_maps_of_the_stages_have_the_images_sizes(trained: Train) -> None:
    algorithm, _ = trained(eil__policy="fixed", training__augmentation={"crop": [32, 32]})
    table = algorithm.label_store.table(2)
    assert {decode_map(one).shape for one in table.column("label").to_pylist()} == {(48, 48)}
    assert set(table.column("accepted").to_pylist()) == {1.0}
