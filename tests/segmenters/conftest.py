"""A small segmenter for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raysseg.segmenters import Segmenter, SegmenterSettings, build_segmenter


@pytest.fixture
def small_settings() -> Callable[..., SegmenterSettings]:
    """Makes settings of a small DeepLabV3+ with changes."""

    def make(**changes: Any) -> SegmenterSettings:
        values: dict[str, Any] = {"encoder": "resnet18", "weights": "none", "encoder_depth": 4, "decoder_channels": 32}
        return SegmenterSettings(**{**values, **changes})

    return make


@pytest.fixture
def segmenter(small_settings: Callable[..., SegmenterSettings]) -> Segmenter:
    """DeepLabV3+ on ResNet-18 to stride 16, 4 classes, batch statistics that differ from the initial ones."""
    torch.manual_seed(0)
    built = build_segmenter(small_settings(), 4)
    with torch.no_grad():
        built.train()(torch.randn(4, 3, 48, 48))
    return built.eval()
