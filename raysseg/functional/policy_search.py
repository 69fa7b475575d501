"""Search over policies of a few parameters by the returns of whole stages: what a policy says of an image, how two networks
agree, and how a distribution of policies follows the best ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.counting import count_indices

TRAITS = 2
"""Numbers that `image_traits` says of an image."""


def image_traits(confidence: Tensor, labels: Tensor) -> Tensor:
    """Describes images without naming a class: how sure the segmenter is where nothing is labelled, and how much is labelled.

    Args:
        confidence: float [B, H, W] in [0, 1], the largest probability.
        labels: uint8 [B, H, W], M; 254 padding, 255 unlabelled.
    Returns:
        float32 [B, 2]: mean confidence of the pixels without a label (1 where there are none), and the share of the image's
        pixels that are labelled; both in [0, 1].
    Raises:
        InputError: where the shapes differ.
    Source: reconstruction.
    """
    if confidence.shape != labels.shape or labels.ndim != 3:
        raise InputError(
            f"confidence is {list(confidence.shape)} and labels {list(labels.shape)}, expected [B, H, W] twice"
        )
    unlabelled = labels == UNLABELLED
    number = unlabelled.flatten(1).sum(1)
    sure = (confidence.float() * unlabelled).flatten(1).sum(1) / number.clamp_min(1)
    pixels = (labels != PADDING).flatten(1).sum(1)
    labelled = (labels < PADDING).flatten(1).sum(1)
    return torch.stack((torch.where(number > 0, sure, 1.0), labelled / pixels.clamp_min(1)), 1)


def policy_thresholds(parameters: Tensor, traits: Tensor, size: int) -> Tensor:
    """Computes the thresholds that a policy gives images: the sigmoid of a linear function of their traits.

    Args:
        parameters: float [size · (1 + F)], for each threshold its bias and its F weights.
        traits: float [B, F], standardised.
        size: A, the number of thresholds.
    Returns:
        float32 [B, A] in (0, 1).
    Raises:
        InputError: where the number of parameters does not fit.
    Source: reconstruction.
    """
    wanted = size * (1 + traits.shape[1])
    if parameters.shape != (wanted,):
        raise InputError(f"parameters is {list(parameters.shape)}, expected [{wanted}]")
    weights = parameters.float().view(size, 1 + traits.shape[1])
    return torch.sigmoid(weights[:, 0] + traits.float() @ weights[:, 1:].T)


def pair_counts(first: Tensor, second: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Counts the pixels of every pair of classes that two networks predict, without waiting for the device.

    Args:
        first: uint8 [B, H, W] in 0…K−1.
        second: uint8 [B, H, W] in 0…K−1.
        counted: bool [B, H, W], the pixels that count.
        num_classes: K.
    Returns:
        int64 [K, K]; counts of several batches add up.
    Source: reconstruction.
    """
    cells = num_classes * num_classes
    index = torch.where(counted, first.long() * num_classes + second.long(), cells)
    return count_indices(index.flatten(), cells + 1)[:-1].view(num_classes, num_classes)


def class_overlap(counts: Tensor) -> Tensor:
    """Computes the intersection over union of each class from a matrix of pairs.

    Args:
        counts: int64 [K, K], of `pair_counts`.
    Returns:
        float64 [K] in [0, 1]; 0 for a class that occurs on neither side.
    Source: reconstruction.
    """
    counts = counts.double()
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both).clamp_min(1.0)


def estimated_overlap(pair: Tensor, pair_on_strokes: Tensor, judged: Tensor, present: Tensor) -> Tensor:
    """Estimates the mean intersection over union of two networks with the truth, of which only strokes are known.

    Two networks that learned from the same labels in different orders differ where these leave them free; in expectation their
    disagreement is the error of each, if their ensemble is calibrated (Jiang et al., ICLR 2022). It is not where both learned
    the same mistake. How far they are from calibrated is measured on strokes that neither learned from: by what part of the
    overlap with each other they overlap with the strokes. The estimate of a class is its overlap between the networks
    everywhere times that part. A class that is known to be there and that neither predicts counts 0.

    Args:
        pair: int64 [K, K], of `pair_counts` of both networks on all pixels.
        pair_on_strokes: int64 [K, K], the same on stroke pixels.
        judged: int64 [K, K], of the strokes and each network, both added up.
        present: bool [K], the classes that the images are known to have.
    Returns:
        float32 scalar [] in [0, 1]: the mean over classes that are present; 0 where none is. A class without strokes is taken
        to be calibrated.
    Source: reconstruction.
    """
    together = class_overlap(pair_on_strokes)
    part = (class_overlap(judged) / together.clamp_min(1e-9)).clamp(max=1.0)
    part = torch.where(judged.sum(1) > 0, part, 1.0)
    overlap = class_overlap(pair) * part
    return ((overlap * present).sum() / present.sum().clamp_min(1)).float()


def follow_elites(
    samples: Tensor, returns: Tensor, mean: Tensor, std: Tensor, *, elites: int, rate: float, smallest: float
) -> tuple[Tensor, Tensor]:
    """Moves a Gaussian towards the policies with the highest returns (the cross-entropy method).

    Args:
        samples: float [P, D], policies that were drawn from it.
        returns: float [P], finite.
        mean: float [D].
        std: float [D].
        elites: how many are followed, 1…P; of equal returns the first.
        rate: in (0, 1], how far.
        smallest: below which no standard deviation falls.
    Returns:
        The new mean and standard deviation, float [D] each.
    Raises:
        InputError: where there are fewer than `elites` samples.
    Source: reconstruction (Rubinstein and Kroese's method; smoothing and floor are our choice).
    """
    if not 1 <= elites <= len(samples) or returns.shape != samples.shape[:1]:
        raise InputError(f"{len(samples)} samples and {list(returns.shape)} returns, expected {elites} or more of each")
    best = samples[returns.argsort(descending=True, stable=True)[:elites]]
    moved = mean + rate * (best.mean(0) - mean)
    spread = std + rate * (best.std(0, correction=0) - std)
    return moved, spread.clamp_min(smallest)
