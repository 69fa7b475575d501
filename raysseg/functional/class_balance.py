"""Class weights that let rare classes count for more in a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.functional.constants import PADDING


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Weighs every class by its share of the pixels to the power of −`power`, with mean 1 over the classes that occur.

    Args:
        counts: pixels of every class [K], at least one of them above 0.
        power: in [0, 1]; 0 weighs all alike, 1 lets every class count the same.
    Returns:
        float32 [K]; 0 for a class that does not occur.
    Source: reconstruction.
    """
    shares = counts.double() / counts.sum()
    weights = torch.where(counts > 0, shares.clamp(min=1e-9) ** -power, 0.0)
    return (weights / weights[counts > 0].mean()).float()


def label_mass(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Sums the weights of labelled pixels: the denominator of a weighted mean over them.

    Args:
        labels: any integers, of any shape; 254 and 255 are no classes and weigh nothing.
        weights: of the classes [K]; None weighs each 1.
    Returns:
        A scalar on the labels' device.
    Source: reconstruction.
    """
    labelled = labels < PADDING
    if weights is None:
        return labelled.sum()
    return weights[labels.long().clamp(max=len(weights) - 1)].masked_fill(~labelled, 0.0).sum()
