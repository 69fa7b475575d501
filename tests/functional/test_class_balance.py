"""Class weights against numbers worked out by hand, and their sum over pixels against a loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raysseg.functional import class_weights, label_mass


def test_rare_classes_weigh_more_and_the_mean_is_one() -> None:
    counts = torch.tensor([90, 10, 0])
    assert class_weights(counts, 0.0).tolist() == [1.0, 1.0, 0.0]
    assert class_weights(counts, 1.0).tolist() == pytest.approx([0.2, 1.8, 0.0])
    root = class_weights(counts, 0.5)
    assert root[1] / root[0] == pytest.approx(3.0)
    assert root[:2].mean().item() == pytest.approx(1.0)


def test_the_mass_is_what_a_weighted_mean_divides_by() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 5, 4), generator=generator).to(torch.uint8)
    labels[0, 0], labels[1, :, 0] = 255, 254
    weights = torch.tensor([0.5, 1.0, 4.0])
    slow = sum(weights[int(label)].item() for label in labels.flatten() if label < 254)
    assert label_mass(labels, weights).item() == pytest.approx(slow)
    assert label_mass(labels, None).item() == int((labels < 254).sum())
    logits = torch.randn(2, 3, 5, 4, generator=generator)
    target = torch.where(labels < 254, labels, 255).long()
    total = F.cross_entropy(logits, target, weight=weights, ignore_index=255, reduction="sum")
    mean = F.cross_entropy(logits, target, weight=weights, ignore_index=255)
    assert (total / label_mass(labels, weights)).item() == pytest.approx(mean.item(), rel=1e-5)
    assert label_mass(torch.full((2, 2), 255), weights).item() == 0.0
