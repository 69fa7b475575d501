"""Label selection: the assessor's gate (EIL, Eq. 13) and the quantile thresholds of the constant policies."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.counting import count_indices


def select_labels(labels: Tensor, inferred: Tensor, values: Tensor, *, gate: bool) -> tuple[Tensor, Tensor]:
    """Keeps an image's inferred map where the assessor values its action above zero, else its old map.

    Args:
        labels: uint8 [B, H, W], M.
        inferred: uint8 [B, H, W], H(M, a).
        values: float [B], q.
        gate: False accepts every image, whatever its value.
    Returns:
        labels uint8 [B, H, W] and accepted bool [B].
    Raises:
        InputError: where the shapes do not fit.
    Source: EIL, Eq. 13 (the printed g_ψ is read as the assessor f_ψ).
    """
    if labels.shape != inferred.shape or values.shape != labels.shape[:1]:
        raise InputError(
            f"labels is {list(labels.shape)}, inferred {list(inferred.shape)}, values {list(values.shape)}, "
            "expected [B, H, W], [B, H, W], [B]"
        )
    accepted = values > 0 if gate else torch.ones_like(values, dtype=torch.bool)
    return torch.where(accepted[:, None, None], inferred, labels), accepted


def confidence_histogram(
    classes: Tensor, confidence: Tensor, valid: Tensor, num_classes: int, bins: int = 10_000
) -> Tensor:
    """Counts the confidences of each class's predictions in equal bins of [0, 1]; histograms of parts of a set add up.

    Args:
        classes: uint8 [...] in 0…K−1, the predictions.
        confidence: float [...] in [0, 1], their probabilities; the same shape.
        valid: bool [...], the pixels that count; the same shape.
        num_classes: K.
        bins: S; bin s holds [s / S, (s + 1) / S), the last one also 1.
    Returns:
        int64 [K, S].
    Raises:
        InputError: where the shapes differ.
    Source: EIL, the constant policies qP and mqP (reconstruction: over the training set, per stage).
    """
    if not classes.shape == confidence.shape == valid.shape:
        raise InputError(
            f"classes is {list(classes.shape)}, confidence {list(confidence.shape)}, valid {list(valid.shape)}, "
            "expected one shape"
        )
    bin_index = (confidence.float() * bins).long().clamp_(0, bins - 1)
    index = torch.where(valid, classes.long() * bins + bin_index, num_classes * bins)
    return count_indices(index.flatten(), num_classes * bins + 1)[:-1].view(num_classes, bins)


def quantiles_from_histogram(histogram: Tensor, p: float) -> Tensor:
    """Computes each class's p-quantile of the confidences, by linear interpolation inside its bin.

    Args:
        histogram: int64 [K, S], of `confidence_histogram`, perhaps a sum of several.
        p: in (0, 1]; the share of the class's predictions that lies at or below the quantile.
    Returns:
        float32 [K] in [0, 1], within 1 / S of the exact quantile; 1 for a class that was never predicted, a threshold
        that adopts nothing.
    Raises:
        InputError: where p is outside (0, 1].
    Source: EIL, the constant policies qP and mqP (the paper: p = 0.9; the estimator is a reconstruction).
    """
    if not 0.0 < p <= 1.0:
        raise InputError(f"p is {p}, expected a share in (0, 1]")
    bins = histogram.shape[1]
    cumulative = histogram.cumsum(dim=1).double()
    total = cumulative[:, -1:]
    wanted = p * total
    # The first bin whose cumulative count reaches the wanted one; it is not empty, since the count rose to it there.
    position = torch.searchsorted(cumulative, wanted).clamp_(max=bins - 1)
    inside = histogram.gather(1, position).double()
    share = 1.0 - (cumulative.gather(1, position) - wanted) / inside.clamp_min(1.0)
    quantile = (position + share) / bins
    return torch.where(total > 0, quantile, 1.0).squeeze(1).clamp(0.0, 1.0).float()


def moving_average(previous: Tensor, current: Tensor, momentum: float) -> Tensor:
    """Blends the last value with the current one: momentum · previous + (1 − momentum) · current.

    Args:
        previous: float [K], or any shape [...].
        current: float, the same shape.
        momentum: in [0, 1] (0.9 is our choice).
    Returns:
        float, the same shape.
    Raises:
        InputError: where the shapes differ.
    Source: EIL, the constant policy mqP (the momentum is a reconstruction).
    """
    if previous.shape != current.shape:
        raise InputError(f"previous is {list(previous.shape)}, expected {list(current.shape)} as current")
    return momentum * previous + (1.0 - momentum) * current
