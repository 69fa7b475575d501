"""Virtual steps against torch's own optimiser on a copy, one image at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, SegmenterOutput, upsample_logits, virtual_step

SIZE = (40, 52)


def batch() -> tuple[Tensor, Tensor]:
    """Images, and labels of which one image has few, one many with padding, and one none at all."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, *SIZE, generator=generator)
    labels = torch.randint(0, 4, (3, *SIZE), generator=generator, dtype=torch.uint8)
    labels[0][torch.rand(SIZE, generator=generator) > 0.03] = 255
    labels[1, 30:] = 254
    labels[2] = 255
    return images, labels


def reference(
    segmenter: Segmenter,
    images: Tensor,
    labels: Tensor,
    scope: str,
    *,
    learning_rate: float,
    steps: int,
    clip_norm: float | None,
    weight_decay: float,
) -> SegmenterOutput:
    outputs = []
    for image, label in zip(images, labels, strict=True):
        own = copy.deepcopy(segmenter).eval()
        part = {"decoder": own.decoder, "head": own.decoder.head, "all": own}[scope]
        optimizer = torch.optim.SGD(part.parameters(), lr=learning_rate, weight_decay=weight_decay)
        for _ in range(steps if bool((label < 254).any()) else 0):
            logits = upsample_logits(own(image[None]).logits, SIZE)
            target = torch.where(label < 254, label.long(), -1)[None]
            optimizer.zero_grad()
            F.cross_entropy(logits, target, ignore_index=-1).backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(part.parameters(), clip_norm)
            optimizer.step()
        with torch.no_grad():
            outputs.append(own(image[None]))
    return SegmenterOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


@pytest.mark.parametrize("images_at_once", [None, 2, 3])
@pytest.mark.parametrize(
    ("scope", "changes"),
    [
        ("decoder", {}),
        ("decoder", {"steps": 2, "clip_norm": 0.1, "weight_decay": 0.05}),
        ("head", {"steps": 3}),
        ("head", {"clip_norm": 1e9}),
        ("all", {"clip_norm": 0.5}),
    ],
)
def test_equals_one_optimiser_per_image(
    segmenter: Segmenter, scope: Any, changes: dict[str, Any], images_at_once: int | None
) -> None:
    images, labels = batch()
    options: dict[str, Any] = {"learning_rate": 0.05, "steps": 1, "clip_norm": None, "weight_decay": 0.0, **changes}
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    with torch.no_grad():
        encoded = segmenter.encode(images)
        plain = segmenter.decode(encoded, SIZE)
    segmenter.train()
    result = virtual_step(
        segmenter, encoded, labels, SIZE, scope=scope, images=images, images_at_once=images_at_once, **options
    )
    assert segmenter.training
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
    assert all(parameter.grad is None for parameter in segmenter.parameters())
    assert not result.logits.requires_grad

    expected = reference(segmenter, images, labels, scope, **options)
    assert torch.allclose(result.logits, expected.logits, atol=1e-5)
    assert torch.allclose(result.features, expected.features, atol=1e-5)
    moved = (result.logits - plain.logits).abs().amax(dim=(1, 2, 3))
    assert moved[:2].min() > 1e-3
    assert moved[2] < 1e-5, "an image without labels keeps its weights"


def test_zero_steps_is_the_plain_output(segmenter: Segmenter) -> None:
    images, labels = batch()
    with torch.no_grad():
        encoded = segmenter.encode(images)
        plain = segmenter(images)
    for scope, given in (("decoder", encoded), ("head", encoded), ("all", None)):
        result = virtual_step(segmenter, given, labels, SIZE, learning_rate=1.0, steps=0, scope=scope, images=images)
        assert torch.equal(result.logits, plain.logits)
        assert torch.equal(result.features, plain.features)


def test_a_step_lowers_the_loss_of_its_own_image(segmenter: Segmenter) -> None:
    images, labels = batch()
    images, labels = images[:2], labels[:2]
    with torch.no_grad():
        encoded = segmenter.encode(images)
        plain = segmenter.decode(encoded, SIZE)
    stepped = virtual_step(segmenter, encoded, labels, SIZE, learning_rate=0.05)
    target = torch.where(labels < 254, labels.long(), -1)
    for row in range(2):
        before, after = (
            F.cross_entropy(upsample_logits(output.logits[row : row + 1], SIZE), target[row : row + 1], ignore_index=-1)
            for output in (plain, stepped)
        )
        assert after < before


def test_works_in_mixed_precision(segmenter: Segmenter) -> None:
    images, labels = batch()
    with torch.no_grad():
        encoded = segmenter.encode(images)
    exact = virtual_step(segmenter, encoded, labels, SIZE, learning_rate=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = virtual_step(segmenter, encoded, labels, SIZE, learning_rate=0.05)
    assert torch.allclose(rough.logits.float(), exact.logits, atol=0.1 * float(exact.logits.abs().max()))


def test_missing_inputs_are_refused(segmenter: Segmenter) -> None:
    images, labels = batch()
    with pytest.raises(InputError, match="needs the images"):
        virtual_step(segmenter, None, labels, SIZE, learning_rate=0.1, scope="all")
    with pytest.raises(InputError, match="needs the encoded"):
        virtual_step(segmenter, None, labels, SIZE, learning_rate=0.1, images=images)
    with pytest.raises(InputError, match="is -1"):
        virtual_step(segmenter, None, labels, SIZE, learning_rate=0.1, steps=-1)
