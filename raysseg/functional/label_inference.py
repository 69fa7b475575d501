"""Label inference M' = H(M, a): a label spreads to confident pixels of its own class near it (EIL, Eq. 1 and 2).

All of it works on whole batches. The window test never builds one map per class: each pixel's class is one bit of an
integer, a sliding OR of those integers dilates all classes at once, and its cost grows with the window's logarithm.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES, PADDING, UNLABELLED

WindowShape = Literal["square", "disc"]
ActionSemantics = Literal["class", "grow"]
Otherwise = Literal["keep", "reinfer"]

_WORDS = ((8, torch.uint8), (16, torch.int16), (32, torch.int32), (64, torch.int64))
"""Bits of a word, narrowest first: memory bounds the passes, so the narrowest that holds all classes is the fastest."""


def _check_maps(**maps: Tensor) -> None:
    shape = next(iter(maps.values())).shape
    for name, value in maps.items():
        if value.dtype != torch.uint8 or value.ndim != 3:
            raise InputError(f"{name} is {value.dtype} {list(value.shape)}, expected uint8 [B, H, W]")
        if value.shape != shape:
            raise InputError(f"{name} is {list(value.shape)}, expected {list(shape)} as {next(iter(maps))}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for a bool mask and uint8 maps, as four bitwise passes: on a CPU about thirty times as fast."""
    return other ^ ((chosen ^ other) & mask.view(torch.uint8).neg())


