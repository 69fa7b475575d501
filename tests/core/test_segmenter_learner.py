"""The segmenter's update against a slow reference, with unlabelled and padded images, and when a weight is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithms.tiny_eil import Bench, settings_of

from raysseg.core import rollout
from raysseg.core.learner import Preparation
from raysseg.data.augmentation import normalise
from raysseg.data.label_store import LabelRow
from raysseg.errors import InputError, NonFiniteError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.segmenters import upsample_logits

MakeBench = Callable[..., Bench]
PLAIN = {"training__augmentation": {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": None}}


def write_labels(bench: Bench, maps: np.ndarray, version: int = 1) -> None:
    """Writes label maps uint8 `[N, H, W]` as a label version."""
    keys = bench.learner.workspace.train.keys
    bench.learner.workspace.label_store.write(
        version, [LabelRow(key=key, label=one) for key, one in zip(keys, maps, strict=True)]
    )


def scribbles(bench: Bench) -> np.ndarray:
    return bench.learner.workspace.train.labels(torch.arange(8), 0).numpy().copy()


def parameters(bench: Bench) -> torch.Tensor:
    module = bench.learner._segmenter_module()
    return torch.cat([one.detach().flatten().clone() for one in module.online.parameters()])


def slow_loss(bench: Bench, labels: np.ndarray, weights: np.ndarray | None) -> float:
    """Cross-entropy of the first four images, pixel by pixel."""
    data, module = bench.learner.workspace.train, bench.learner._segmenter_module()
    with torch.no_grad():
        images = normalise(data.images(torch.arange(4))[0].float())
        logits = upsample_logits(module.online.train()(images).logits, (48, 48)).double().numpy()
    total, mass = 0.0, 0.0
    for image, row, column in np.argwhere(labels[:4] < PADDING):
        scores = logits[image, :, row, column]
        label = labels[image, row, column]
        weight = 1.0 if weights is None else weights[label]
        total += weight * (np.log(np.exp(scores).sum()) - scores[label])
        mass += weight
    return total / mass


def slow_weights(labels: np.ndarray, power: float) -> np.ndarray:
    counts = np.array([(labels == label).sum() for label in range(5)], dtype=float)
    weights = np.array([0.0 if count == 0 else (count / counts.sum()) ** -power for count in counts])
    return weights / weights[counts > 0].mean()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_loss_is_the_mean_over_labelled_pixels(bench: MakeBench, power: float) -> None:
    one = bench(training__class_balance_power=power, segmenter__dropout=0.0, **PLAIN)
    labels = scribbles(one)
    labels[labels == 4] = UNLABELLED  # a class that occurs nowhere has no weight
    labels[0, :, 40:] = PADDING
    write_labels(one, labels)
    expected = slow_loss(one, labels, slow_weights(labels, power) if power else None)
    numbers = one.train_segmenter(rollout.order(np.arange(4), np.zeros(4)), version=1)
    assert numbers["loss"] == pytest.approx(expected, rel=1e-5)
    assert numbers["labelled_pixels"] == (labels[:4] < PADDING).sum() / 4


@pytest.mark.parametrize(("power", "taught"), [(0.0, False), (0.5, False), (0.5, True)])
def test_inferred_labels_may_have_a_mean_of_their_own(bench: MakeBench, power: float, taught: bool) -> None:
    more: dict[str, Any] = {"training__self_training": {"weight": 1.0}} if taught else {}
    kept = {"training__class_balance_power": power, "segmenter__dropout": 0.0, **PLAIN}
    one = bench(eil__policy="fixed", training__inferred_weight=0.3, **kept, **more)
    drawn = scribbles(one)
    labels = one.learner.workspace.train.labels(torch.arange(8), -1).numpy().copy()
    # Inferring never changes a scribble, and leaves something without a label.
    labels[drawn != UNLABELLED] = drawn[drawn != UNLABELLED]
    labels[:, 30:] = drawn[:, 30:]
    write_labels(one, labels)
    inferred = np.where(drawn == UNLABELLED, labels, UNLABELLED)
    parts = [
        slow_loss(one, own, slow_weights(counted, power) if power else None)
        for own, counted in ((drawn, drawn), (inferred, labels))
    ]
    numbers = one.train_segmenter(rollout.order(np.arange(4), np.zeros(4)), version=1, self_training=taught)
    lesson = numbers["self_training_loss"] if taught else 0.0
    assert numbers["loss"] == pytest.approx(parts[0] + 0.3 * parts[1] + lesson, rel=1e-5)
    assert numbers["labelled_pixels"] == (labels[:4] < PADDING).sum() / 4
    if taught:
        assert numbers["self_training_share"] == pytest.approx((labels[:4] == UNLABELLED).mean())


@pytest.mark.parametrize("version", [0, -1])
def test_what_was_not_inferred_has_one_mean(bench: MakeBench, version: int) -> None:
    changes: dict[str, Any] = {"eil__policy": "fixed", "training__class_balance_power": 0.5, "segmenter__dropout": 0.0}
    losses = [
        bench(**changes, **more).train_segmenter(rollout.order(np.arange(4), np.zeros(4)), version=version)["loss"]
        for more in ({}, {"training__inferred_weight": 0.3})
    ]
    assert losses[0] == losses[1]


def test_class_weights_are_those_of_the_version(bench: MakeBench) -> None:
    one = bench(training__class_balance_power=1.0)
    truth = one.learner.workspace.train.labels(torch.arange(8), -1).numpy()
    for version, labels in ((0, scribbles(one)), (-1, truth), (0, scribbles(one))):
        weights = one.learner._class_weight(version)
        assert weights is not None
        np.testing.assert_allclose(weights.numpy(), slow_weights(labels, 1.0), rtol=1e-5)


def test_crops_may_be_placed_where_labels_are(bench: MakeBench) -> None:
    labels = np.full((8, 48, 48), UNLABELLED, np.uint8)
    labels[:, 40:44, 4:8] = 2
    order, shown = rollout.order(np.arange(8).repeat(20), np.arange(160)), {}
    for version, place in enumerate(("anywhere", "labelled"), start=1):
        one = bench(
            training__crop_place=place, training__augmentation={"crop": [16, 16], "rotation": 0.0, "scale": [1.0, 1.5]}
        )
        write_labels(one, labels, version)
        batch = one.learner.prepare_segmenter(Preparation(kind="segmenter", records=order, version=version))
        assert set(batch.target.unique().tolist()) == {2, UNLABELLED}
        shown[place] = int((batch.target == 2).flatten(1).any(1).sum())
    assert shown["labelled"] == 160
    assert shown["anywhere"] < 100


def test_a_crop_to_place_needs_a_crop() -> None:
    with pytest.raises(InputError, match=r"crop_place is .labelled. but augmentation\.crop is null"):
        settings_of(training__crop_place="labelled", **PLAIN)


def test_images_without_labels_teach_nothing(bench: MakeBench) -> None:
    one = bench(training__optimiser={"name": "sgd", "weight_decay": 0.0})
    labels = np.full((8, 48, 48), UNLABELLED, np.uint8)
    labels[4:] = PADDING
    write_labels(one, labels)
    before = parameters(one)
    numbers = one.train_segmenter(rollout.order(np.arange(8), np.arange(8)), version=1)
    assert (numbers["loss"], numbers["labelled_pixels"]) == (0.0, 0.0)
    assert torch.equal(parameters(one), before)


def test_one_update_moves_the_segmenter_and_its_teacher(bench: MakeBench) -> None:
    one = bench(training__teacher_momentum=0.75)
    module = one.learner._segmenter_module()
    old = {name: value.clone() for name, value in module.teacher.named_parameters()}
    before = parameters(one)
    one.train_segmenter(rollout.order(np.arange(4), np.arange(4)))
    assert not torch.equal(parameters(one), before)
    online = dict(module.online.named_parameters())
    for name, value in module.teacher.named_parameters():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * online[name])


@pytest.mark.parametrize(("interval", "moves"), [("epoch", False), ("update", True)])
def test_the_teacher_follows_at_its_interval(bench: MakeBench, interval: str, moves: bool) -> None:
    one = bench(training__teacher_interval=interval)
    module = one.learner._segmenter_module()
    before = [value.clone() for value in module.teacher.parameters()]
    one.train_segmenter(rollout.order(np.arange(4), np.arange(4)), epoch_ends=[])
    same = all(torch.equal(old, new) for old, new in zip(before, module.teacher.parameters(), strict=True))
    assert same is not moves


def test_the_learning_rate_follows_its_schedule(bench: MakeBench) -> None:
    one = bench()
    records = rollout.order(np.arange(8), np.arange(8))
    numbers = one.train_segmenter(records, first_update=5, total_updates=20, learning_rate=0.5)
    assert numbers["learning_rate"] == pytest.approx(0.5 * (1 - 6 / 20) ** 0.9)


def test_a_clipped_gradient_moves_less(bench: MakeBench) -> None:
    def moved(**changes: float) -> float:
        one = bench(training__optimiser={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, **changes})
        before = parameters(one)
        one.train_segmenter(rollout.order(np.arange(4), np.arange(4)), learning_rate=1.0)
        return float((parameters(one) - before).norm())

    assert moved(clip_norm=1e-3) == pytest.approx(1e-3, rel=1e-2)
    assert moved() > 1e-2


def test_the_head_learns_faster_by_its_multiplier(bench: MakeBench) -> None:
    one = bench(training__head_multiplier=8.0)
    optimiser = one.learner.get_optimizer("segmenter", "segmenter")
    one.train_segmenter(rollout.order(np.arange(4), np.arange(4)), learning_rate=0.25)
    rates = {group["lr"] for group in optimiser.param_groups}
    assert rates == {0.25, 2.0}


def test_dropout_depends_on_the_update_and_not_on_the_past(bench: MakeBench) -> None:
    def loss(update: int, *, disturbed: bool = False) -> float:
        one = bench(segmenter__dropout=0.5, training__optimiser={"schedule": "constant"})
        if disturbed:
            torch.rand(10)
        return one.train_segmenter(rollout.order(np.arange(4), np.arange(4)), first_update=update)["loss"]

    assert loss(0) == loss(0, disturbed=True)
    assert loss(0) != loss(1)


def test_a_loss_that_is_not_finite_names_its_samples(bench: MakeBench) -> None:
    one = bench()
    with torch.no_grad():
        next(iter(one.learner._segmenter_module().online.parameters()))[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"update 5 \(label version 0\) is nan") as error:
        one.train_segmenter(rollout.order(np.array([6, 1, 0, 3]), np.arange(4)), first_update=5)
    assert str(error.value).endswith("train-00006, train-00001, train-00000, train-00003.")


def test_one_image_alone_can_be_learned_from(bench: MakeBench) -> None:
    one = bench()
    numbers = one.train_segmenter(rollout.order(np.array([2]), np.array([5])))
    assert np.isfinite(numbers["loss"])
    assert numbers["loss"] > 0


def test_rllibs_own_update_is_refused(bench: MakeBench) -> None:
    with pytest.raises(TypeError, match="training_data"):
        bench().learner.compute_loss_for_module(module_id="segmenter")
