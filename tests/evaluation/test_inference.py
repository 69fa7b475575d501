"""Inference on whole images: padding, scales and mirrored images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raysseg.data.augmentation import normalise
from raysseg.errors import InputError
from raysseg.evaluation import PAPER_SCALES, predict_probabilities
from raysseg.segmenters import Segmenter, SegmenterSettings, build_segmenter, upsample_logits


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    settings = SegmenterSettings(encoder="resnet18", weights="none", encoder_depth=4, decoder_channels=32)
    built = build_segmenter(settings, 4)
    with torch.no_grad():
        built.train()(torch.randn(4, 3, 48, 48))
    return built


def pictures(count: int, height: int = 37, width: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_one_scale_is_the_softmax_of_the_segmenter(segmenter: Segmenter) -> None:
    images = pictures(2)
    probabilities = predict_probabilities(segmenter, images)
    assert segmenter.training, "the mode is left as it was"
    segmenter.eval()
    with torch.no_grad():
        logits = upsample_logits(segmenter(normalise(images)).logits, (37, 50))
    segmenter.train()
    assert torch.allclose(probabilities, torch.softmax(logits, dim=1), atol=1e-6)
    assert torch.allclose(predict_probabilities(segmenter, images.float()), probabilities, atol=1e-6)


def test_scales_and_flip_are_averaged(segmenter: Segmenter) -> None:
    images = pictures(2, 40, 48)
    expected = torch.zeros(2, 4, 40, 48)
    segmenter.eval()
    with torch.no_grad():
        for size in ((20, 24), (60, 72)):  # scales 0.5 and 1.5
            for mirrored in (False, True):
                shown = F.interpolate(normalise(images), size=size, mode="bilinear", align_corners=False)
                shown = shown.flip(3) if mirrored else shown
                logits = upsample_logits(segmenter(shown).logits, size)
                logits = logits.flip(3) if mirrored else logits
                logits = F.interpolate(logits, size=(40, 48), mode="bilinear", align_corners=False)
                expected += torch.softmax(logits, dim=1) / 4
    segmenter.train()
    result = predict_probabilities(segmenter, images, scales=(0.5, 1.5), flip=True)
    assert torch.allclose(result, expected, atol=1e-5)


def test_flip_makes_the_result_symmetric(segmenter: Segmenter) -> None:
    images = pictures(1, 32, 48)
    result = predict_probabilities(segmenter, images, scales=(1.0, 0.75), flip=True)
    mirrored = predict_probabilities(segmenter, images.flip(-1), scales=(1.0, 0.75), flip=True)
    assert torch.allclose(result, mirrored.flip(-1), atol=1e-5)
    assert not torch.allclose(result, predict_probabilities(segmenter, images), atol=1e-3)


def test_padding_and_company_do_not_matter(segmenter: Segmenter) -> None:
    sizes = torch.tensor([[37, 50], [20, 33], [37, 50], [31, 50]])
    images = pictures(4)
    other = images.clone()
    for row, (height, width) in enumerate(sizes.tolist()):
        other[row, :, height:] = 9
        other[row, :, :, width:] = 200
    result = predict_probabilities(segmenter, images, sizes, flip=True)
    assert torch.equal(result, predict_probabilities(segmenter, other, sizes, flip=True))
    for row, (height, width) in enumerate(sizes.tolist()):
        alone = predict_probabilities(segmenter, images[row : row + 1, :, :height, :width], flip=True)
        own = result[row, :, :height, :width]
        assert torch.allclose(own, alone[0], atol=1e-5)
        assert torch.allclose(own.sum(dim=0), torch.ones(height, width), atol=1e-5)
        assert result[row].sum() == pytest.approx(height * width, rel=1e-5), "the padding holds zeros"


def test_mixed_precision(segmenter: Segmenter) -> None:
    images = pictures(1)
    exact = predict_probabilities(segmenter, images, scales=PAPER_SCALES)
    rough = predict_probabilities(segmenter, images, scales=PAPER_SCALES, autocast_dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.05)
    assert not torch.equal(rough, exact)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_that_are_none_are_refused(segmenter: Segmenter, scales: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected one or more positive numbers"):
        predict_probabilities(segmenter, pictures(1), scales=scales)