def candidates(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Finds each pixel's most probable class k_x and its probability, the candidate of Eq. 1.

    Args:
        probabilities: float [B, K, H, W] in [0, 1], summing to 1 over K; 1 ≤ K ≤ 254.
    Returns:
        classes uint8 [B, H, W] in 0…K−1, the first of equals, and confidence float [B, H, W] in [0, 1]. Interpolation
        can carry a probability past 1 by a rounding error; it is cut to 1. A pixel with NaN has confidence NaN, which
        no threshold lets pass.
    Raises:
        InputError: where `probabilities` is not [B, K, H, W] with 1 ≤ K ≤ 254.
    Source: EIL, Eq. 1 (reconstruction).
    """
    if probabilities.ndim != 4 or not 1 <= probabilities.shape[1] <= MAX_CLASSES:
        raise InputError(
            f"probabilities is {list(probabilities.shape)}, expected [B, K, H, W] with 1 ≤ K ≤ {MAX_CLASSES}"
        )
    confidence = probabilities.amax(dim=1)
    return _first_largest(probabilities, confidence), confidence.clamp(max=1.0)


def predicted_classes(scores: Tensor) -> Tensor:
    """Finds the class of the largest score at every pixel, several times as fast on a CPU as `argmax`.

    Args:
        scores: float [B, K, H, W], logits or probabilities; 1 ≤ K ≤ 254.
    Returns:
        uint8 [B, H, W] in 0…K−1, the first of equals; K−1 where a score is NaN.
    Raises:
        InputError: where `scores` is not [B, K, H, W] with 1 ≤ K ≤ 254.
    Source: reconstruction.
    """
    if scores.ndim != 4 or not 1 <= scores.shape[1] <= MAX_CLASSES:
        raise InputError(f"scores is {list(scores.shape)}, expected [B, K, H, W] with 1 ≤ K ≤ {MAX_CLASSES}")
    return _first_largest(scores, scores.amax(dim=1))


def _first_largest(scores: Tensor, largest: Tensor) -> Tensor:
    """Returns the first class whose score is the largest, uint8 [B, H, W].

    A maximum with indices over a strided dimension is four times as slow on a CPU as the plain maximum and one
    comparison per class. The code K−k makes the first of equal classes the largest; 1, class K−1, needs no test.
    """
    num_classes = scores.shape[1]
    code = torch.ones_like(largest, dtype=torch.uint8)
    for k in range(num_classes - 1):
        equal = (scores[:, k] == largest).view(torch.uint8)
        torch.maximum(code, equal.mul_(num_classes - k), out=code)
    return code.neg_().add_(num_classes)


def _word(num_classes: int) -> tuple[int, torch.dtype, int]:
    """Bits per word, its dtype, and the number of words that hold `num_classes` bits."""
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(f"num_classes is {num_classes}, expected 1…{MAX_CLASSES}")
    bits, dtype = next((word for word in _WORDS if num_classes <= word[0]), _WORDS[-1])
    return bits, dtype, math.ceil(num_classes / bits)


def _class_bits(labels: Tensor, num_classes: int, out: Tensor) -> Tensor:
    """Writes to `out` [B, Wd, H, W] the integer whose only bit is the pixel's class, 0 where it has none."""
    bits, dtype, words = _word(num_classes)
    position = labels.to(dtype)[:, None]
    if words > 1:
        position = position - bits * torch.arange(words, dtype=dtype, device=labels.device).view(1, words, 1, 1)
    # Below 0 and from `bits` on torch shifts the one out; 254 and 255 land there, and the classes of other words.
    one = torch.ones((), dtype=dtype, device=labels.device)
    return torch.bitwise_left_shift(one, position, out=out)


def _slide(words: Tensor, dim: int, window: int, out: Tensor | None = None) -> Tensor:
    """ORs each run of `window` neighbours along `dim`, which shortens by window − 1; the last pass goes to `out`."""
    span = 1
    while span < window:
        step = min(span, window - span)
        length = words.shape[dim] - step
        last = out if span + step == window else None
        words = torch.bitwise_or(words.narrow(dim, 0, length), words.narrow(dim, step, length), out=last)
        span += step
    return words


def _dilate_square(labels: Tensor, radius: int, num_classes: int) -> Tensor:
    _, dtype, words = _word(num_classes)
    batch, height, width = labels.shape
    # Beyond the image there is nothing to find: a longer reach than the side gives the same and costs more.
    across, down = min(radius, width - 1), min(radius, height - 1)
    rows = torch.zeros(batch, words, height, width + 2 * across, dtype=dtype, device=labels.device)
    columns = torch.zeros(batch, words, height + 2 * down, width, dtype=dtype, device=labels.device)
    inner = columns.narrow(2, down, height)
    if across:
        _class_bits(labels, num_classes, rows.narrow(3, across, width))
        _slide(rows, 3, 2 * across + 1, out=inner)
    else:
        _class_bits(labels, num_classes, inner)
    return _slide(columns, 2, 2 * down + 1)


def _dilate_disc(labels: Tensor, radius: int, num_classes: int) -> Tensor:
    _, dtype, words = _word(num_classes)
    batch, height, width = labels.shape
    padded = torch.zeros(batch, words, height + 2 * radius, width + 2 * radius, dtype=dtype, device=labels.device)
    _class_bits(labels, num_classes, padded[..., radius : radius + height, radius : radius + width])
    runs = [padded]
    while 2 << (len(runs) - 1) <= 2 * radius + 1:
        runs.append(_slide(runs[-1], 3, (1 << (len(runs) - 1)) + 1))
    out = torch.zeros(batch, words, height, width, dtype=dtype, device=labels.device)
    for row in range(2 * radius + 1):
        half = math.isqrt(radius * radius - (row - radius) ** 2)
        level = (2 * half + 1).bit_length() - 1
        run = runs[level].narrow(2, row, height)
        # Two runs of 2^level pixels, one from each end, cover the chord of 2·half + 1 pixels.
        out |= run.narrow(3, radius - half, width)
        out |= run.narrow(3, radius + half + 1 - (1 << level), width)
    return out


def dilate_classes(labels: Tensor, window: int, num_classes: int, *, shape: WindowShape = "square") -> Tensor:
    """Dilates every class of a label map at once: which classes have a label inside the window around each pixel.

    Args:
        labels: uint8 [B, H, W]; 0…K−1 classes, 254 padding and 255 unlabelled (neither spreads).
        window: side of the window in pixels, odd and positive; (window − 1) / 2 pixels to each side.
        num_classes: K, 1…254.
        shape: `square` ‖x − x'‖_∞ ≤ r, in about 2 log2(window) passes; `disc` ‖x − x'‖_2 ≤ r, in about 2 · window.
    Returns:
        bit masks [B, Wd, H, W]: class k is bit k mod n of word k // n, where n is the bits of the dtype: the narrowest
        of uint8, int16, int32 and int64 with n ≥ K bits, or several int64 words above 64 classes.
    Raises:
        InputError: for other shapes or dtypes, or a window that is even or not positive.
    Source: EIL, Eq. 2 (reconstruction); six windows of 21 in a row reach the paper's radii 21, 41, …, 121.
    """
    _check_maps(labels=labels)
    _check_choice("shape", shape, ("square", "disc"))
    if window < 1 or window % 2 == 0:
        raise InputError(f"window is {window}, expected an odd number of pixels, 1 or more")
    radius = (window - 1) // 2
    return (_dilate_square if shape == "square" else _dilate_disc)(labels, radius, num_classes)


def within_window(
    labels: Tensor,
    classes: Tensor,
    *,
    window: int | None,
    num_classes: int,
    class_wise: bool = True,
    shape: WindowShape = "square",
) -> Tensor:
    """Tests whether a label of the pixel's candidate class lies inside the window around it: Ω of Eq. 2.

    Args:
        labels: uint8 [B, H, W], the map from which the window is measured.
        classes: uint8 [B, H, W] in 0…K−1, the candidates.
        window: side in pixels, odd; None or 0 for the whole image.
        num_classes: K, 1…254.
        class_wise: False lets any label count, whatever its class.
        shape: `square` or `disc`.
    Returns:
        bool [B, H, W].
    Raises:
        InputError: for other shapes or dtypes, or a window that is even or negative.
    Source: EIL, Eq. 2 (reconstruction).
    """
    _check_maps(labels=labels, classes=classes)
    if not class_wise:
        # All labels become class 0 of one, and so do all candidates.
        unlabelled = (labels >= PADDING).view(torch.uint8).neg()
        labels, classes, num_classes = unlabelled, torch.zeros_like(classes), 1
    if not window:
        present = torch.zeros(labels.shape[0], 256, dtype=torch.bool, device=labels.device)
        present.scatter_(1, labels.flatten(1).long(), True)
        return present.gather(1, classes.flatten(1).long()).view(labels.shape)
    near = dilate_classes(labels, window, num_classes, shape=shape)
    near &= _class_bits(classes, num_classes, torch.empty_like(near))
    found = near.to(torch.bool)
    return found[:, 0] if found.shape[1] == 1 else found.any(dim=1)


def expand_thresholds(action: Tensor, num_classes: int) -> Tensor:
    """Turns an action into one probability threshold per class, τ(k) of Eq. 1.

    Args:
        action: float [B, A] in [0, 1]. A = 1: one threshold for all classes. A = 2: (τ_o, τ_g), class 0 gets τ_g and
            every other class τ_o, also where K = 2. A = K: one per class, in their order.
        num_classes: K, 1 or more.
    Returns:
        float [B, K] of the action's dtype.
    Raises:
        InputError: where A is not 1, 2 or K.
    Source: EIL, Eq. 1 and Table 4 (reconstruction: o is object, g is ground).
    """
    if action.ndim != 2 or action.shape[1] not in (1, 2, num_classes):
        raise InputError(f"action is {list(action.shape)}, expected [B, A] with A of 1, 2 or {num_classes}")
    if action.shape[1] == 1:
        return action.expand(-1, num_classes)
    if action.shape[1] == 2:
        return torch.cat((action[:, 1:], action[:, :1].expand(-1, num_classes - 1)), dim=1)
    return action


def _adopt(
    labels: Tensor, scribbles: Tensor, classes: Tensor, decided: Tensor, otherwise: Otherwise = "keep"
) -> Tensor:
    """Writes the candidates where decided: never over a scribble, never over padding."""
    scribbled = scribbles != UNLABELLED
    padded = labels == PADDING
    base = _select(padded, labels, scribbles) if otherwise == "reinfer" else _select(scribbled, scribbles, labels)
    return _select(decided & ~(scribbled | padded), classes, base)


def infer_labels(
    labels: Tensor,
    scribbles: Tensor,
    classes: Tensor,
    confidence: Tensor,
    thresholds: Tensor,
    *,
    window: int | None,
    class_wise: bool = True,
    shape: WindowShape = "square",
    semantics: ActionSemantics = "class",
    otherwise: Otherwise = "keep",
    anchor: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Infers the next label map: a pixel takes its candidate class where that is confident and a label of it is near.

    Scribbles and padding never change. A threshold of 0 adopts every candidate in the window, 1 none (the test is `>`).

    Args:
        labels: uint8 [B, H, W], M; 0…K−1, 254 padding, 255 unlabelled.
        scribbles: uint8 [B, H, W], Y; the labels that stay.
        classes: uint8 [B, H, W] in 0…K−1, from `candidates`.
        confidence: float [B, H, W] in [0, 1], from `candidates`.
        thresholds: float [B, K] in [0, 1]; with semantics `grow` [B, 2].
        window: side in pixels, odd; None or 0 for the whole image.
        class_wise: False lets a label of any class open the window.
        shape: `square` or `disc`.
        semantics: `class`: the threshold is that of the candidate's class. `grow`: threshold 0 overrides an existing
            label, threshold 1 grows into unlabelled pixels (the rival reading of (τ_o, τ_g)).
        otherwise: what a pixel that adopts nothing holds: `keep` its label, or `reinfer`: only its scribble.
        anchor: uint8 [B, H, W], the map from which the window is measured; None for `labels`.
        num_classes: K; None reads it off `thresholds`, and with `grow`, whose thresholds do not tell, allows for 254
            classes, which is right for every K but slower.
    Returns:
        uint8 [B, H, W], M'.
    Raises:
        InputError: for other shapes, dtypes or options.
    Source: EIL, Eq. 1 and 2 (reconstruction).
    """
    _check_maps(labels=labels, scribbles=scribbles, classes=classes)
    _check_choice("semantics", semantics, ("class", "grow"))
    _check_choice("otherwise", otherwise, ("keep", "reinfer"))
    batch = labels.shape[0]
    if confidence.shape != labels.shape:
        raise InputError(f"confidence is {list(confidence.shape)}, expected {list(labels.shape)} as labels")
    expected = num_classes if semantics == "class" else 2
    if thresholds.ndim != 2 or thresholds.shape[0] != batch or expected not in (None, thresholds.shape[1]):
        raise InputError(f"thresholds is {list(thresholds.shape)}, expected [{batch}, {expected or 'K'}]")
    index = classes if semantics == "class" else (labels == UNLABELLED)
    limit = thresholds.gather(1, index.flatten(1).long()).view(labels.shape)
    if num_classes is None:
        num_classes = thresholds.shape[1] if semantics == "class" else MAX_CLASSES
    near = within_window(
        labels if anchor is None else anchor,
        classes,
        window=window,
        num_classes=num_classes,
        class_wise=class_wise,
        shape=shape,
    )
    return _adopt(labels, scribbles, classes, near & (confidence > limit), otherwise)


def infer_labels_from_mask(
    labels: Tensor,
    scribbles: Tensor,
    classes: Tensor,
    mask: Tensor,
    *,
    window: int | None,
    num_classes: int,
    class_wise: bool = True,
    shape: WindowShape = "square",
) -> Tensor:
    """Infers the next label map from a binary-mask action: a pixel of the window adopts its candidate where mask > 0.5.

    Args:
        labels: uint8 [B, H, W], M.
        scribbles: uint8 [B, H, W], Y; they and padding never change.
        classes: uint8 [B, H, W] in 0…K−1, from `candidates`.
        mask: float [B, H, W] in [0, 1], the action.
        window: side in pixels, odd; None or 0 for the whole image.
        num_classes: K, 1…254.
        class_wise: False lets a label of any class open the window.
        shape: `square` or `disc`.
    Returns:
        uint8 [B, H, W], M'.
    Raises:
        InputError: for other shapes, dtypes or options.
    Source: EIL, Table 4, row "binary mask" with Eq. 1 and 2 (reconstruction).
    """
    _check_maps(labels=labels, scribbles=scribbles, classes=classes)
    if mask.shape != labels.shape:
        raise InputError(f"mask is {list(mask.shape)}, expected {list(labels.shape)} as labels")
    near = within_window(labels, classes, window=window, num_classes=num_classes, class_wise=class_wise, shape=shape)
    return _adopt(labels, scribbles, classes, near & (mask > 0.5))


def infer_labels_oracle(
    labels: Tensor,
    scribbles: Tensor,
    classes: Tensor,
    truth: Tensor,
    *,
    window: int | None,
    num_classes: int,
    class_wise: bool = True,
    shape: WindowShape = "square",
) -> Tensor:
    """Infers the next label map with the truth as judge: the upper bound of what any action of Eq. 1 could adopt.

    Args:
        labels: uint8 [B, H, W], M.
        scribbles: uint8 [B, H, W], Y; they and padding never change.
        classes: uint8 [B, H, W] in 0…K−1, from `candidates`.
        truth: uint8 [B, H, W]; a pixel of the window adopts its candidate exactly where it equals the truth.
        window: side in pixels, odd; None or 0 for the whole image.
        num_classes: K, 1…254.
        class_wise: False lets a label of any class open the window.
        shape: `square` or `disc`.
    Returns:
        uint8 [B, H, W], M'.
    Raises:
        InputError: for other shapes, dtypes or options.
    Source: reconstruction (a reference for EIL's Eq. 1 that the paper does not have).
    """
    _check_maps(labels=labels, scribbles=scribbles, classes=classes, truth=truth)
    near = within_window(labels, classes, window=window, num_classes=num_classes, class_wise=class_wise, shape=shape)
    return _adopt(labels, scribbles, classes, near & (classes == truth))
