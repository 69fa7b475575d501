"""The operators' input planes against loops over cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raysseg.errors import InputError
from raysseg.functional import PADDING, UNLABELLED, operator_planes, plane_count


@pytest.mark.parametrize("size", [(8, 12), (9, 11), (4, 6)])
@pytest.mark.parametrize("num_classes", [2, 21, 253])
def test_planes_equal_the_loop_over_pixels(size: tuple[int, int], num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width = size
    h, w = 4, 6
    features = torch.randn(2, 5, h, w, generator=generator)
    probabilities = torch.randn(2, num_classes, height, width, generator=generator).softmax(1)
    labels = torch.randint(0, num_classes, (2, height, width), generator=generator).to(torch.uint8)
    labels[0, :3] = UNLABELLED
    labels[1, -2:] = PADDING
    planes = operator_planes(features, probabilities, labels)
    assert planes.shape == (2, plane_count(5, num_classes), h, w)
    assert torch.equal(planes[:, :5], features)

    means = np.zeros((2, num_classes, h, w))
    for i, j in np.ndindex(h, w):
        rows = slice(i * height // h, math.ceil((i + 1) * height / h))
        columns = slice(j * width // w, math.ceil((j + 1) * width / w))
        means[:, :, i, j] = probabilities.numpy()[:, :, rows, columns].mean((2, 3))
    np.testing.assert_allclose(planes[:, 5 : 5 + num_classes].numpy(), means, rtol=1e-5, atol=1e-7)

    shares, pixels = np.zeros((2, num_classes + 1, h, w)), np.zeros((h, w))
    for y, x in np.ndindex(height, width):
        i, j = math.floor((y + 0.5) * h / height), math.floor((x + 0.5) * w / width)
        pixels[i, j] += 1
        for b in range(2):
            value = int(labels[b, y, x])
            if value != PADDING:
                shares[b, num_classes if value == UNLABELLED else value, i, j] += 1
    np.testing.assert_allclose(planes[:, 5 + num_classes :].numpy(), shares / pixels, rtol=1e-6)
    assert planes[1, 5 + num_classes :, -1].sum() < w - 0.1


def test_planes_keep_the_precision_of_the_features() -> None:
    planes = operator_planes(
        torch.ones(1, 3, 2, 2, dtype=torch.float16),
        torch.full((1, 2, 4, 4), 0.5),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
    )
    assert planes.dtype == torch.float16
    assert planes[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.0]


def test_the_numbers_of_planes_of_voc_and_context() -> None:
    assert plane_count(256, 21) == 299
    assert plane_count(256, 60) == 377


def test_shapes_that_do_not_fit_are_refused() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="expected"):
        operator_planes(torch.ones(1, 3, 2, 2), torch.ones(1, 2, 5, 4), labels)
    with pytest.raises(InputError, match="feature cells"):
        operator_planes(torch.ones(1, 3, 8, 8), torch.ones(1, 2, 4, 4), labels)
