"""The contrastive reliability of a label map and the reward, its change (EIL, Eq. 8 to 12).

Scored on the grid of the features: a label map enters as the number of label pixels of each class in each feature cell.
That equals the feature map sampled at every label pixel (nearest), without ever writing that [B, D, H, W] map.
Every sum runs over pixels that carry a class; unlabelled (255) and padding (254) pixels are in none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import MAX_CLASSES
from raysseg.functional.counting import count_indices

Distance = Literal["cosine", "l1", "l2", "inner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveReward:
    """The reward of a transition and its parts, each float32 [B]; reward = relabelling + features = next_value − value.

    Source: EIL, Eq. 12; the two parts are a reconstruction.
    """

    reward: Tensor
    """[B] in (−1, 1), r."""
    relabelling: Tensor
    """[B], V(F, M') − V(F, M): what the new labels change while the features stand still."""
    features: Tensor
    """[B], V(F', M') − V(F, M'): what the new features change under the new labels."""
    value: Tensor
    """[B] in [0, 1], V(F, M)."""
    next_value: Tensor
    """[B] in [0, 1], V(F', M')."""


def cell_index(size: int, cells: int, device: torch.device) -> Tensor:
    """Maps the pixels of one side to feature cells: pixel y lies in cell floor((y + 0.5) · cells / size).

    Args:
        size: pixels of the side.
        cells: feature cells of the side, at most `size`.
        device: where the result is made.
    Returns:
        int64 [size] in 0…cells−1, exact (integer arithmetic).
    Raises:
        InputError: where there are more cells than pixels.
    Source: reconstruction (nearest sampling of F at a pixel's centre, for EIL's Eq. 8).
    """
    if not 1 <= cells <= size:
        raise InputError(f"a side of {size} pixels has {cells} feature cells, expected 1…{size}")
    return ((2 * torch.arange(size, device=device) + 1) * cells).div(2 * size, rounding_mode="floor")


def cell_counts(labels: Tensor, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Counts the label pixels of each class in each feature cell.

    Args:
        labels: uint8 [B, H, W]; 254, 255 and any other value from K on are counted nowhere.
        num_classes: K, 1…254.
        size: (h, w) of the feature map, at most (H, W), which need not be multiples of it.
    Returns:
        float32 [B, K, h, w], whole numbers.
    Raises:
        InputError: for another shape or dtype, or more cells than pixels.
    Source: EIL, Eq. 8 and 10 (reconstruction: F is sampled at the label pixels, nearest).
    """
    if labels.dtype != torch.uint8 or labels.ndim != 3 or not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(
            f"labels is {labels.dtype} {list(labels.shape)} with {num_classes} classes, "
            f"expected uint8 [B, H, W] with 1…{MAX_CLASSES}"
        )
    batch, height, width = labels.shape
    h, w = size
    down, across = cell_index(height, h, labels.device), cell_index(width, w, labels.device)
    cells = down[:, None] * w + across
    # Whatever is no class goes to one plane more, which is cut off: one pass, no selection of pixels.
    planes = num_classes + 1
    index = labels.clamp(max=num_classes).long()
    index += torch.arange(0, batch * planes, planes, device=labels.device).view(batch, 1, 1)
    index *= h * w
    index += cells
    counts = count_indices(index.flatten(), batch * planes * h * w, dtype=torch.float32)
    return counts.view(batch, planes, h, w)[:, :num_classes]


def _check_counts(features: Tensor, counts: Tensor) -> None:
    if (
        features.ndim != 4
        or counts.ndim != 4
        or (features.shape[0], *features.shape[2:])
        != (
            counts.shape[0],
            *counts.shape[2:],
        )
    ):
        raise InputError(
            f"features is {list(features.shape)} and counts {list(counts.shape)}, "
            "expected [B, D, h, w] and [B, K, h, w]"
        )


def class_centres(features: Tensor, counts: Tensor) -> Tensor:
    """Computes each class's centre μ, the mean feature over its label pixels.

    Args:
        features: float [B, D, h, w].
        counts: float32 [B, K, h, w], of `cell_counts`.
    Returns:
        float32 [B, K, D]; zero for a class without a label.
    Raises:
        InputError: where the shapes do not fit.
    Source: EIL, Eq. 8.
    """
    _check_counts(features, counts)
    weights = counts.float().flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.bmm(weights, features.float().flatten(2).transpose(1, 2))
    return sums / weights.sum(dim=2, keepdim=True).clamp_min(1.0)


def distance(features: Tensor, centres: Tensor, kind: Distance = "cosine") -> Tensor:
    """Computes the distance of every feature from every class centre.

    Args:
        features: float [B, D, N].
        centres: float [B, K, D].
        kind: `cosine` 1 − cos in [0, 2] (a zero vector is at distance 1 from all), `l1`, `l2` in [0, ∞), or `inner`
            −⟨f, μ⟩, any sign.
    Returns:
        float32 [B, K, N].
    Raises:
        InputError: for another kind.
    Source: EIL, text of Eq. 9 and Fig. 4b; the sign of `inner` is a reconstruction.
    """
    features, centres = features.float(), centres.float()
    with torch.autocast(features.device.type, enabled=False):
        if kind in ("cosine", "inner"):
            products = torch.bmm(centres, features)
            if kind == "inner":
                return -products
            # Written out, since a norm over a strided dimension takes twice as long on a CPU.
            lengths = features.square().sum(dim=1, keepdim=True).sqrt_().clamp_min_(1e-12)
            return 1.0 - products / lengths / centres.norm(dim=2, keepdim=True).clamp_min(1e-12)
        if kind in ("l1", "l2"):
            # The shortcut through matrix products loses small distances, which δ multiplies by ten.
            mode = "donot_use_mm_for_euclid_dist"
            return torch.cdist(centres, features.transpose(1, 2), p=1.0 if kind == "l1" else 2.0, compute_mode=mode)
    raise InputError(f"distance is {kind!r}, expected one of cosine, l1, l2, inner")


def pixel_reliability(
    features: Tensor, centres: Tensor, present: Tensor, *, delta: float = 10.0, distance: Distance = "cosine"
) -> Tensor:
    """Computes v, the reliability that a label pixel of class k would have in each feature cell.

    Args:
        features: float [B, D, h, w].
        centres: float [B, K, D], of `class_centres`.
        present: bool [B, K], the classes that occur in the map being scored; the sum of Eq. 9 runs over them.
        delta: δ > 0, the sharpness (the paper: 10).
        distance: kind of `distance`.
    Returns:
        float32 [B, K, h, w] in [0, 1]: softmax over the present classes of −δ d; 0 for absent classes.
    Raises:
        InputError: for another kind of distance.
    Source: EIL, Eq. 9; present classes only is a reconstruction.
    """
    return _pixel_reliability(features.flatten(2), centres, present, delta, distance).unflatten(2, features.shape[2:])


def _pixel_reliability(features: Tensor, centres: Tensor, present: Tensor, delta: float, kind: Distance) -> Tensor:
    # Apart from the public function so that the parameter named `distance` there does not hide the function.
    absent = ~present[:, :, None]
    scores = (distance(features, centres, kind) * -delta).masked_fill_(absent, -torch.inf)
    # Where no class is present at all the softmax is 0/0; those values are absent classes' and become 0.
    return scores.softmax(dim=1).masked_fill(absent, 0.0)


def class_reliability(reliability: Tensor, counts: Tensor) -> Tensor:
    """Averages the reliability of each class over its label pixels.

    Args:
        reliability: float [B, K, h, w], of `pixel_reliability`.
        counts: float32 [B, K, h, w], of `cell_counts`.
    Returns:
        float32 [B, K] in [0, 1]; 0 for a class without a label.
    Source: EIL, Eq. 10.
    """
    weights = counts.float().flatten(2)
    return (reliability.flatten(2) * weights).sum(dim=2) / weights.sum(dim=2).clamp_min(1.0)


def reliability(
    features: Tensor, counts: Tensor, *, delta: float = 10.0, distance: Distance = "cosine"
) -> tuple[Tensor, Tensor]:
    """Computes V, the contrastive reliability of a label map under a feature map: the mean over its classes.

    Args:
        features: float [B, D, h, w]; half precision is widened first.
        counts: float32 [B, K, h, w], of `cell_counts`.
        delta: δ > 0 of Eq. 9.
        distance: `cosine`, `l1`, `l2` or `inner`.
    Returns:
        V float32 [B] in [0, 1], and the number of present classes int64 [B]. One class alone has V = 1 exactly; a map
        without any label has V = 0 and number 0, and its value means nothing.
    Raises:
        InputError: where the shapes do not fit, or for another distance.
    Source: EIL, Eq. 11.
    """
    features = features.float()
    centres = class_centres(features, counts)
    present = counts.flatten(2).sum(dim=2) > 0
    values = class_reliability(pixel_reliability(features, centres, present, delta=delta, distance=distance), counts)
    number = present.sum(dim=1)
    return values.sum(dim=1) / number.clamp_min(1), number


def contrastive_reward(
    features: Tensor,
    counts: Tensor,
    next_features: Tensor,
    next_counts: Tensor,
    *,
    delta: float = 10.0,
    distance: Distance = "cosine",
) -> ContrastiveReward:
    """Computes the reward r = V(F', M') − V(F, M) and its two parts.

    An image with one class before and after has V = 1 twice and reward 0 exactly; so has one whose features and labels
    both stay.

    Args:
        features: float [B, D, h, w], F.
        counts: float32 [B, K, h, w], of M.
        next_features: float [B, D, h, w], F'.
        next_counts: float32 [B, K, h, w], of M'.
        delta: δ > 0 of Eq. 9.
        distance: `cosine`, `l1`, `l2` or `inner`.
    Returns:
        ContrastiveReward of five float32 [B].
    Raises:
        InputError: where the shapes do not fit, or for another distance.
    Source: EIL, Eq. 12; the split into parts is a reconstruction.
    """

    def value_of(one: Tensor, labels: Tensor) -> Tensor:
        return reliability(one, labels, delta=delta, distance=distance)[0]

    return _change(value_of, features, counts, next_features, next_counts)


def _change(
    value_of: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    counts: Tensor,
    next_features: Tensor,
    next_counts: Tensor,
) -> ContrastiveReward:
    """The change of a value of (F, M), and what labels and features have in it."""
    value, between = value_of(features, counts), value_of(features, next_counts)
    # A segmenter that stood still hands the same tensor on, whose value is known already.
    next_value = between if next_features is features else value_of(next_features, next_counts)
    return ContrastiveReward(
        reward=next_value - value,
        relabelling=between - value,
        features=next_value - between,
        value=value,
        next_value=next_value,
    )


def summed_reward(
    features: Tensor,
    counts: Tensor,
    next_features: Tensor,
    next_counts: Tensor,
    *,
    pixels: Tensor,
    delta: float = 10.0,
    distance: Distance = "cosine",
) -> ContrastiveReward:
    """Computes the change of the reliability summed over labels in place of its mean over a class's labels.

    S(F, M) = Σ_k Σ_x n_k(x) (2 v_k(x) − 1) / pixels: a label that is likelier right than wrong adds, any other takes away.

    Args:
        features: float [B, D, h, w], F.
        counts: float32 [B, K, h, w], of M.
        next_features: float [B, D, h, w], F'.
        next_counts: float32 [B, K, h, w], of M'.
        pixels: of the images [B], at least 1 each.
        delta: δ > 0 of Eq. 9.
        distance: `cosine`, `l1`, `l2` or `inner`.
    Returns:
        ContrastiveReward of five float32 [B]; its values lie in [−1, 1].
    Raises:
        InputError: where the shapes do not fit, or for another distance.
    Source: reconstruction (EIL, Eq. 10 and 11 without their means).
    """

    def total(one: Tensor, labels: Tensor) -> Tensor:
        one = one.float()
        present = labels.flatten(2).sum(dim=2) > 0
        centres = class_centres(one, labels)
        scores = pixel_reliability(one, centres, present, delta=delta, distance=distance)
        return ((2.0 * scores - 1.0) * labels).flatten(1).sum(dim=1) / pixels

    return _change(total, features, counts, next_features, next_counts)
