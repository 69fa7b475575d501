"""Virtual steps: what the segmenter would say of an image after learning from that image's own label map.

EIL scores a label map by the features of a newly updated segmenter. Each image of a batch gets its own temporary
weights here; the segmenter itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.segmenters.segmenter import (
    Segmenter,
    SegmenterDecoder,
    SegmenterOutput,
    evaluation_mode,
    upsample_logits,
)

Parameters = dict[str, Tensor]
Forward = Callable[[Parameters, list[Tensor]], SegmenterOutput]

IMAGES_AT_ONCE = 8
"""Images whose temporary weights are held together where the device is an accelerator."""


@torch.no_grad()
def virtual_step(
    segmenter: Segmenter,
    encoded: list[Tensor] | None,
    labels: Tensor,
    size: tuple[int, int],
    *,
    learning_rate: float,
    steps: int = 1,
    clip_norm: float | None = None,
    scope: Literal["decoder", "head", "all"] = "decoder",
    images: Tensor | None = None,
    weight_decay: float = 0.0,
    images_at_once: int | None = None,
) -> SegmenterOutput:
    """Returns the output under temporary weights: per image, `steps` SGD steps of cross-entropy on its own label map.

    The loss of an image is the mean over its labelled pixels (values below 254), with the logits upsampled bilinearly
    to the labels' size; an image without labelled pixels keeps its weights. Batch normalisation uses its running
    statistics, dropout is off. Nothing of the segmenter changes; the result carries no gradient. A non-finite gradient
    gives a non-finite output, which is the caller's to refuse.

    Args:
        segmenter: Φ, in any mode.
        encoded: `segmenter.encode(images)` in evaluation mode; may be None for scope "all".
        labels: M, uint8 [B, H, W]; 255 unlabelled, 254 padding.
        size: (H, W) of the images in pixels.
        learning_rate: of the plain SGD (no momentum).
        steps: k ≥ 0; 0 returns the plain output.
        clip_norm: the largest norm of an image's gradient over all stepped parameters; None does not clip.
        scope: what steps: everything after the encoder, the last classifier only, or everything.
        images: float [B, 3, H, W], ImageNet-normalised; needed by scope "all".
        weight_decay: added to the (clipped) gradient times the parameter, as in torch's SGD.
        images_at_once: images that step together (vmap); 1 is a loop over the images. None: a loop on the CPU, where
            a loop is faster, and for scope "all"; `IMAGES_AT_ONCE` elsewhere. The result is the same up to rounding.

    Returns:
        features [B, D, h, w] and logits [B, K, h, w], detached.

    Raises:
        InputError: for negative steps, or where the scope lacks its input.

    Source: reconstruction of EIL's newly updated segmenter (the paper does not say how it is updated inside an
    exploration step); the loss is Eq. 14.
    """
    if steps < 0:
        raise InputError(f"The number of virtual steps is {steps}, expected 0 or more.")
    if scope == "all" and images is None:
        raise InputError("A virtual step of scope 'all' needs the images.")
    if scope != "all" and encoded is None:
        raise InputError(f"A virtual step of scope '{scope}' needs the encoded images.")
    if images_at_once is None:
        images_at_once = 1 if scope == "all" or labels.device.type == "cpu" else IMAGES_AT_ONCE

    with evaluation_mode(segmenter):
        parameters, inputs, forward = _parts(segmenter, encoded, images, size, scope)
        if steps == 0:
            return forward(parameters, inputs)

        def step_one(own: list[Tensor], label: Tensor) -> SegmenterOutput:
            """One image without its batch axis: tensors [C, h, w] and uint8 [H, W]."""
            batch = [tensor.unsqueeze(0) for tensor in own]
            stepped = _descend(
                forward,
                parameters,
                batch,
                label.unsqueeze(0),
                learning_rate=learning_rate,
                steps=steps,
                clip_norm=clip_norm,
                weight_decay=weight_decay,
            )
            output = forward(stepped, batch)
            return SegmenterOutput(output.features[0], output.logits[0])

        if images_at_once > 1:
            return SegmenterOutput(*vmap(step_one, chunk_size=images_at_once)(inputs, labels))
        outputs = [step_one([tensor[row] for tensor in inputs], labels[row]) for row in range(labels.shape[0])]
    return SegmenterOutput(*(torch.stack(parts) for parts in zip(*outputs, strict=True)))


class _Classifier(nn.Module):
    """The decoder's last layer alone, on the list [classifier's input, *encoded]."""

    def __init__(self, decoder: SegmenterDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs: list[Tensor], size: tuple[int, int]) -> SegmenterOutput:
        return self.decoder.classify(inputs[0], inputs[1:], size)


def _parts(
    segmenter: Segmenter, encoded: list[Tensor] | None, images: Tensor | None, size: tuple[int, int], scope: str
) -> tuple[Parameters, list[Tensor], Forward]:
    """Returns the parameters that step, the tensors [B, …] that they work on, and what makes outputs of both."""
    if scope == "all":
        assert images is not None
        everything = {name: parameter.detach() for name, parameter in segmenter.named_parameters()}
        return everything, [images], lambda parameters, own: functional_call(segmenter, parameters, (own[0],))
    assert encoded is not None
    if scope == "decoder":
        module: nn.Module = segmenter.decoder
        inputs = encoded
        names = set(segmenter.decoder_parameters())
    else:
        # The classifier's input does not depend on the classifier: it is computed once for all steps.
        module = _Classifier(segmenter.decoder)
        inputs = [segmenter.decoder.represent(encoded), *encoded]
        names = {f"decoder.head.{name}" for name, _ in segmenter.decoder.head.named_parameters()}
    chosen = {name: parameter.detach() for name, parameter in module.named_parameters() if name in names}
    return chosen, inputs, lambda parameters, own: functional_call(module, parameters, (own, size))


def _descend(
    forward: Forward,
    parameters: Parameters,
    batch: list[Tensor],
    labels: Tensor,
    *,
    learning_rate: float,
    steps: int,
    clip_norm: float | None,
    weight_decay: float,
) -> Parameters:
    """Returns the parameters after the SGD steps on one image: tensors [1, C, h, w], labels uint8 [1, H, W]."""
    labelled = labels < PADDING
    count = labelled.sum()
    target = torch.where(labelled, labels, UNLABELLED).long()
    rate = learning_rate * (count > 0)

    def loss(current: Parameters) -> Tensor:
        logits = upsample_logits(forward(current, batch).logits, (labels.shape[-2], labels.shape[-1]))
        total = F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="sum")
        return total / count.clamp(min=1)

    for _ in range(steps):
        gradients = grad(loss)(parameters)
        if clip_norm is not None:
            norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
            # The same guard against a zero norm as torch.nn.utils.clip_grad_norm_.
            factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        parameters = {
            name: value - rate * (gradients[name] + weight_decay * value) for name, value in parameters.items()
        }
    return parameters
