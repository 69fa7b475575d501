"""CiSS-Net's reward against loops over positions, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import box_mean, context_rewards, improvement
from raysseg.functional.constants import PADDING, UNLABELLED

BOXES = st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 7)])


def slow_box_mean(values: np.ndarray, valid: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    found = np.zeros_like(values)
    for i, j in np.ndindex(*values.shape):
        rows = slice(max(0, i - box[0] // 2), i + box[0] // 2 + 1)
        columns = slice(max(0, j - box[1] // 2), j + box[1] // 2 + 1)
        inside = values[rows, columns][valid[rows, columns]]
        found[i, j] = inside.mean() if inside.size else 0.0
    return found


def slow_rewards(
    predictions: np.ndarray, actions: np.ndarray, labels: np.ndarray, box: tuple[int, int], beta: tuple[float, float]
) -> np.ndarray:
    found: np.ndarray = np.zeros(actions.shape)
    for t, b in np.ndindex(*actions.shape[:2]):
        scores, valid = np.zeros(labels.shape[1:]), labels[b] < 254
        for i, j in np.ndindex(*scores.shape):
            before, after = predictions[t, b, i, j] == labels[b, i, j], predictions[t + 1, b, i, j] == labels[b, i, j]
            scores[i, j] = {(False, True): 1.0, (True, False): -1.0, (True, True): 0.5, (False, False): 0.0}[
                before, after
            ]
        means = slow_box_mean(scores, valid, box)
        for i, j in np.ndindex(*scores.shape):
            context = int(predictions[t, b, i, j]) + 1 if actions[t, b, i, j] else 0
            bonus = beta[0] * (context == int(labels[b, i, j]) + 1) + beta[1] * (context == 0)
            found[t, b, i, j] = means[i, j] + bonus if valid[i, j] else 0.0
    return found


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(3, 7), width=st.integers(4, 8), box=BOXES)
def test_means_over_boxes_match_a_loop(seed: int, height: int, width: int, box: tuple[int, int]) -> None:
    source = np.random.default_rng(seed)
    values, valid = source.normal(size=(2, height, width)), source.random((2, height, width)) < 0.6
    dirty = torch.tensor(np.where(valid, values, np.nan))
    found = box_mean(dirty, torch.tensor(valid), box)
    for number in range(2):
        np.testing.assert_allclose(found[number], slow_box_mean(values[number], valid[number], box), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 3), box=BOXES)
def test_rewards_match_a_loop(seed: int, steps: int, box: tuple[int, int]) -> None:
    source = np.random.default_rng(seed)
    predictions = source.integers(0, 3, (steps + 1, 2, 5, 6)).astype(np.uint8)
    actions = source.random((steps, 2, 5, 6)) < 0.5
    labels = source.choice(np.array([0, 1, 2, PADDING, UNLABELLED], np.uint8), (2, 5, 6))
    found = context_rewards(
        torch.tensor(predictions),
        torch.tensor(actions),
        torch.tensor(labels),
        box=box,
        correct_weight=0.4,
        uncertain_weight=0.2,
    )
    np.testing.assert_allclose(found, slow_rewards(predictions, actions, labels, box, (0.4, 0.2)), atol=1e-6)


def test_a_reward_by_hand() -> None:
    before, after = torch.tensor([[[0, 1, 2]]], dtype=torch.uint8), torch.tensor([[[1, 1, 1]]], dtype=torch.uint8)
    labels = torch.tensor([[1, 1, 2]], dtype=torch.uint8)
    assert improvement(before, after, labels).tolist() == [[[1.0, 0.5, -1.0]]]
    found = context_rewards(
        torch.stack([before, after]),
        torch.tensor([[[[True, True, False]]]]),
        labels[None],
        box=(1, 3),
        correct_weight=0.4,
        uncertain_weight=0.2,
    )
    # Means over the box: 1.5 / 2, 0.5 / 3, -0.5 / 2; a wrong context, a right one, and none.
    assert found.flatten().tolist() == pytest.approx([0.75, 0.5 / 3 + 0.4, -0.25 + 0.2])


def test_a_void_position_is_never_a_correct_context() -> None:
    void = torch.full((1, 1, 1), UNLABELLED, dtype=torch.uint8)
    predictions = void.expand(2, 1, 1, 1)
    for action in (True, False):
        actions = torch.full((1, 1, 1, 1), action)
        rewards = context_rewards(predictions, actions, void, box=(1, 1), correct_weight=0.4, uncertain_weight=0.2)
        assert rewards.item() == 0.0


@pytest.mark.parametrize(("box", "words"), [((2, 3), "C_h is 2"), ((3, 9), r"C_w is 9, .* 1 to 7 in maps of 4")])
def test_boxes_that_make_no_sense_are_named(box: tuple[int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        box_mean(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), box)


def test_shapes_that_do_not_fit_are_named() -> None:
    maps, actions = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, 1, 2, 2, dtype=torch.bool)
    weights = {"box": (1, 1), "correct_weight": 0.4, "uncertain_weight": 0.2}
    with pytest.raises(InputError, match=r"expected \[T\+1, B, H, W\] and \[T, B, H, W\]"):
        context_rewards(maps, actions, maps[0], **weights)
    with pytest.raises(InputError, match="labels is"):
        context_rewards(maps, actions[1:], maps, **weights)
