"""The encoder's maps of images on their way to the decoder: made anew every time, or once where the encoder never changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raysseg.data.augmentation import normalise
from raysseg.errors import NonFiniteError
from raysseg.segmenters import Segmenter, evaluation_mode

Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context in which networks run in the low precision, where there is one."""

_MIB = 1 << 20


class ImageSource(Protocol):
    """Images by row number, as `raysseg.data.DeviceDataset` gives them."""

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 `[B, 3, H, W]` at the top left of a canvas, and their (H, W), int64 `[B, 2]`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """The encoder's maps of some images of one size.

    Args:
        places: which of the rows that were asked for these are, int64 `[B]`.
        size: (H, W) of the images in pixels.
        maps: from `Segmenter.encode`.
    """

    places: np.ndarray
    size: tuple[int, int]
    maps: list[Tensor]


class EncoderMaps(Protocol):
    """Where the decoder's input comes from."""

    def batches(self, segmenter: Segmenter, rows: np.ndarray, most: int | None = None) -> Iterator[Encoded]:
        """Yields the maps of images in batches, each image exactly once; without gradients.

        Args:
            segmenter: whose encoder it is, in evaluation mode.
            rows: int64 `[M]`.
            most: images of a batch; None: as many as are passed where no gradient is needed.
        """


class FreshMaps:
    """The encoder runs whenever its maps are asked for.

    Args:
        source: the images.
        batch_size: most images of a batch.
        autocast: the precision.
    """

    def __init__(self, source: ImageSource, batch_size: int, autocast: Autocast) -> None:
        self._source, self._batch_size, self._autocast = source, batch_size, autocast

    @torch.no_grad()
    def batches(self, segmenter: Segmenter, rows: np.ndarray, most: int | None = None) -> Iterator[Encoded]:
        """Yields the maps of images in batches; see `EncoderMaps`."""
        count = most or self._batch_size
        for first in range(0, len(rows), count):
            images, sizes = self._source.images(torch.as_tensor(rows[first : first + count]))
            for size, members in _by_size([(int(height), int(width)) for height, width in sizes.tolist()]).items():
                pixels = normalise(images[members, :, : size[0], : size[1]])
                with self._autocast():
                    maps = segmenter.encode(pixels)
                yield Encoded(places=first + np.array(members), size=size, maps=maps)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kept:
    """One image's maps, float16 without batch; of those that the decoder does not use, the shape alone."""

    size: tuple[int, int]
    maps: list[Tensor]


class KeptMaps:
    """The encoder runs once per image, for as long as its weights are the same; maps are held in half precision.

    An image's maps are made from that image alone, so they do not depend on which episodes were played before. Where no more fit
    into memory, further images are encoded every time, to the very same values.

    Args:
        source: the images.
        batch_size: most images of a batch.
        autocast: the precision.
        keep_mib: most memory in MiB.
    """

    def __init__(self, source: ImageSource, batch_size: int, autocast: Autocast, keep_mib: int) -> None:
        self._source, self._batch_size, self._autocast = source, batch_size, autocast
        self._limit = keep_mib * _MIB
        self._encoder: dict[str, Tensor] = {}
        self._used: list[bool] = []
        self._kept: dict[int, _Kept] = {}
        self._bytes = 0

    def follow(self, segmenter: Segmenter) -> None:
        """Forgets all maps where this segmenter's encoder is another one than before."""
        state = segmenter.encoder.state_dict()
        if state.keys() == self._encoder.keys() and all(
            torch.equal(state[name], self._encoder[name]) for name in state
        ):
            return
        self._encoder = {name: value.clone() for name, value in state.items()}
        self._used, self._kept, self._bytes = [], {}, 0

    @torch.no_grad()
    def batches(self, segmenter: Segmenter, rows: np.ndarray, most: int | None = None) -> Iterator[Encoded]:
        """Yields the maps of images in batches; see `EncoderMaps`."""
        count = most or self._batch_size
        for first in range(0, len(rows), count):
            images = [self._of(segmenter, int(row)) for row in rows[first : first + count]]
            for size, members in _by_size([image.size for image in images]).items():
                levels = zip(*(images[member].maps for member in members), strict=True)
                maps = [
                    torch.stack(level).float()
                    if used
                    else level[0].new_zeros((), dtype=torch.float32).expand(len(level), *level[0].shape)
                    for level, used in zip(levels, self._used, strict=True)
                ]
                yield Encoded(places=first + np.array(members), size=size, maps=maps)

    def _of(self, segmenter: Segmenter, row: int) -> _Kept:
        if row in self._kept:
            return self._kept[row]
        images, sizes = self._source.images(torch.tensor([row]))
        height, width = sizes[0].tolist()
        with evaluation_mode(segmenter), self._autocast():
            maps = [level.float() for level in segmenter.encode(normalise(images))]
        if not self._used:
            self._used = _used_maps(segmenter, maps, (height, width))
        halves = [
            # One number in place of all: what the decoder does not look at keeps its shape alone.
            level[0].half() if used else level.new_zeros(()).half().expand(level.shape[1:])
            for level, used in zip(maps, self._used, strict=True)
        ]
        if not all(bool(torch.isfinite(level).all()) for level, used in zip(halves, self._used, strict=True) if used):
            raise NonFiniteError(
                f"The encoder's maps of the image in row {row} are not finite in half precision; set ralis.episode.scope to 'all'."
            )
        kept = _Kept(size=(height, width), maps=halves)
        size = sum(level.untyped_storage().nbytes() for level in halves)
        if self._bytes + size <= self._limit:
            self._kept[row] = kept
            self._bytes += size
        return kept


@torch.enable_grad()
def _used_maps(segmenter: Segmenter, maps: list[Tensor], size: tuple[int, int]) -> list[bool]:
    """Says which of the encoder's maps features or logits depend on."""
    leaves = [level.detach().clone().requires_grad_() for level in maps]
    with evaluation_mode(segmenter):
        features, logits = segmenter.decode(leaves, size)
    gradients = torch.autograd.grad(features.sum() + logits.sum(), leaves, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _by_size(sizes: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Groups images by their size; every group is one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, size in enumerate(sizes):
        groups.setdefault(size, []).append(place)
    return groups
