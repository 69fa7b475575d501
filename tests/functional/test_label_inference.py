"""Label inference against loops over pixels, and what must hold for every map, action and window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.errors import InputError
from raysseg.functional import (
    PADDING,
    UNLABELLED,
    candidates,
    dilate_classes,
    expand_thresholds,
    infer_labels,
    infer_labels_from_mask,
    infer_labels_oracle,
    predicted_classes,
    within_window,
)


def slow_within(
    labels: np.ndarray, classes: np.ndarray, window: int | None, class_wise: bool, shape: str
) -> np.ndarray:
    """Eq. 2, pixel by pixel."""
    found = np.zeros(labels.shape, dtype=bool)
    radius = (window - 1) // 2 if window else max(labels.shape)
    for b, y, x in np.ndindex(*labels.shape):
        for v, u in np.ndindex(*labels.shape[1:]):
            label = labels[b, v, u]
            down, across = v - y, u - x
            if window and shape == "disc":
                inside = down * down + across * across <= radius * radius
            else:
                inside = max(abs(down), abs(across)) <= radius
            if inside and label < PADDING and (not class_wise or label == classes[b, y, x]):
                found[b, y, x] = True
    return found


def slow_infer(case: dict[str, Any], window: int | None, **options: Any) -> np.ndarray:
    """Eq. 1, pixel by pixel."""
    labels, scribbles, classes = (case[name].numpy() for name in ("labels", "scribbles", "classes"))
    anchor = options.get("anchor", case["labels"]).numpy()
    near = slow_within(anchor, classes, window, options.get("class_wise", True), options.get("shape", "square"))
    out = labels.copy()
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] == PADDING:
            continue
        if scribbles[b, y, x] != UNLABELLED:
            out[b, y, x] = scribbles[b, y, x]
            continue
        if options.get("semantics", "class") == "class":
            threshold = case["thresholds"][b, classes[b, y, x]]
        else:
            threshold = case["pair"][b, 1 if labels[b, y, x] == UNLABELLED else 0]
        if case["confidence"][b, y, x] > threshold and near[b, y, x]:
            out[b, y, x] = classes[b, y, x]
        elif options.get("otherwise") == "reinfer":
            out[b, y, x] = UNLABELLED
    return out


def make_case(seed: int, *, num_classes: int, size: tuple[int, int] = (11, 9), batch: int = 2) -> dict[str, Any]:
    """Random scribbles inside a random label map, a padded corner, and random predictions."""
    generator = np.random.default_rng(seed)
    shape = (batch, *size)
    truth = generator.integers(0, num_classes, shape).astype(np.uint8)
    labels = np.where(generator.random(shape) < 0.15, truth, UNLABELLED).astype(np.uint8)
    scribbles = np.where(generator.random(shape) < 0.4, labels, UNLABELLED).astype(np.uint8)
    for array in (labels, scribbles, truth):
        array[0, -3:, :] = PADDING
    # Padding counts as such also where the scribble map does not say so.
    scribbles[0, -1, :] = UNLABELLED
    probabilities = torch.from_numpy(generator.dirichlet(np.ones(num_classes), shape)).float().permute(0, 3, 1, 2)
    classes, confidence = candidates(probabilities)
    return {
        "labels": torch.from_numpy(labels),
        "scribbles": torch.from_numpy(scribbles),
        "truth": torch.from_numpy(truth),
        "classes": classes,
        "confidence": confidence,
        "thresholds": torch.from_numpy(generator.random((batch, num_classes))).float(),
        "pair": torch.from_numpy(generator.random((batch, 2))).float(),
    }


def maps(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return case["labels"], case["scribbles"], case["classes"]


def inferred(case: dict[str, Any], thresholds: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    limit = case["thresholds"] if thresholds is None else thresholds
    return infer_labels(*maps(case), case["confidence"], limit, **options)


def test_candidates_take_the_first_of_equal_classes_and_cut_at_one() -> None:
    probabilities = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0000001]]).T.reshape(1, 3, 1, 3)
    classes, confidence = candidates(probabilities)
    assert classes.dtype == torch.uint8
    assert classes.flatten().tolist() == [1, 0, 2]
    assert confidence.flatten().tolist() == [probabilities[0, 1, 0, 0].item(), 0.5, 1.0]


@pytest.mark.parametrize("num_classes", [1, 2, 21, 150])
def test_candidates_are_the_maximum_over_classes(num_classes: int) -> None:
    probabilities = torch.randn(2, num_classes, 7, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    classes, confidence = candidates(probabilities)
    values, indices = probabilities.max(dim=1)
    assert torch.equal(classes.long(), indices)
    assert torch.equal(confidence, values)
    logits = 3.0 * torch.randn(2, num_classes, 7, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(predicted_classes(logits).long(), logits.argmax(dim=1))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 0, 4, 4)])
def test_scores_without_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[B, K, H, W\]"):
        predicted_classes(torch.zeros(shape))


def test_a_pixel_without_a_number_is_never_adopted() -> None:
    classes, confidence = candidates(torch.full((1, 2, 1, 1), torch.nan))
    labels = torch.tensor([[[UNLABELLED]]], dtype=torch.uint8)
    out = infer_labels(labels, labels, classes, confidence, torch.zeros(1, 2), window=None, class_wise=False)
    assert torch.equal(out, labels)


@pytest.mark.parametrize("num_classes", [1, 8, 9, 16, 21, 32, 33, 64, 65, 200, 254])
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_dilation_finds_each_class_where_a_loop_over_pixels_does(num_classes: int, shape: Any) -> None:
    case = make_case(num_classes, num_classes=num_classes)
    labels = case["labels"]
    # The largest class is the one at the edge of a word.
    labels[1, 4, 4] = num_classes - 1
    for window in (1, 3, 5, 21):
        words = dilate_classes(labels, window, num_classes, shape=shape)
        bits = {torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}[words.dtype]
        for k in {0, num_classes // 2, num_classes - 1}:
            expected = slow_within(labels.numpy(), np.full(labels.shape, k), window, True, shape)
            assert np.array_equal(((words[:, k // bits] >> (k % bits)) & 1).bool().numpy(), expected), (k, window)


def test_a_word_is_the_narrowest_that_holds_all_classes() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.uint8)
    kinds = [(dilate_classes(labels, 3, k).dtype, dilate_classes(labels, 3, k).shape[1]) for k in (8, 9, 21, 59, 65)]
    assert kinds == [(torch.uint8, 1), (torch.int16, 1), (torch.int32, 1), (torch.int64, 1), (torch.int64, 2)]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_classes=st.sampled_from([2, 3, 21, 70]),
    window=st.sampled_from([None, 0, 1, 3, 5, 7, 41]),
    class_wise=st.booleans(),
    shape=st.sampled_from(["square", "disc"]),
    semantics=st.sampled_from(["class", "grow"]),
    otherwise=st.sampled_from(["keep", "reinfer"]),
    anchored=st.booleans(),
)
def test_inference_equals_the_loop_over_pixels(
    seed: int,
    num_classes: int,
    window: int | None,
    class_wise: bool,
    shape: Any,
    semantics: Any,
    otherwise: Any,
    anchored: bool,
) -> None:
    case = make_case(seed, num_classes=num_classes, size=(7, 6))
    options: dict[str, Any] = {"class_wise": class_wise, "shape": shape, "semantics": semantics, "otherwise": otherwise}
    if anchored:
        options["anchor"] = case["scribbles"]
    thresholds = case["thresholds" if semantics == "class" else "pair"]
    out = inferred(case, thresholds, window=window, **options)
    assert out.dtype == torch.uint8
    assert np.array_equal(out.numpy(), slow_infer(case, window, **options))
    # A number of classes that is told can only change the speed.
    assert torch.equal(out, inferred(case, thresholds, window=window, num_classes=num_classes, **options))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    window=st.sampled_from([None, 3, 5]),
    class_wise=st.booleans(),
    otherwise=st.sampled_from(["keep", "reinfer"]),
)
def test_scribbles_and_padding_never_change(seed: int, window: int | None, class_wise: bool, otherwise: Any) -> None:
    case = make_case(seed, num_classes=5)
    options: dict[str, Any] = {"window": window, "class_wise": class_wise}
    zeros = torch.zeros_like(case["thresholds"])
    mask = torch.ones_like(case["confidence"])
    labels, scribbles = case["labels"], case["scribbles"]
    for out in (
        inferred(case, zeros, otherwise=otherwise, **options),
        infer_labels_from_mask(*maps(case), mask, num_classes=5, **options),
        infer_labels_oracle(*maps(case), case["truth"], num_classes=5, **options),
    ):
        assert torch.equal(out[scribbles < PADDING], scribbles[scribbles < PADDING])
        assert torch.equal(out == PADDING, labels == PADDING)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), window=st.sampled_from([None, 1, 3, 5, 21]))
def test_a_class_wise_window_brings_no_new_class(seed: int, window: int | None) -> None:
    case = make_case(seed, num_classes=6)
    out = inferred(case, window=window)
    for before, after in zip(case["labels"], out, strict=True):
        assert set(after.unique().tolist()) - {UNLABELLED} <= set(before.unique().tolist())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), window=st.sampled_from([None, 3, 5]))
def test_thresholds_of_one_keep_the_map_and_of_zero_adopt_the_whole_window(seed: int, window: int | None) -> None:
    case = make_case(seed, num_classes=4)
    case["confidence"][0, 0] = 1.0
    ones = torch.ones_like(case["thresholds"])
    assert torch.equal(inferred(case, ones, window=window), case["labels"])
    bare = torch.where(case["labels"] == PADDING, case["labels"], case["scribbles"])
    assert torch.equal(inferred(case, ones, window=window, otherwise="reinfer"), bare)
    everything = inferred(case, ones * 0, window=window)
    near = within_window(case["labels"], case["classes"], window=window, num_classes=4)
    adopted = near & (case["scribbles"] == UNLABELLED) & (case["labels"] != PADDING)
    assert torch.equal(everything, torch.where(adopted, case["classes"], case["labels"]))


def test_six_windows_of_21_reach_as_far_as_the_papers_radii() -> None:
    labels = torch.full((1, 151, 151), UNLABELLED, dtype=torch.uint8)
    labels[0, 75, 75] = 1
    scribbles = labels.clone()
    classes = torch.ones_like(labels)
    confidence = torch.full(labels.shape, 0.9)
    extents = []
    for _ in range(6):
        labels = infer_labels(labels, scribbles, classes, confidence, torch.full((1, 2), 0.5), window=21)
        extents.append(int((labels[0, 75] == 1).sum()))
        assert int((labels == 1).sum()) == extents[-1] ** 2
    assert extents == [21, 41, 61, 81, 101, 121]


def test_the_threshold_itself_is_not_passed() -> None:
    labels = torch.tensor([[[1, UNLABELLED, UNLABELLED]]], dtype=torch.uint8)
    confidence = torch.tensor([[[0.5, 0.5, 0.75]]])
    ones = torch.ones_like(labels)
    out = infer_labels(labels, labels, ones, confidence, torch.full((1, 2), 0.5), window=5)
    assert out.flatten().tolist() == [1, UNLABELLED, 1]


def test_a_label_can_be_revised_by_a_near_label_of_another_class() -> None:
    labels = torch.tensor([[[1, 2, UNLABELLED]]], dtype=torch.uint8)
    scribbles = torch.tensor([[[1, UNLABELLED, UNLABELLED]]], dtype=torch.uint8)
    classes = torch.tensor([[[2, 1, 2]]], dtype=torch.uint8)
    confidence = torch.full(labels.shape, 0.9)
    out = infer_labels(labels, scribbles, classes, confidence, torch.full((1, 3), 0.8), window=3)
    assert out.flatten().tolist() == [1, 1, 2]


def test_thresholds_by_the_number_of_actions() -> None:
    assert expand_thresholds(torch.tensor([[0.3]]), 4).tolist() == torch.tensor([[0.3] * 4]).tolist()
    pair = torch.tensor([[0.25, 0.75]])
    assert expand_thresholds(pair, 4).tolist() == [[0.75, 0.25, 0.25, 0.25]]
    assert expand_thresholds(pair, 2).tolist() == [[0.75, 0.25]]
    each = torch.tensor([[0.1, 0.2, 0.3]])
    assert torch.equal(expand_thresholds(each, 3), each)
    with pytest.raises(InputError, match="A of 1, 2 or 4"):
        expand_thresholds(each, 4)


@pytest.mark.parametrize("window", [None, 5])
def test_mask_and_oracle_decide_inside_the_window_only(window: int | None) -> None:
    case = make_case(3, num_classes=4)
    near = slow_within(case["labels"].numpy(), case["classes"].numpy(), window, True, "square")
    free = (case["scribbles"] == UNLABELLED).numpy() & (case["labels"] != PADDING).numpy()
    mask = torch.rand(case["labels"].shape, generator=torch.Generator().manual_seed(0))
    mask[1, 0] = 0.5
    for out, wanted in (
        (infer_labels_from_mask(*maps(case), mask, window=window, num_classes=4), (mask > 0.5).numpy()),
        (
            infer_labels_oracle(*maps(case), case["truth"], window=window, num_classes=4),
            (case["classes"] == case["truth"]).numpy(),
        ),
    ):
        expected = np.where(near & free & wanted, case["classes"].numpy(), case["labels"].numpy())
        assert np.array_equal(out.numpy(), expected)
        assert not np.array_equal(expected, case["labels"].numpy())


def test_what_is_wrong_is_named() -> None:
    case = make_case(0, num_classes=3)
    labels = case["labels"]
    with pytest.raises(InputError, match="window is 4, expected an odd"):
        dilate_classes(labels, 4, 3)
    with pytest.raises(InputError, match=r"labels is torch\.int64"):
        dilate_classes(labels.long(), 3, 3)
    with pytest.raises(InputError, match="num_classes is 255"):
        dilate_classes(labels, 3, 255)
    with pytest.raises(InputError, match="shape is 'circle', expected one of square, disc"):
        dilate_classes(labels, 3, 3, shape="circle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="classes is"):
        within_window(labels, case["classes"][:1], window=3, num_classes=3)
    with pytest.raises(InputError, match="semantics is 'both'"):
        inferred(case, window=3, semantics="both")
    with pytest.raises(InputError, match="otherwise is 'drop'"):
        inferred(case, window=3, otherwise="drop")
    with pytest.raises(InputError, match=r"thresholds is \[2, 3\], expected \[2, 2\]"):
        inferred(case, window=3, semantics="grow")
    with pytest.raises(InputError, match=r"thresholds is \[2, 3\], expected \[2, 4\]"):
        inferred(case, window=3, num_classes=4)
    with pytest.raises(InputError, match="mask is"):
        infer_labels_from_mask(*maps(case), torch.ones(2, 1, 1), window=3, num_classes=3)
    with pytest.raises(InputError, match="probabilities is"):
        candidates(torch.ones(2, 255, 1, 1))
