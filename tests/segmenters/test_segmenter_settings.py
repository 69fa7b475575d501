"""Settings that cannot work are refused with one sentence; those that can have the effect that they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from raysseg.configuration import load_settings
from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, SegmenterSettings, build_segmenter

MakeSettings = Callable[..., SegmenterSettings]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "DeepLabV3Pluss"}, "did you mean 'DeepLabV3Plus'"),
        ({"encoder": "resnet1811"}, "did you mean 'resnet1"),
        ({"encoder": "tu-mobilenetv3_smal_050"}, "did you mean 'tu-mobilenetv3_small_050'"),
        ({"encoder": "qqq"}, "known are resnet18"),
        ({"architecture": "Unet", "output_stride": 16}, "output_stride has no effect on Unet"),
        ({"output_stride": 32}, "expected one of 8, 16"),
        ({"architecture": "Linknet", "decoder_channels": 64}, "decoder_channels has no effect on Linknet"),
        ({"architecture": "DPT"}, "DPT takes a timm vision transformer"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(SegmenterSettings, values)


def test_parts_that_do_not_fit_are_refused(small_settings: MakeSettings) -> None:
    with pytest.raises(InputError, match="Linknet with encoder mit_b0"):
        build_segmenter(SegmenterSettings(architecture="Linknet", encoder="mit_b0", weights="none"), 3)
    with pytest.raises(InputError, match="1 classes"):
        build_segmenter(small_settings(), 1)


def test_default_strides_and_widths(small_settings: MakeSettings) -> None:
    segmenter = build_segmenter(small_settings(decoder_channels=None), 3)
    assert (segmenter.feature_stride, segmenter.feature_channels) == (4, 256)
    encoded = segmenter.encode(torch.zeros(1, 3, 64, 64))
    assert encoded[-1].shape == (1, 256, 4, 4)
    finer = build_segmenter(small_settings(output_stride=8), 3).encode(torch.zeros(1, 3, 64, 64))
    assert finer[-1].shape == (1, 256, 8, 8)
    narrow = build_segmenter(small_settings(architecture="Unet", decoder_channels=128), 3)
    assert narrow.feature_channels == 128 >> 3


def test_feature_taps(small_settings: MakeSettings) -> None:
    images = torch.randn(2, 3, 40, 56)
    for tap, channels in (("decoder", 32), ("encoder", 256), ("encoder_low", 64)):
        segmenter = build_segmenter(small_settings(feature_tap=tap), 3).eval()
        with torch.no_grad():
            features, logits = segmenter(images)
            encoded = segmenter.encode(images)
        assert segmenter.feature_channels == channels
        assert features.shape == (2, channels, 10, 14)
        assert logits.shape == (2, 3, 10, 14)
        if tap == "encoder_low":
            assert torch.equal(features, encoded[2][..., :10, :14])


def test_stages_beyond_the_depth_are_dropped(small_settings: MakeSettings) -> None:
    segmenter = build_segmenter(small_settings(), 3)
    assert not any(name.startswith("layer4") for name in segmenter.encoder_parameters())
    assert any(name.startswith("layer3") for name in segmenter.encoder_parameters())


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "Unet"])
def test_dropout(architecture: str, small_settings: MakeSettings) -> None:
    def differs(dropout: float | None) -> bool:
        segmenter = build_segmenter(small_settings(architecture=architecture, dropout=dropout), 3).train()
        for part in segmenter.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        images = torch.randn(1, 3, 32, 32)
        return not torch.equal(segmenter(images).logits, segmenter(images).logits)

    assert differs(0.5)
    assert not differs(0.0)
    assert differs(None) == (architecture == "DeepLabV3Plus")


def test_parameter_groups(segmenter: Segmenter) -> None:
    backbone, new = segmenter.parameter_groups(0.1, head_multiplier=10.0, weight_decay=0.01)
    assert (backbone["lr"], new["lr"], new["weight_decay"]) == (0.1, 1.0, 0.01)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in segmenter.encoder_parameters().values()}
    assert {id(p) for p in new["params"]} == {id(p) for p in segmenter.decoder_parameters().values()}
    together = len(backbone["params"]) + len(new["params"])
    assert together == len(list(segmenter.parameters()))
    torch.optim.SGD([backbone, new], lr=0.0)
