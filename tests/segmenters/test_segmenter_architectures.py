"""One test for all architectures: shapes at odd sizes, gradients everywhere, saved and read back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raysseg.segmenters import SegmenterSettings, build_segmenter, save_segmenter, upsample_logits, virtual_step

CASES = [
    ("Unet", "resnet18", 5),
    ("UnetPlusPlus", "resnet18", 4),
    ("MAnet", "resnet18", 5),
    ("Linknet", "resnet18", 5),
    ("FPN", "resnet18", 5),
    ("PSPNet", "resnet18", 3),
    ("DeepLabV3", "resnet18", 5),
    ("DeepLabV3Plus", "resnet18", 4),
    ("DeepLabV3Plus", "mobilenet_v2", 5),
    ("DeepLabV3Plus", "efficientnet-b0", 5),
    ("PAN", "resnet18", 5),
    ("UPerNet", "tu-mobilenetv3_small_050", 5),
    ("Segformer", "mit_b0", 5),
    ("DPT", "tu-vit_tiny_patch16_224", 4),
]


@pytest.mark.parametrize(("architecture", "encoder", "depth"), CASES)
def test_every_architecture_behaves_alike(architecture: str, encoder: str, depth: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = SegmenterSettings(architecture=architecture, encoder=encoder, encoder_depth=depth, weights="none")
    segmenter = build_segmenter(settings, 5)

    for size in ((97, 65), (60, 80)):
        images = torch.randn(2, 3, *size)
        features, logits = segmenter(images)
        cells = [math.ceil(side / segmenter.feature_stride) for side in size]
        assert list(features.shape) == [2, segmenter.feature_channels, *cells]
        assert list(logits.shape) == [2, 5, *cells]
        assert upsample_logits(logits, size).shape == (2, 5, *size)

    (logits * torch.randn_like(logits)).sum().backward()
    without = [name for name, parameter in segmenter.named_parameters() if parameter.grad is None]
    assert without == [], "no gradient reaches these parameters"

    segmenter.eval()
    with torch.no_grad():
        expected = segmenter(images)
        encoded = segmenter.encode(images)
        assert torch.equal(segmenter.decode(encoded, size).logits, expected.logits)
    save_segmenter(tmp_path / "segmenter.safetensors", segmenter)
    torch.manual_seed(1)
    again = build_segmenter(settings.model_copy(update={"weights": str(tmp_path / "segmenter.safetensors")}), 5).eval()
    with torch.no_grad():
        result = again(images)
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result.features, expected.features)

    labels = torch.randint(0, 5, (2, *size), dtype=torch.uint8)
    looped, together = (
        virtual_step(segmenter, encoded, labels, size, learning_rate=0.01, images_at_once=count) for count in (1, 2)
    )
    assert torch.allclose(looped.logits, together.logits, rtol=1e-3, atol=1e-3)
    assert not torch.equal(looped.logits, expected.logits)


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "DeepLabV3", "FPN"])
def test_context_module_takes_part(architecture: str) -> None:
    settings = SegmenterSettings(
        architecture=architecture, encoder="resnet18", weights="none", context="pattern_propagation"
    )
    segmenter = build_segmenter(settings, 3)
    segmenter(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    names = [name for name, _ in segmenter.decoder.named_parameters() if name.endswith("query.weight")]
    assert len(names) == 1
    gradient = dict(segmenter.decoder.named_parameters())[names[0]].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
