"""Unlabelled pixels learn from the teacher: against a slow reference, only where asked for, and never from padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from algorithms.tiny_eil import Bench, settings_of
from core.test_segmenter_learner import PLAIN, parameters, scribbles, slow_weights, write_labels

from raysseg.core import learner as learner_file
from raysseg.core import rollout
from raysseg.core import segmenter_batch as batch_file
from raysseg.core.learner import Preparation
from raysseg.core.schedules import schedule_factor, set_learning_rate
from raysseg.core.seeding import draw_seeds, generator
from raysseg.core.segmenter_phase import SegmenterPhase
from raysseg.data import normalise, vary_colours
from raysseg.errors import InputError, NonFiniteError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.segmenters import upsample_logits

MakeBench = Callable[..., Bench]
VIEW = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "blur": 1.0, "cutout": 0.3}
SGD = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}


def orders(count: int = 4) -> pa.RecordBatch:
    return rollout.order(np.arange(count), draw_seeds(5, "test", count=count))


def disturb_teacher(one: Bench) -> None:
    """Makes the teacher another network than the student, and surer of itself than one without training."""
    noise, teacher = torch.Generator().manual_seed(0), one.learner._segmenter_module().teacher
    with torch.no_grad():
        for value in teacher.parameters():
            value.mul_(1.1 + 0.3 * torch.randn(value.shape, generator=noise))
        teacher.decoder.head.weight.mul_(40)


def probabilities(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = upsample_logits(network(images).logits, (48, 48)).double().numpy()
    parts = np.exp(logits - logits.max(1, keepdims=True))
    return parts / parts.sum(1, keepdims=True)


def slow_numbers(one: Bench, labels: np.ndarray, records: pa.RecordBatch, power: float) -> dict[str, float]:
    """The loss and its numbers of the first four whole images, pixel by pixel."""
    options, module = one.settings.training.self_training, one.learner._segmenter_module()
    images = normalise(one.learner.workspace.train.images(torch.arange(4))[0].float())
    seen = vary_colours(images, torch.tensor(np.asarray(records.column("seed"))), options.student_view)
    teacher, student = probabilities(module.teacher.eval(), images), probabilities(module.online.train(), seen)
    weights = slow_weights(labels, power) if power else np.ones(5)
    taught = weights if options.class_balanced else np.ones(5)
    known = [np.isin(np.arange(5), one) | (options.classes == "all") for one in labels]
    total, mass, term, counted, inside, said = 0.0, 0.0, 0.0, 0, 0, 0.0
    for image, row, column in np.ndindex(4, 48, 48):
        label, p = labels[image, row, column], student[image, :, row, column]
        t = teacher[image, :, row, column] * known[image]
        t = t / t.sum()
        if label == PADDING:
            continue
        inside += 1
        if label != UNLABELLED:
            total -= weights[label] * math.log(p[label])
            mass += weights[label]
        elif max(t) >= options.confidence:
            counted += 1
            said += sum(taught * t)
            term -= sum(taught * t * np.log(p))
    return {
        "loss": total / mass + options.weight * term / said,
        "self_training_loss": term / said,
        "self_training_share": counted / inside,
    }


# ---- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "power"),
    [
        ({"weight": 1.0}, 0.0),
        ({"weight": 0.3, "student_view": VIEW}, 0.5),
        ({"weight": 2.0, "confidence": 0.6, "student_view": VIEW}, 0.0),
        ({"weight": 1.0, "classes": "labelled"}, 0.0),
        ({"weight": 1.0, "class_balanced": True}, 0.5),
        ({"weight": 1.0, "confidence": 0.7, "classes": "labelled", "class_balanced": True}, 1.0),
    ],
)
def test_the_loss_agrees_with_the_obvious_version(bench: MakeBench, options: dict[str, Any], power: float) -> None:
    one = bench(training__self_training=options, training__class_balance_power=power, segmenter__dropout=0.0, **PLAIN)
    disturb_teacher(one)
    labels, records = scribbles(one), orders()
    labels[0, :, 40:] = PADDING
    # One image knows two classes, and one of them lies where crops of half the image would not see it.
    labels[1] = UNLABELLED
    labels[1, :4, :4], labels[1, 40:, 40:] = 1, 3
    write_labels(one, labels)
    expected = slow_numbers(one, labels, records, power)
    found = one.train_segmenter(records, version=1, self_training=True)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert (0.1 < expected["self_training_share"] < 0.9) == ("confidence" in options)
    assert found["labelled_pixels"] == (labels[:4] < PADDING).sum() / 4


def test_the_student_sees_other_colours_and_the_teacher_the_same_crop(bench: MakeBench) -> None:
    one = bench(training__self_training={"weight": 1.0, "student_view": VIEW})
    module, seen, records = one.learner._segmenter_module(), {}, orders()
    for name, network in (("student", module.online), ("teacher", module.teacher)):
        network.register_forward_pre_hook(lambda own, inputs, name=name: seen.update({name: (inputs[0], own.training)}))
    one.train_segmenter(records, self_training=True)
    plain = one.learner.prepare_segmenter(Preparation(kind="segmenter", records=records, version=0))
    assert torch.equal(seen["teacher"][0], plain.images)
    varied = vary_colours(
        plain.images,
        torch.tensor(np.asarray(records.column("seed"))),
        one.settings.training.self_training.student_view,
    )
    assert torch.equal(seen["student"][0], varied)
    assert not torch.equal(varied, plain.images)
    assert (seen["student"][1], seen["teacher"][1]) == (True, False)


def test_the_teacher_has_no_gradient_and_moves_as_ever(bench: MakeBench) -> None:
    one = bench(training__self_training={"weight": 1.0}, training__teacher_momentum=0.75)
    module = one.learner._segmenter_module()
    disturb_teacher(one)
    old = {name: value.clone() for name, value in module.teacher.state_dict().items() if value.is_floating_point()}
    one.train_segmenter(orders(), self_training=True)
    online = module.online.state_dict()
    assert all(value.grad is None and not value.requires_grad for value in module.teacher.parameters())
    assert all(value.grad is not None for value in module.online.parameters())
    for name, value in old.items():
        torch.testing.assert_close(module.teacher.state_dict()[name], 0.75 * value + 0.25 * online[name])


def test_images_without_labels_teach_what_the_teacher_says(bench: MakeBench) -> None:
    one = bench(training__optimiser=SGD, training__self_training={"weight": 1.0}, segmenter__dropout=0.0, **PLAIN)
    disturb_teacher(one)
    write_labels(one, np.full((8, 48, 48), UNLABELLED, np.uint8))
    losses = [
        one.train_segmenter(orders(), version=1, self_training=True, epoch_ends=[], learning_rate=0.05)
        for _ in range(6)
    ]
    assert losses[0]["loss"] == losses[0]["self_training_loss"] > 0
    assert losses[0]["self_training_share"] == 1.0
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize("confidence", [0.0, 0.6])
def test_inferred_labels_may_be_soft(bench: MakeBench, confidence: float) -> None:
    options = {"weight": 0.5, "pixels": "inferred", "confidence": confidence}
    one = bench(eil__policy="fixed", training__self_training=options, segmenter__dropout=0.0, **PLAIN)
    disturb_teacher(one)
    drawn = scribbles(one)
    # What is inferred is all wrong, which nobody may learn.
    labels = np.where((drawn == UNLABELLED) & (np.arange(48) < 20), 0, drawn).astype(np.uint8)
    write_labels(one, labels)
    module, images = one.learner._segmenter_module(), normalise(one.learner.workspace.train.images(torch.arange(4))[0])
    teacher, student = probabilities(module.teacher.eval(), images), probabilities(module.online.train(), images)
    inferred = (labels != drawn)[:4] & (teacher.max(1) >= confidence)
    terms = -(teacher * np.log(student)).sum(1)[inferred]
    counted = np.flatnonzero((drawn[:4] != UNLABELLED).ravel())
    right = np.moveaxis(student, 1, -1).reshape(-1, 5)[counted, drawn[:4].ravel()[counted]]
    found = one.train_segmenter(orders(), version=1, self_training=True)
    assert found["self_training_share"] == pytest.approx(inferred.mean())
    assert 0 < found["self_training_share"] < 1
    assert found["self_training_loss"] == pytest.approx(terms.mean(), rel=1e-5)
    assert found["loss"] == pytest.approx(-np.log(right).mean() + 0.5 * terms.mean(), rel=1e-5)
    # Before anything is inferred there is nothing that the teacher could speak of.
    assert one.train_segmenter(orders(), version=0, self_training=True)["self_training_share"] == 0


def test_a_crop_knows_the_classes_of_its_whole_image(bench: MakeBench) -> None:
    augmentation = {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": [16, 16]}
    options = {"weight": 1.0, "classes": "labelled"}
    one = bench(training__self_training=options, training__augmentation=augmentation)
    labels = np.full((8, 48, 48), UNLABELLED, np.uint8)
    labels[0, 0, 0], labels[0, 47, 47], labels[1, 0, 0] = 2, 4, 0
    write_labels(one, labels)
    batch = one.learner.prepare_self_training(Preparation(kind="self_training", records=orders(), version=1))
    assert batch.classes is not None
    nothing_known = [True] * 5
    assert batch.classes.tolist() == [
        [False, False, True, False, True],
        [True, False, False, False, False],
        nothing_known,
        nothing_known,
    ]


# ---- nothing counts, padding, what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["all labelled or padding", "no confidence"])
def test_no_pixel_that_counts_gives_no_loss(bench: MakeBench, nothing: str) -> None:
    options = {"weight": 1.0, "confidence": 1.0 if nothing == "no confidence" else 0.0}
    one = bench(training__optimiser={"name": "sgd", "weight_decay": 0.0}, training__self_training=options, **PLAIN)
    labels = np.full((8, 48, 48), UNLABELLED if nothing == "no confidence" else PADDING, np.uint8)
    write_labels(one, labels)
    before = parameters(one)
    numbers = one.train_segmenter(orders(8), version=1, self_training=True)
    assert (numbers["loss"], numbers["self_training_loss"], numbers["self_training_share"]) == (0.0, 0.0, 0.0)
    assert torch.equal(parameters(one), before)
    if nothing == "no confidence":
        return
    labels[:, 8:20, 8:20] = 1
    write_labels(one, labels, version=2)
    numbers = one.train_segmenter(orders(8), version=2, self_training=True)
    assert numbers["loss"] > 0
    assert (numbers["self_training_loss"], numbers["self_training_share"]) == (0.0, 0.0)


def test_what_lies_beside_an_image_never_counts(bench: MakeBench) -> None:
    augmentation = {"scale": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "crop": [64, 80]}
    one = bench(training__self_training={"weight": 1.0}, training__augmentation=augmentation)
    write_labels(one, np.full((8, 48, 48), UNLABELLED, np.uint8))
    batch = one.learner.prepare_self_training(Preparation(kind="self_training", records=orders(), version=1))
    assert batch.inside is not None
    assert batch.inside.sum((1, 2)).tolist() == [48 * 48] * 4
    assert torch.equal(batch.images.abs().sum(1) == 0, ~batch.inside)
    numbers = one.train_segmenter(orders(), version=1, self_training=True)
    assert numbers["self_training_share"] == 1.0, "of the pixels on images"


def test_a_teacher_that_is_not_finite_names_its_samples(bench: MakeBench) -> None:
    one = bench(training__self_training={"weight": 1.0})
    with torch.no_grad():
        next(iter(one.learner._segmenter_module().teacher.parameters()))[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"update 0 \(label version 0\) is nan; its samples are train-00000, "):
        one.train_segmenter(orders(), self_training=True)


# ---- where it does not act ----------------------------------------------------------------------------------------------


def plain_steps(one: Bench, updates: int) -> None:
    """Steps of the segmenter's optimiser, written out, without a word of self-training."""
    module, training = one.learner._segmenter_module(), one.settings.training
    optimiser = one.learner.get_optimizer("segmenter", "segmenter")
    batch = one.learner.prepare_segmenter(Preparation(kind="segmenter", records=orders(), version=0))
    for update in range(updates):
        set_learning_rate(optimiser, 0.003 * schedule_factor(training.optimiser, update / 10))
        torch.manual_seed(int(generator(0, "dropout", update).integers(2**62)))
        logits = upsample_logits(module.online.train()(batch.images).logits, (48, 48))
        total = F.cross_entropy(logits, batch.target, ignore_index=UNLABELLED, reduction="sum")
        optimiser.zero_grad()
        (total / (batch.target != UNLABELLED).sum()).backward()
        optimiser.step()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_it_every_bit_is_as_before_and_nothing_more_is_computed(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("computed without need")

    expected, one = bench(), bench(training__self_training={"weight": weight})
    plain_steps(expected, 3)
    monkeypatch.setattr(batch_file, "vary_colours", never)
    monkeypatch.setattr(learner_file, "teach", never)
    for update in range(3):
        numbers = one.train_segmenter(orders(), first_update=update)
        assert set(numbers) == {"loss", "learning_rate", "labelled_pixels"}
    assert torch.equal(parameters(one), parameters(expected))


def test_a_phase_asks_for_it_where_the_settings_give_it_a_weight() -> None:
    def asked(acts: bool, weight: float) -> bool:
        phase = SegmenterPhase(
            rows=np.arange(8),
            version=0,
            updates=2,
            first_epoch=0,
            first_update=0,
            total_updates=2,
            learning_rate=0.1,
            self_training=acts,
        )
        training = settings_of(training__self_training={"weight": weight}).training
        return bool(phase.work(0, 1, training, 0).context["self_training"])

    assert [asked(acts, weight) for acts in (False, True) for weight in (0.0, 1.0)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1.0}, r"self_training\.weight"),
        ({"confidence": 0.5}, "confidence is set but weight is 0, where it has no effect"),
        ({"weight": 1.0, "pixels": "inferred"}, "pixels is inferred, but this variant of eil infers no labels"),
        ({"classes": "labelled"}, "classes is set but weight is 0, where it has no effect"),
        ({"weight": 1.0, "class_balanced": True}, "class_balanced weighs classes by class_balance_power, which is 0"),
        ({"student_view": {"blur": 1.0}}, "student_view is set but weight is 0, where it has no effect"),
        ({"weight": 1.0, "student_view": {"blur_share": 0.1}}, "blur_share is 0.1 but blur is 0"),
        ({"weight": 1.0, "temperature": 0.5}, r"Unknown key 'training\.self_training\.temperature'"),
    ],
)
def test_settings_without_effect_are_refused_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        settings_of(eil__policy="none", training__self_training=options)
    assert "\n" not in str(error.value)
