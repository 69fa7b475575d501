"""The segmenter Φ: one interface over all segmentation networks, split into an encoder and a decoder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysseg.segmenters.settings import SegmenterSettings


class SegmenterOutput(NamedTuple):
    """What a segmenter says of a batch of images, at one resolution (h, w) = ⌈(H, W) / feature_stride⌉."""

    features: Tensor
    """F: float [B, D, h, w]."""
    logits: Tensor
    """Before the softmax and before any upsampling: float [B, K, h, w]."""


def upsample_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the logits at the image's resolution, bilinearly (align_corners=False), in float32.

    A cell of the logits covers s×s pixels from the top-left corner on, with s the power of two for which
    h = ⌈H/s⌉ and w = ⌈W/s⌉; the part of the last cells beyond the image is cut off, so that nothing is stretched.
    Logits of another shape are resized to `size` as a whole.

    Args:
        logits: float [B, K, h, w].
        size: (H, W) in pixels.

    Returns:
        float32 [B, K, H, W].
    """
    height, width = logits.shape[-2:]
    stride = 1
    while height * stride < size[0] or width * stride < size[1]:
        stride *= 2
    target = (height * stride, width * stride)
    if (math.ceil(size[0] / stride), math.ceil(size[1] / stride)) != (height, width):
        target = size
    if target != (height, width):
        logits = F.interpolate(logits.float(), size=target, mode="bilinear", align_corners=False)
    return logits.float()[..., : size[0], : size[1]]


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode and gives every part of it its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _resample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to a finer, area-averaged to a coarser resolution."""
    if features.shape[-2:] == size:
        return features
    if features.shape[-2] > size[0]:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


class SegmenterDecoder(nn.Module):
    """Everything of a segmenter after its encoder: context module, decoder network and classifier.

    It works under `torch.func.functional_call` and `torch.func.vmap` in evaluation mode.

    Args:
        network: list of encoder maps → [B, D', h, w].
        head: the last convolution, [B, D', h, w] → [B, K, h, w].
        settings: the segmenter's.
        last_map: index of the last encoder map in the list of encoded tensors.
    """

    def __init__(self, network: nn.Module, head: nn.Module, settings: SegmenterSettings, last_map: int) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.feature_stride = 1
        self._tap = {"decoder": None, "encoder": last_map, "encoder_low": 2}[settings.feature_tap]
        dropouts = [part for part in network.modules() if isinstance(part, nn.modules.dropout._DropoutNd)]
        self.dropout = nn.Dropout2d(settings.dropout or 0.0) if not dropouts else nn.Identity()
        if settings.dropout is not None:
            for part in dropouts:
                part.p = settings.dropout

    def represent(self, encoded: list[Tensor]) -> Tensor:
        """Returns the classifier's input [B, D', h', w'] for what `Segmenter.encode` returned; not yet cropped."""
        return self.network(encoded)

    def classify(self, representation: Tensor, encoded: list[Tensor], size: tuple[int, int]) -> SegmenterOutput:
        """Returns features and logits, cropped to the image.

        Args:
            representation: from `represent`.
            encoded: from `Segmenter.encode`.
            size: (H, W) of the images in pixels.
        """
        logits = self.head(self.dropout(representation))
        features = representation if self._tap is None else _resample(encoded[self._tap], logits.shape[-2:])
        rows, columns = (math.ceil(side / self.feature_stride) for side in size)
        return SegmenterOutput(features[..., :rows, :columns], logits[..., :rows, :columns])

    def forward(self, encoded: list[Tensor], size: tuple[int, int]) -> SegmenterOutput:
        """Returns features and logits of what `Segmenter.encode` returned, for images of `size` (H, W)."""
        return self.classify(self.represent(encoded), encoded, size)


class Segmenter(nn.Module):
    """A segmentation network behind one interface. Built by `build_segmenter`.

    Args:
        encoder: padded images → list of maps.
        decoder: list of maps → features and logits.
        settings: what it was built from.
        num_classes: K.
        multiple: images are padded to a multiple of this many pixels.
        minimum: and to at least this many.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: SegmenterDecoder,
        settings: SegmenterSettings,
        num_classes: int,
        *,
        multiple: int,
        minimum: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.settings = settings
        self.num_classes = num_classes
        self.feature_channels = 0
        self._multiple = multiple
        self._minimum = minimum
        self._measure_and_prune()

    @property
    def feature_stride(self) -> int:
        """Pixels per cell of the features and logits."""
        return self.decoder.feature_stride

    def encode(self, images: Tensor) -> list[Tensor]:
        """Returns the encoder's maps, finest first; the first of most encoders is the padded image itself.

        Images are padded at the right and at the bottom with 0, the mean colour, which is also what the padding of a
        canvas holds.

        Args:
            images: float [B, 3, H, W], ImageNet-normalised.
        """
        height, width = (
            max(math.ceil(side / self._multiple) * self._multiple, self._minimum) for side in images.shape[-2:]
        )
        padding = (0, width - images.shape[-1], 0, height - images.shape[-2])
        return self.encoder(F.pad(images, padding) if any(padding) else images)

    def decode(self, encoded: list[Tensor], size: tuple[int, int]) -> SegmenterOutput:
        """Returns features and logits of encoded images.

        Args:
            encoded: from `encode`.
            size: (H, W) of the images in pixels, before the padding.
        """
        return self.decoder(encoded, size)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Returns features [B, D, h, w] and logits [B, K, h, w] at ⌈(H, W) / feature_stride⌉.

        Args:
            images: float [B, 3, H, W], ImageNet-normalised, any H and W.
        """
        return self.decode(self.encode(images), (images.shape[-2], images.shape[-1]))

    def decoder_parameters(self) -> dict[str, Tensor]:
        """Returns the parameters after the encoder by their name in `segmenter.decoder`."""
        return dict(self.decoder.named_parameters())

    def encoder_parameters(self) -> dict[str, Tensor]:
        """Returns the parameters of the encoder by their name in `segmenter.encoder`."""
        return dict(self.encoder.named_parameters())

    def parameter_groups(
        self, learning_rate: float, head_multiplier: float = 10.0, weight_decay: float = 5e-4
    ) -> list[dict[str, Any]]:
        """Returns an optimizer's two groups: the encoder, and the new layers at a multiple of its learning rate.

        Args:
            learning_rate: of the encoder.
            head_multiplier: how much faster the decoder learns. 10 [R], the practice of DeepLab's code line.
            weight_decay: of both. 5e-4 [P]
        """
        return [
            {"params": list(self.encoder.parameters()), "lr": learning_rate, "weight_decay": weight_decay},
            {
                "params": list(self.decoder.parameters()),
                "lr": learning_rate * head_multiplier,
                "weight_decay": weight_decay,
            },
        ]

    def _measure_and_prune(self) -> None:
        """Finds width and stride of the features, and drops the stages that no output depends on.

        An encoder cut at `encoder_depth` still holds its last stages; without a gradient they would only waste memory
        and break data-parallel training, which waits for the gradient of every parameter.
        """
        side = max(self._minimum, math.ceil(64 / self._multiple) * self._multiple)
        parameters = dict(self.named_parameters())
        with evaluation_mode(self), torch.enable_grad():
            features, logits = self(torch.zeros(1, 3, side, side))
            gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
        self.feature_channels = features.shape[1]
        self.decoder.feature_stride = side // logits.shape[-1]
        used = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        _drop_unused(self, "", used)


def _drop_unused(module: nn.Module, prefix: str, used: set[str]) -> None:
    """Replaces the outermost parts of a module that own parameters, none of them used, by nothing."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        owned = {f"{path}.{parameter}" for parameter, _ in child.named_parameters()}
        if owned and not owned & used:
            setattr(module, name, nn.Identity())
        elif owned:
            _drop_unused(child, f"{path}.", used)
