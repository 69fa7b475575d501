"""Classes that an image is known to have, against a loop, and predictions that name no others."""

from __future__ import annotations

import pytest
import torch

from raysseg.errors import InputError
from raysseg.functional import PADDING, UNLABELLED, only_classes, present_classes
from raysseg.segmenters import upsample_logits


def test_present_classes_are_those_of_the_map() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (6, 5, 4), generator=draw, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=draw) < 0.8] = UNLABELLED
    labels[0] = UNLABELLED
    labels[1] = PADDING
    labels[2, 0, 0] = PADDING
    slow = [[bool((one == k).any()) or not bool((one < PADDING).any()) for k in range(7)] for one in labels]
    assert present_classes(labels, 7).tolist() == slow
    assert not all(map(all, slow[2:]))


def test_what_is_ruled_out_has_no_probability_at_any_resolution() -> None:
    logits = 30 * torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([[True, False, True, False], [True] * 4, [False, False, False, True]])
    found = upsample_logits(only_classes(logits, classes), (20, 24)).softmax(1)
    assert torch.isfinite(found).all()
    assert (found[~classes] == 0).all()
    torch.testing.assert_close(found[1], upsample_logits(logits, (20, 24)).softmax(1)[1])
    among = upsample_logits(logits, (20, 24))[0, [0, 2]].softmax(0)
    torch.testing.assert_close(found[0, [0, 2]], among)
    assert only_classes(logits, None) is logits


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"labels is \[4, 4\], expected \[B, H, W\]"):
        present_classes(torch.zeros(4, 4, dtype=torch.uint8), 3)
    with pytest.raises(InputError, match=r"classes is \[2, 4\], expected \[2, 3\] as logits"):
        only_classes(torch.zeros(2, 3, 4, 4), torch.ones(2, 4, dtype=torch.bool))
