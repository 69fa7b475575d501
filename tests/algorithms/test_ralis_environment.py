"""RALIS' labelling episodes: what a step looks at, trains on and pays, and that nothing but its order decides it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch
from algorithms.tiny_ralis import CLASSES, DECODER, PER_STEP, GameBench, same_weights, weights_of
from gymnasium.utils.env_checker import check_env

import raysseg.algorithms  # noqa: F401  (registers the environment)
from raysseg.algorithms.ralis import training
from raysseg.algorithms.ralis.env import RALISVectorEnv
from raysseg.algorithms.ralis.maps import FreshMaps
from raysseg.algorithms.ralis.policies import POLICIES, Direction
from raysseg.algorithms.ralis.state import RegionDescriber, Wanted
from raysseg.algorithms.ralis.steps import STEP_SCHEMA, from_binary
from raysseg.errors import InputError, NonFiniteError
from raysseg.evaluation import Scores, confusion_matrix, predict_probabilities
from raysseg.functional.divergence import divergence_histograms
from raysseg.functional.regions import class_shares, cut_regions, entropy_map, label_shares, pooled_entropies
from raysseg.segmenters import Segmenter

Make = Callable[..., GameBench]

CHOICES = [[0, 1, 2], [2, 2, 0], [1, 0, 1]]


@contextmanager
def counted(segmenter: Segmenter) -> Iterator[dict[str, int]]:
    """Counts the images that pass the encoder and the decoder, in training and otherwise."""
    counts = {"encoded": 0, "decoded": 0, "trained": 0}
    encode, decode = segmenter.encode, segmenter.decode

    def count_encoded(images: torch.Tensor) -> list[torch.Tensor]:
        counts["encoded"] += 0 if torch.is_grad_enabled() else len(images)
        return encode(images)

    def count_decoded(encoded: list[torch.Tensor], size: tuple[int, int]) -> Any:
        counts["trained" if torch.is_grad_enabled() else "decoded"] += len(encoded[0])
        return decode(encoded, size)

    with mock.patch.object(segmenter, "encode", count_encoded), mock.patch.object(segmenter, "decode", count_decoded):
        yield counts


def miou_of(bench: GameBench, segmenter: Segmenter) -> float:
    """Returns the mean IoU on D_R the obvious way."""
    rows = torch.as_tensor(bench.sets.reward)
    data = bench.runner.workspace.train
    images, sizes = data.images(rows)
    classes = predict_probabilities(segmenter, images, sizes).argmax(1).to(torch.uint8)
    return Scores.from_confusion(confusion_matrix(classes, data.labels(rows, -1), CLASSES)).miou


# ---- what a step costs and looks at ---------------------------------------------------------------------------------


def test_every_image_passes_once_per_step(game_bench: Make) -> None:
    bench = game_bench()
    episode = bench.episode
    with counted(episode.segmenter) as counts:
        bench.reset()
        assert counts["encoded"] == len(bench.sets.reward), (
            "a reset measures D_R, so that the first reward is a difference"
        )
        for chosen in CHOICES:
            assert episode.pools is not None
            images = len(np.unique(episode.pools.rows))
            before = dict(counts)
            observation = episode.observe(POLICIES["query"].wanted)
            step = episode.label(np.array(chosen))
            passed = counts["encoded"] - before["encoded"]
            assert passed == len(bench.sets.state) + images + len(bench.sets.reward)
            assert counts["decoded"] == counts["encoded"]
            assert counts["trained"] - before["trained"] == len(np.unique(step.rows))
            assert observation.state is not None
    assert episode.over


@pytest.mark.parametrize("policy", ["uniform", "entropy", "coreset"])
def test_a_baseline_pays_only_for_what_it_looks_at(game_bench: Make, policy: str) -> None:
    bench = game_bench()
    episode = bench.reset(known=bench.sets.start)
    assert episode.pools is not None
    images = {"uniform": 0, "entropy": len(np.unique(episode.pools.rows))}
    images["coreset"] = images["entropy"] + len(bench.sets.start)
    with counted(episode.segmenter) as counts:
        bench.choose(policy)
    assert counts["encoded"] == images[policy]


def test_state_and_candidates_are_what_the_equations_say(game_bench: Make) -> None:
    bench = game_bench()
    episode = bench.reset()
    episode.observe(POLICIES["query"].wanted)
    step = episode.label(np.array(CHOICES[0]))
    observation = episode.observe(POLICIES["query"].wanted)
    data = bench.runner.workspace.train

    def described(rows: np.ndarray) -> torch.Tensor:
        images, sizes = data.images(torch.as_tensor(rows))
        probabilities = predict_probabilities(episode.segmenter, images, sizes)
        shares = class_shares(probabilities.argmax(1).to(torch.uint8), CLASSES, 2, 2, 1e-7)
        return torch.cat([shares, pooled_entropies(entropy_map(probabilities), 2, 2, 4, ("min", "mean", "max"))], 2)

    state = described(bench.sets.state).flatten(0, 1)
    torch.testing.assert_close(observation.state, state, atol=1e-3, rtol=1e-3)
    pools = observation.pools
    own = torch.stack(
        [described(np.array([row]))[0, region] for row, region in zip(pools.rows.flat, pools.regions.flat, strict=True)]
    )
    regions = [
        cut_regions(data.labels(torch.tensor([row]), -1), 2, 2)[0, region]
        for row, region in zip(step.rows, step.regions, strict=True)
    ]
    labelled = label_shares(torch.stack(regions), CLASSES, 1e-7)
    histograms = [
        divergence_histograms(own[:, :CLASSES], others, bins=32, limit=16.0) for others in (labelled, own[:, :CLASSES])
    ]
    expected = torch.cat([own, *histograms], 1).unflatten(0, pools.rows.shape)
    assert observation.candidates is not None
    torch.testing.assert_close(observation.candidates, expected, atol=1e-3, rtol=1e-3)


def test_nothing_is_labelled_at_first(game_bench: Make) -> None:
    bench = game_bench()
    observation = bench.reset().observe(POLICIES["query"].wanted)
    assert observation.candidates is not None
    to_labelled, to_candidates = observation.candidates.split([CLASSES + 48, 32, 32], 2)[1:]
    assert not to_labelled.any()
    torch.testing.assert_close(to_candidates.sum(2), torch.ones(PER_STEP, 3), atol=1e-3, rtol=0)


def test_options_change_what_a_region_is_described_by(game_bench: Make) -> None:
    bench = game_bench(ralis__regions__entropy_poolings=["max"], ralis__regions__divergences=False)
    observation = bench.reset().observe(POLICIES["query"].wanted)
    assert observation.state is not None
    assert observation.candidates is not None
    assert observation.state.shape == (3 * 4, CLASSES + 16)
    assert observation.candidates.shape == (PER_STEP, 3, CLASSES + 16)


def test_images_of_several_sizes_are_described_as_each_alone(game_bench: Make) -> None:
    bench = game_bench()

    class Source:
        """Images of two sizes at the top left of one canvas."""

        sizes = torch.tensor([[48, 48], [24, 32], [48, 48]])

        def images(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pixels = bench.runner.workspace.train.images(rows)[0].clone()
            return pixels, self.sizes[rows]

    describer = RegionDescriber(bench.settings.ralis, CLASSES, bench.runner.workspace.autocast)
    wanted = Wanted(description=True, score="entropy", features=True)
    maps = FreshMaps(Source(), 4, bench.runner.workspace.autocast)
    together = describer.describe(bench.start, maps, np.array([0, 1, 2]), wanted)
    for row in range(3):
        alone = describer.describe(bench.start, maps, np.array([row]), wanted)
        for name in ("shares", "entropies", "scores", "features"):
            torch.testing.assert_close(getattr(together, name)[row], getattr(alone, name)[0], atol=1e-5, rtol=1e-4)


# ---- oracle, training pass, reward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "decoder"])
def test_only_the_newest_regions_pixels_are_learned_from(game_bench: Make, scope: str) -> None:
    still = {"ralis__episode__augmentation": DECODER["ralis__episode__augmentation"]}
    bench = game_bench(**(DECODER if scope == "decoder" else still))
    episode = bench.reset()
    data = bench.runner.workspace.train
    for chosen in CHOICES[:2]:
        with mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss:
            step = episode.label(np.array(chosen))
        labels = torch.cat([call.args[1] for call in loss.call_args_list])
        images = np.unique(step.rows)
        expected = torch.full((len(images), 48, 48), 255, dtype=torch.uint8)
        truth = data.labels(torch.as_tensor(images), -1)
        for row, region in zip(step.rows, step.regions, strict=True):
            place = int(np.flatnonzero(images == row)[0])
            down, across = divmod(int(region), 2)
            window = (slice(24 * down, 24 * down + 24), slice(24 * across, 24 * across + 24))
            expected[place][window] = truth[place][window]
        assert torch.equal(labels, expected)
        counts = torch.bincount(expected[expected < 255].long(), minlength=CLASSES)
        assert step.class_pixels.tolist() == counts.tolist()


@pytest.mark.parametrize(("pass_size", "passes"), [(None, [5]), (2, [2, 2, 1])])
def test_a_minibatch_passes_as_one_whatever_fits_into_inference(
    game_bench: Make, pass_size: int | None, passes: list[int]
) -> None:
    bench = game_bench(**DECODER, ralis__episode__pass_size=pass_size, engine__inference_batch_size=3)
    episode = bench.reset(known=bench.sets.labelled)
    decode = episode.segmenter.decode
    with mock.patch.object(episode.segmenter, "decode", side_effect=decode) as decoded:
        episode._trainer.train(np.array([4, 7, 8, 9, 11]), np.array([0, 3, 2, 1, 1]), seed=0, progress=0.0)
    assert [len(call.args[0][-1]) for call in decoded.call_args_list] == passes


def test_unlabelled_pixels_of_the_truth_are_never_counted_nor_trained_on(game_bench: Make) -> None:
    bench = game_bench()
    data = bench.runner.workspace.train
    labels = data.labels

    def torn(rows: torch.Tensor, version: int) -> torch.Tensor:
        result = labels(rows, version).clone()
        result[:, ::2], result[:, 1::2, ::3] = 255, 254
        return result

    with (
        mock.patch.object(data, "labels", torn),
        mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss,
    ):
        episode = bench.reset()
        step = episode.label(np.array(CHOICES[0]))
    assert step.class_pixels.sum() == PER_STEP * 12 * 16
    assert sum(int((call.args[1] < 254).sum()) for call in loss.call_args_list) == PER_STEP * 12 * 16


def test_crops_hold_the_centre_of_their_region(game_bench: Make) -> None:
    augmentation = {"scale": [1.0, 1.0], "flip": 0.5, "rotation": 0.0, "crop": [20, 16]}
    bench = game_bench(ralis__episode__augmentation=augmentation)
    bench.reset()
    data = bench.runner.workspace.train
    rows, regions = np.array([4, 4, 7]), np.array([0, 3, 2])

    def marked(rows: torch.Tensor, version: int) -> torch.Tensor:
        result = torch.ones(len(rows), 48, 48, dtype=torch.uint8)
        result[:, 12::24, 12::24] = 2
        return result

    with (
        mock.patch.object(data, "labels", marked),
        mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss,
    ):
        for seed in range(8):
            bench.episode._trainer.train(rows, regions, seed=seed, progress=0.0)
    for call in loss.call_args_list:
        assert call.args[1].shape == (3, 20, 16), "each region has its own crop"
        assert ((call.args[1] == 2).flatten(1).sum(1) >= 1).all()


def test_scale_and_rotation_reach_the_training_pass(game_bench: Make) -> None:
    varied = {"scale": [0.5, 2.0], "flip": 0.5, "rotation": 20.0, "crop": [24, 24]}
    plain = {**varied, "scale": [1.0, 1.0], "rotation": 0.0}
    seen = []
    for augmentation in (varied, plain):
        bench = game_bench(ralis__episode__augmentation=augmentation)
        bench.reset()
        with mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss:
            _, steps = bench.play(CHOICES[:1], "uniform")
        assert np.isfinite(steps[0].loss)
        seen.append([call.args[1] for call in loss.call_args_list])
    assert [one.shape for one in seen[0]] == [one.shape for one in seen[1]]
    assert not all(torch.equal(one, other) for one, other in zip(*seen, strict=True)), "the crops are other pixels"


def test_the_first_reward_is_a_difference_too(game_bench: Make) -> None:
    bench = game_bench()
    episode = bench.reset()
    before = miou_of(bench, bench.start)
    assert episode.miou == pytest.approx(before, abs=1e-6)
    for chosen in CHOICES:
        step = episode.label(np.array(chosen))
        after = miou_of(bench, episode.segmenter)
        assert step.miou == pytest.approx(after, abs=1e-6)
        assert step.reward == pytest.approx(100 * (after - before), abs=1e-4)
        before = after


def test_minibatches_hold_batch_size_regions(game_bench: Make) -> None:
    bench = game_bench(ralis__episode__batch_size=2, ralis__episode__passes=3)
    episode = bench.reset()
    with mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss:
        episode.label(np.array(CHOICES[0]))
    assert len(loss.call_args_list) == 3 * 2
    for first, second in zip(loss.call_args_list[::2], loss.call_args_list[1::2], strict=True):
        pixels = [int((call.args[1] < 254).sum()) for call in (first, second)]
        assert pixels == [2 * 24 * 24, 24 * 24]


@pytest.mark.parametrize("scope", ["all", "decoder"])
def test_what_is_known_is_rehearsed_with_the_newest_regions(game_bench: Make, scope: str) -> None:
    still = {"ralis__episode__augmentation": DECODER["ralis__episode__augmentation"]}
    bench = game_bench(**(DECODER if scope == "decoder" else still), ralis__episode__rehearsal=2)
    episode = bench.reset(known=bench.sets.labelled)
    truth = bench.runner.workspace.train.labels(torch.as_tensor(bench.sets.labelled), -1)
    earlier: list[torch.Tensor] = []
    seen = {"whole": 0, "earlier": 0}
    for chosen in [*CHOICES, *CHOICES][: episode.steps]:
        with mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss:
            step = episode.label(np.array(chosen))
        newest = known_maps(bench, step.rows, step.regions)
        maps = list(torch.cat([call.args[1] for call in loss.call_args_list]))
        for expected in newest:
            maps.pop(next(place for place, one in enumerate(maps) if torch.equal(one, expected)))
        assert len(maps) == 2, "two images beside the newest regions"
        for one in maps:
            kinds = {
                "whole": any(torch.equal(one, label) for label in truth),
                "earlier": any(torch.equal(one, label) for label in earlier),
            }
            assert any(kinds.values()), "only what was known before"
            for kind, found in kinds.items():
                seen[kind] += found
        earlier = known_maps(bench, *episode.labelled)
    assert all(seen.values()), seen
    played = bench.runner.env.played(bench.sets, 0)
    assert played.known.tolist() == bench.sets.start.tolist()


def known_maps(bench: GameBench, rows: np.ndarray, regions: np.ndarray) -> list[torch.Tensor]:
    """Returns, image by image, the labels of these regions alone."""
    grid = bench.runner.settings.ralis.regions
    maps = []
    for row in np.unique(rows):
        label = bench.runner.workspace.train.labels(torch.tensor([int(row)]), -1)[0]
        asked = torch.full_like(label, 255)
        for region in regions[rows == row]:
            height, width = label.shape[0] // grid.rows, label.shape[1] // grid.columns
            top, left = (int(region) // grid.columns) * height, (int(region) % grid.columns) * width
            asked[top : top + height, left : left + width] = label[top : top + height, left : left + width]
        maps.append(asked)
    return maps


def test_rare_classes_weigh_more_in_the_pass_by_their_pixels_in_the_reward_set(game_bench: Make) -> None:
    bench = game_bench(ralis__episode__class_balance_power=0.5)
    episode = bench.reset()
    with mock.patch.object(training, "_summed_loss", side_effect=training._summed_loss) as loss:
        step = episode.label(np.array(CHOICES[0]))
    truth = bench.runner.workspace.train.labels(torch.as_tensor(bench.sets.reward), -1)
    shares = np.array([float((truth == number).sum()) for number in range(CLASSES)]) / truth.numel()
    weights = np.where(shares > 0, np.maximum(shares, 1e-9) ** -0.5, 0.0)
    weights /= weights[shares > 0].mean()
    assert loss.call_args.args[2].tolist() == pytest.approx(weights.tolist(), rel=1e-5)
    labels = loss.call_args.args[1]
    mass = sum(weights[int(label)] for label in labels[labels < 254])
    again = training._summed_loss(*loss.call_args.args).item()
    assert step.loss == pytest.approx(again / mass, rel=1e-4)


def test_a_pass_that_diverges_stops_with_its_images(game_bench: Make) -> None:
    bench = game_bench()
    episode = bench.reset()
    with torch.no_grad():
        next(episode.segmenter.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="newly labelled regions"):
        episode.label(np.array(CHOICES[0]))


# ---- a pure function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "decoder"])
def test_an_episode_is_a_pure_function_of_seed_start_and_choices(game_bench: Make, scope: str) -> None:
    bench = game_bench(**(DECODER if scope == "decoder" else {}))
    start = weights_of(bench.start)
    bench.reset(seed=4)
    observations, steps = bench.play(CHOICES)
    weights = weights_of(bench.episode.segmenter)
    bench.reset(seed=5)
    others, _ = bench.play(CHOICES)
    assert not np.array_equal(others[0].pools.rows, observations[0].pools.rows)
    bench.runner = bench.another_actor()
    for _ in range(2):
        bench.reset(seed=4)
        again, replayed = bench.play(CHOICES)
        assert [step.reward for step in replayed] == [step.reward for step in steps]
        for first, second in zip(observations, again, strict=True):
            assert torch.equal(first.state, second.state)
            assert torch.equal(first.candidates, second.candidates)
        assert same_weights(weights_of(bench.episode.segmenter), weights)
    assert same_weights(weights_of(bench.start), start), "what episodes start with is only read"


def test_other_choices_give_another_segmenter(game_bench: Make) -> None:
    bench = game_bench()
    ends = []
    for last in ([1, 0, 1], [1, 0, 2]):
        bench.reset()
        bench.play([*CHOICES[:2], last])
        ends.append(weights_of(bench.episode.segmenter))
    assert not same_weights(*ends)


@pytest.mark.parametrize("policy", ["uniform", "entropy", "bald", "coreset", "query"])
def test_acquisition_in_pieces_is_acquisition_in_one(game_bench: Make, policy: str) -> None:
    bench = game_bench(ralis__policy=policy)
    whole = bench.runner.acquire(context={"steps": 4, "seed": 9, "state": None})
    assert whole["rows"].shape == whole["regions"].shape == (4, PER_STEP)
    pairs = list(zip(whole["rows"].flat, whole["regions"].flat, strict=True))
    assert len(set(pairs)) == 4 * PER_STEP, "no region is asked for twice"
    assert set(whole["rows"].flat) <= set(bench.sets.pool)
    state, parts = None, []
    for steps in (1, 2, 5):
        bench.runner = bench.another_actor()
        parts.append(bench.runner.acquire(context={"steps": steps, "seed": 9, "state": state}))
        state = parts[-1]["state"]
    assert [len(part["rows"]) for part in parts] == [1, 2, 1], "the largest budget is 4 steps"
    for name in ("reward", "miou", "loss"):
        assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert np.array_equal(np.concatenate([part["regions"] for part in parts]), whole["regions"])
    assert state == whole["state"]


def test_acquisition_in_pieces_with_kept_maps(game_bench: Make) -> None:
    bench = game_bench(ralis__policy="entropy", **DECODER)
    whole = bench.runner.acquire(context={"steps": 3, "seed": 9, "state": None})
    bench.runner = bench.another_actor()
    first = bench.runner.acquire(context={"steps": 2, "seed": 9, "state": None})
    bench.runner = bench.another_actor()
    second = bench.runner.acquire(context={"steps": 1, "seed": 9, "state": first["state"]})
    assert second["state"] == whole["state"]


# ---- the encoder's maps ---------------------------------------------------------------------------------------------


def test_a_fixed_encoder_runs_once_per_image_over_steps_and_episodes(game_bench: Make) -> None:
    bench = game_bench(**DECODER)
    segmenter = bench.episode.segmenter
    with counted(segmenter) as counts:
        touched = set(bench.sets.reward) | set(bench.sets.state)
        for seed in (0, 1):
            bench.reset(seed=seed)
            observations, _ = bench.play(CHOICES)
            touched |= {row for one in observations for row in one.pools.rows.flat}
            assert counts["encoded"] == len(touched)
        encoder = weights_of(segmenter.encoder)
        assert same_weights(encoder, weights_of(bench.start.encoder))
        assert not same_weights(weights_of(segmenter.decoder), weights_of(bench.start.decoder))
        with torch.no_grad():
            next(bench.start.encoder.parameters()).mul_(1.1)
        bench.reset()
        assert counts["encoded"] == len(touched) + len(bench.sets.reward), "another encoder has other maps"


def test_maps_that_do_not_fit_into_memory_are_made_anew_to_the_same_values(game_bench: Make) -> None:
    results = []
    for mib in (64, 0):
        bench = game_bench(engine__cache_mib=mib, **DECODER)
        bench.reset()
        results.append((bench.play(CHOICES), weights_of(bench.episode.segmenter)))
        with counted(bench.episode.segmenter) as counts:
            bench.reset()
        assert counts["encoded"] == (0 if mib else len(bench.sets.reward))
    (kept, kept_weights), (fresh, fresh_weights) = results
    assert [step.reward for step in kept[1]] == [step.reward for step in fresh[1]]
    assert same_weights(kept_weights, fresh_weights)


def test_half_precision_maps_change_little(game_bench: Make) -> None:
    kept, fresh = game_bench(**DECODER), game_bench()
    states = [bench.reset().observe(POLICIES["query"].wanted).state for bench in (kept, fresh)]
    torch.testing.assert_close(*states, atol=0.02, rtol=0.02)


# ---- pools and bad input --------------------------------------------------------------------------------------------


def test_pools_shrink_when_the_budget_is_the_whole_pool(game_bench: Make) -> None:
    bench = game_bench()
    rows = bench.sets.pool[:3]
    episode = bench.reset(rows=rows, budget=12, pool_size=3)
    sizes = []
    while not episode.over:
        observation, choice = bench.choose("query")
        sizes.append(observation.pools.distinct)
        assert observation.candidates is not None
        assert observation.candidates.shape[:2] == (PER_STEP, 3), "the query network sees one shape"
        if observation.pools.distinct == 1:
            assert torch.equal(observation.candidates[:, 0], observation.candidates[:, 2])
        episode.label(choice.chosen)
    assert sizes == [3, 3, 2, 1]
    assert sorted(zip(*episode.labelled, strict=True)) == [(row, region) for row in sorted(rows) for region in range(4)]


def test_a_budget_beyond_the_pool_is_refused_before_it_begins(game_bench: Make) -> None:
    bench = game_bench()
    with pytest.raises(InputError, match=r"ralis\.budgets is 15 regions, but the 3 images to label have only 12"):
        bench.reset(rows=bench.sets.pool[:3], budget=15, name="ralis.budgets")


def test_a_grid_that_does_not_divide_names_the_image_and_the_nearest_that_does(game_bench: Make) -> None:
    with pytest.raises(
        InputError,
        match=r"'train-\d+' is 48x48 pixels.*grid of 2 columns x 5 rows.*columns=2, ralis\.regions\.rows=4\.",
    ):
        game_bench(ralis__regions__rows=5, ralis__sets={"state": 3, "play": 12, "start": 3, "reward": 4})


# ---- the actor's rollout --------------------------------------------------------------------------------------------


def test_explored_steps_of_an_episode_follow_one_direction(game_bench: Make) -> None:
    bench = game_bench(
        ralis__learning__exploration="direction", ralis__learning__epsilon_start=1.0, ralis__learning__epsilon_end=1.0
    )
    groups = bench.settings.ralis.regions.feature_groups(CLASSES)
    directions = []
    for seed in (3, 4):
        records = bench.sample(seed=seed)
        candidates = from_binary(records.column("candidates"), (PER_STEP, 4, CLASSES + 48 + 64))
        direction = Direction.draw(groups, seed)
        expected = [direction.follow(torch.tensor(step.astype(np.float32))).tolist() for step in candidates]
        assert records.column("chosen").to_pylist() == expected
        directions.append(direction.weights)
    assert not np.allclose(*directions), "every episode has its own"


def test_an_episode_is_recorded_step_by_step(game_bench: Make) -> None:
    bench = game_bench()
    records = bench.sample(seed=3, episode=7, first_step=10, segmenter_version=2, policy_version=5)
    assert records.schema.equals(STEP_SCHEMA)
    table = records.to_pydict()
    assert table["step"] == [0, 1, 2]
    assert table["terminated"] == [False, False, True]
    assert table["episode"] == [7] * 3
    assert (table["segmenter_version"], table["policy_version"]) == ([2] * 3, [5] * 3)
    assert table["epsilon"][0] == pytest.approx(0.05 + 0.85 * np.exp(-1), abs=1e-6)
    assert table["epsilon"][2] == pytest.approx(0.05 + 0.85 * np.exp(-1.2), abs=1e-6)
    rows: np.ndarray = np.array(table["rows"])
    assert rows.shape == (3, PER_STEP)
    assert set(rows.flat) <= set(bench.sets.play)
    states = from_binary(records.column("state"), (12, CLASSES + 48))
    candidates = from_binary(records.column("candidates"), (PER_STEP, 4, CLASSES + 48 + 64))
    again = bench.episode
    again.reset(bench.start, bench.runner.env.played(bench.sets, 3))
    for step, chosen in enumerate(table["chosen"]):
        observation = again.observe(POLICIES["query"].wanted)
        assert np.array_equal(observation.state, states[step]), "half precision loses nothing of what the policy saw"
        assert np.array_equal(observation.candidates, candidates[step])
        played = again.label(np.array(chosen))
        assert played.reward == pytest.approx(table["reward"][step], abs=1e-5)
        assert played.rows.tolist() == table["rows"][step]
        assert played.regions.tolist() == table["regions"][step]
    assert bench.sample(seed=3, episode=7, first_step=10, segmenter_version=2, policy_version=5).equals(records)


# ---- other people's agents ------------------------------------------------------------------------------------------


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gymnasium.Env:
    """The registered environment on its own scenes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return gymnasium.make("raysseg/RALIS-v0")


