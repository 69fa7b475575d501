"""The interface of a segmenter: upsampling, modes, precision, context, teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raysseg.errors import InputError
from raysseg.segmenters import (
    PatternPropagation,
    Segmenter,
    evaluation_mode,
    make_teacher,
    update_teacher,
    upsample_logits,
)


def test_upsampling_is_plain_bilinear_where_the_size_is_a_multiple() -> None:
    logits = torch.randn(2, 3, 6, 5)
    expected = F.interpolate(logits, size=(24, 20), mode="bilinear", align_corners=False)
    assert torch.equal(upsample_logits(logits, (24, 20)), expected)
    assert torch.equal(upsample_logits(logits, (6, 5)), logits)


def test_upsampling_does_not_stretch_the_last_cell() -> None:
    logits = torch.randn(1, 2, 7, 4)
    whole = F.interpolate(logits, size=(28, 16), mode="bilinear", align_corners=False)
    assert torch.equal(upsample_logits(logits, (25, 15)), whole[..., :25, :15])


def test_upsampling_of_another_shape_resizes_the_whole() -> None:
    logits = torch.randn(1, 2, 5, 5)
    expected = F.interpolate(logits, size=(12, 9), mode="bilinear", align_corners=False)
    assert torch.equal(upsample_logits(logits, (12, 9)), expected)


def test_padding_inside_equals_padding_with_the_mean_colour(segmenter: Segmenter) -> None:
    images = torch.randn(1, 3, 30, 41)
    with torch.no_grad():
        own = segmenter(images)
        canvas = segmenter(F.pad(images, (0, 7, 0, 2)))
    assert own.logits.shape == (1, 4, 8, 11)
    assert torch.equal(own.logits, canvas.logits[..., :8, :11])
    assert torch.equal(own.features, canvas.features[..., :8, :11])


def test_mixed_precision_and_channels_last(segmenter: Segmenter) -> None:
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        exact = segmenter(images).logits
        last = segmenter.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = upsample_logits(segmenter(images).logits, (32, 32))
    assert torch.allclose(exact, last, atol=1e-5)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, upsample_logits(exact, (32, 32)), atol=0.1 * float(exact.abs().max()))


def test_evaluation_mode_gives_every_part_its_mode_back(segmenter: Segmenter) -> None:
    segmenter.train()
    segmenter.encoder.eval()
    with evaluation_mode(segmenter):
        assert not any(part.training for part in segmenter.modules())
    assert segmenter.training
    assert segmenter.decoder.training
    assert not segmenter.encoder.training


def test_pattern_propagation_against_loops() -> None:
    torch.manual_seed(0)
    module = PatternPropagation(6, dimension=4).eval()
    features = torch.randn(2, 6, 9, 11)
    nodes: list[Tensor] = []
    for side in (1, 3, 6, 8):
        for row in range(side):
            for column in range(side):
                top, bottom = row * 9 // side, -(-(row + 1) * 9 // side)
                left, right = column * 11 // side, -(-(column + 1) * 11 // side)
                nodes.append(features[:, :, top:bottom, left:right].mean(dim=(2, 3)))
    assert len(nodes) == 110
    stacked = torch.stack(nodes, dim=2)
    query, key = module.query.weight[:, :, 0, 0], module.key.weight[:, :, 0]
    value, output = module.value.weight[:, :, 0], module.output.weight[:, :, 0, 0]
    expected = features.clone()
    for row in range(9):
        for column in range(11):
            scores = torch.einsum("bd,bdn->bn", features[:, :, row, column] @ query.T, key @ stacked) / 2.0
            gathered = torch.einsum("bn,bdn->bd", torch.softmax(scores, dim=1), value @ stacked)
            expected[:, :, row, column] += gathered @ output.T / (1 + module.norm.eps) ** 0.5
    assert torch.allclose(module(features), expected, atol=1e-5)


def test_teacher_is_a_copy_of_its_own(segmenter: Segmenter) -> None:
    teacher = make_teacher(segmenter.train())
    assert not teacher.training
    assert segmenter.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    own = {value.data_ptr() for value in teacher.state_dict().values()}
    assert own.isdisjoint(value.data_ptr() for value in segmenter.state_dict().values())


def test_teacher_moves_towards_the_online_segmenter(segmenter: Segmenter) -> None:
    teacher = make_teacher(segmenter)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter))
        segmenter.train()(torch.randn(2, 3, 32, 32))
    online = segmenter.state_dict()
    update_teacher(teacher, segmenter, 0.75)
    changed_buffers = 0
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * before[name] + 0.25 * online[name], atol=1e-5), name
            changed_buffers += "running" in name and not torch.equal(value, before[name])
        else:
            assert torch.equal(value, online[name])
            assert not torch.equal(value, before[name])
    assert changed_buffers > 0
    update_teacher(teacher, segmenter, 0.0)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, online[name])
    with pytest.raises(InputError, match=r"momentum is 1\.5"):
        update_teacher(teacher, segmenter, 1.5)
