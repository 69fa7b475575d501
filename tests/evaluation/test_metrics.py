"""Scores against a slow reference, against torchmetrics, and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from raysseg.errors import InputError
from raysseg.evaluation import Scores, confusion_matrix


def slow_matrix(prediction: Tensor, truth: Tensor, num_classes: int) -> list[list[int]]:
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for given_class, true_class in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if true_class not in (254, 255):
            matrix[true_class][given_class] += 1
    return matrix


def maps(seed: int, num_classes: int, shape: tuple[int, ...] = (2, 9, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, num_classes, shape, generator=generator, dtype=torch.uint8)
    truth = torch.randint(0, num_classes, shape, generator=generator, dtype=torch.uint8)
    reserved = torch.rand(shape, generator=generator)
    truth[reserved < 0.2] = 255
    truth[reserved > 0.9] = 254
    prediction[reserved > 0.9] = 254
    return prediction, truth


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 30))
def test_matrix_against_counting_pixel_by_pixel(seed: int, num_classes: int) -> None:
    prediction, truth = maps(seed, num_classes)
    matrix = confusion_matrix(prediction, truth, num_classes)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == slow_matrix(prediction, truth, num_classes)


def test_all_classes_that_a_map_can_hold() -> None:
    every = torch.arange(254, dtype=torch.uint8).view(1, 2, 127)
    assert torch.equal(confusion_matrix(every, every, 254), torch.eye(254, dtype=torch.int64))


def test_values_that_are_no_class_are_refused() -> None:
    truth = torch.zeros(1, 2, 2, dtype=torch.uint8)
    wrong = torch.tensor([[[0, 7], [1, 1]]], dtype=torch.uint8)
    with pytest.raises(InputError, match="truth 0 and the prediction 7, expected classes 0 to 1"):
        confusion_matrix(wrong, truth, 2)
    with pytest.raises(InputError, match="truth 7 and the prediction 0"):
        confusion_matrix(truth, wrong, 2)
    with pytest.raises(InputError, match=r"shape \[1, 2, 2\], expected the truth's \[1, 2, 1\]"):
        confusion_matrix(truth, truth[..., :1], 2)


def test_scores_worked_out_by_hand() -> None:
    # Class 0: 6 right; one 0 taken for 1, two 1 taken for 0; class 1: 1 right; class 2 occurs nowhere.
    scores = Scores.from_confusion(torch.tensor([[6, 1, 0], [2, 1, 0], [0, 0, 0]]))
    assert scores.per_class_iou == pytest.approx((6 / 9, 1 / 4, None))
    assert scores.per_class_dice == pytest.approx((12 / 15, 2 / 5, None))
    assert scores.miou == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert scores.pixel_accuracy == pytest.approx(7 / 10)
    assert scores.mean_foreground_dice == pytest.approx(2 / 5)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    scores = Scores.from_confusion(torch.tensor([[3, 1], [0, 0]]))
    assert scores.per_class_iou == (0.75, 0.0)
    assert scores.miou == 0.375
    assert scores.mean_foreground_dice == 0.0


def test_background_alone_has_no_foreground_dice() -> None:
    scores = Scores.from_confusion(torch.tensor([[4, 0], [0, 0]]))
    assert scores.mean_foreground_dice is None
    assert scores.miou == 1.0


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(InputError, match="no pixel of the truth carries a label"):
        Scores.from_confusion(torch.zeros(3, 3, dtype=torch.int64))


def test_against_torchmetrics() -> None:
    num_classes = 5
    prediction, truth = maps(7, num_classes, (3, 40, 30))
    prediction[prediction == 254] = 0
    # One class occurs nowhere, as in every small set.
    prediction[prediction == 3] = 2
    truth[truth == 3] = 4
    target = torch.where(truth == 254, 255, truth.long())
    scores = Scores.from_confusion(confusion_matrix(prediction, truth, num_classes))

    def measured(metric: torch.nn.Module) -> list[float]:
        return metric(prediction.long(), target).reshape(-1).tolist()

    ious = measured(MulticlassJaccardIndex(num_classes, average="none", ignore_index=255))
    dices = measured(MulticlassF1Score(num_classes, average="none", ignore_index=255))
    accuracy = measured(MulticlassAccuracy(num_classes, average="micro", ignore_index=255))
    assert scores.per_class_iou[3] is None
    assert scores.per_class_dice[3] is None
    for index in (0, 1, 2, 4):
        assert scores.per_class_iou[index] == pytest.approx(ious[index])
        assert scores.per_class_dice[index] == pytest.approx(dices[index])
    assert scores.miou == pytest.approx(sum(ious[index] for index in (0, 1, 2, 4)) / 4)
    assert scores.pixel_accuracy == pytest.approx(accuracy[0])
    assert scores.mean_foreground_dice == pytest.approx(sum(dices[index] for index in (1, 2, 4)) / 3)