def test_it_passes_gymnasiums_own_checks(env: gymnasium.Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".*render.*")
        check_env(env.unwrapped)


def test_an_agent_can_play_it(env: gymnasium.Env) -> None:
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    ends, rewards = [], []
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        ends.append((terminated, truncated))
        rewards.append(reward)
        assert env.observation_space.contains(observation)
        assert 0 <= info["miou"] <= 1
    assert ends == [(False, False), (False, False), (True, False)]
    assert any(reward != 0 for reward in rewards)
    assert not any(part.any() for part in observation.values()), "nothing is left to choose"


def test_options_reach_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = gymnasium.make("raysseg/RALIS-v0", regions={"rows": 2, "columns": 3, "entropy_cells": 2})
    assert env.observation_space["state"].shape == (2 * 6, CLASSES + 12)
    with pytest.raises(InputError, match=r"ralis\.per_stp.*did you mean 'per_step'"):
        gymnasium.make("raysseg/RALIS-v0", per_stp=3)


def test_a_batch_is_its_episodes_side_by_side(game_bench: Make) -> None:
    bench = game_bench()
    env = RALISVectorEnv(bench.runner.workspace, bench.settings, num_envs=2, start=bench.start, sets=bench.sets)
    options = {"rows": torch.zeros(2, dtype=torch.int64), "seeds": torch.tensor([6, 2])}
    observation, _ = env.reset(options=options)
    assert observation["state"].shape == env.observation_space["state"].shape
    actions = torch.tensor([[0, 1, 3], [2, 2, 0]])
    following, rewards, terminated, _, _ = env.step(actions)
    assert not terminated.any()
    for number in range(2):
        bench.episode.reset(bench.start, env.played(bench.sets, [6, 2][number]))
        first = bench.episode.observe(POLICIES["query"].wanted)
        step = bench.episode.label(actions[number].numpy())
        second = bench.episode.observe(POLICIES["query"].wanted)
        assert step.reward == pytest.approx(float(rewards[number]))
        assert torch.equal(observation["candidates"][number], first.candidates)
        assert torch.equal(following["state"][number], second.state)
