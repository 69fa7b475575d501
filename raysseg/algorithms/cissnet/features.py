"""Domain features X: what the frozen segmenter makes of an image before its classifier (Sec. 2.2)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, evaluation_mode

Kind = Literal["encoder", "pyramid"]


def domain_features(segmenter: Segmenter, images: Tensor, kind: Kind) -> Tensor:
    """Returns X of a batch of images.

    Args:
        segmenter: trained; its normalisation uses running statistics, whatever its mode.
        images: float `[B, 3, H, W]`, ImageNet-normalised.
        kind: 'encoder': the last encoder map; 'pyramid': that map with PSPNet's pyramid pooling of it.

    Returns:
        float `[B, C, h, w]` without gradient, h = ⌈H/s⌉ and w = ⌈W/s⌉ with s the stride of the last encoder map.

    Source: CiSS-Net, Sec. 2.2 and 3.2; with the pyramid: the authors' code.
    """
    with torch.no_grad(), evaluation_mode(segmenter):
        encoded = segmenter.encode(images)
        maps = encoded[-1]
        rows, columns = (math.ceil(side / _stride(encoded)) for side in images.shape[-2:])
        if kind == "pyramid":
            maps = segmenter.decoder.network.psp(maps)
        return maps[..., :rows, :columns]


def feature_shape(segmenter: Segmenter, kind: Kind) -> tuple[int, int]:
    """Returns the channels of X and the pixels per position, found by one pass over an empty image.

    Args:
        segmenter: of any weights, on any device.
        kind: as for `domain_features`.

    Raises:
        InputError: the encoder's last maps are not positions of the image.

    Source: design.
    """
    with torch.no_grad(), evaluation_mode(segmenter):
        empty = torch.zeros(1, 3, 64, 64, device=next(segmenter.parameters()).device)
        encoded = segmenter.encode(empty)
    return domain_features(segmenter, empty, kind).shape[1], _stride(encoded)


class NewestFeatures:
    """X of the crops that were played last, for a learner of the same process, which would make the same again."""

    def __init__(self) -> None:
        self._crops: tuple[bytes, bytes] | None = None
        self._maps: Tensor | None = None

    def keep(self, rows: np.ndarray, seeds: np.ndarray, maps: Tensor) -> None:
        """Keeps X float `[B, C, h, w]` of the crops of rows int64 `[B]` under seeds int64 `[B]`, in place of what was kept."""
        self._crops, self._maps = _named(rows, seeds), maps

    def take(self, rows: np.ndarray, seeds: np.ndarray) -> Tensor | None:
        """Returns X float `[B, C, h, w]`, fit for gradients of what is made of it, where these very crops were kept."""
        if self._maps is None or self._crops != _named(rows, seeds):
            return None
        # Made under inference mode, which autograd refuses; a copy is not.
        return self._maps.clone() if self._maps.is_inference() else self._maps


def _named(rows: np.ndarray, seeds: np.ndarray) -> tuple[bytes, bytes]:
    return np.asarray(rows, dtype=np.int64).tobytes(), np.asarray(seeds, dtype=np.int64).tobytes()


def _stride(encoded: list[Tensor]) -> int:
    """The first encoded map of the convolutional encoders of segmentation_models_pytorch is the padded image."""
    side, cells = encoded[0].shape[-1], encoded[-1].shape[-1]
    if encoded[-1].ndim != 4 or not cells or side % cells:
        raise InputError(
            f"The segmenter's encoder ends in maps {list(encoded[-1].shape)} of an image of {side} pixels, which cannot be "
            "cissnet.network.features: an encoder whose maps divide the image is expected."
        )
    return side // cells
