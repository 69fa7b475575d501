"""Batches of images and label maps on a device: held there once where they fit, read from the store otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysseg.data.augmentation import IMAGENET_MEAN
from raysseg.data.label_store import LabelStore
from raysseg.data.store import Store, nearest_key
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING

SCRIBBLES = 0
"""The label version of the scribbles that were given."""

GROUND_TRUTH = -1
"""The label version of the dataset's own labels."""

_DECODING_THREADS = 4
_PIECE = 64
_MEAN_COLOUR = torch.tensor([round(255 * mean) for mean in IMAGENET_MEAN], dtype=torch.uint8).view(1, 3, 1, 1)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldVersion:
    """A label version on the device, uint8 [N, H, W], and for the rows that have no map there what is to be said."""

    labels: Tensor
    missing: dict[int, str]


class DeviceDataset:
    """One split of a store, addressed by row number, as padded uint8 batches on a device.

    Where all images of the split fit into `cache_mib` they are held on the device, and so is each label version that
    still fits; a batch is then an `index_select`. Otherwise every batch is decoded by a few threads. Both give the same
    values. To be used from one thread.

    Args:
        store: the dataset.
        split: which of its splits.
        device: where the batches are to be.
        cache_mib: most memory in MiB to hold on the device; 0 holds nothing.
        label_store: the versions 1, 2, … of the label maps; None where only scribbles and ground truth are used.
    Raises:
        InputError: for an unknown split, or a negative `cache_mib`.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        device: torch.device | str,
        cache_mib: int,
        label_store: LabelStore | None = None,
    ) -> None:
        if cache_mib < 0:
            raise InputError(f"cache_mib is {cache_mib}; 0 (hold nothing) or more MiB are expected.")
        self.keys = store.keys(split)
        self.device = torch.device(device)
        self._store = store
        self._split = split
        self._label_store = label_store
        self._row_of_key = {key: row for row, key in enumerate(self.keys)}
        self._sizes = torch.tensor([store.size(key) for key in self.keys], dtype=torch.int64)
        self._device_sizes = self._sizes.to(self.device)
        self._largest = self._canvas_size(range(len(self.keys)))
        self._pool = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._versions: dict[int, _HeldVersion] = {}
        self._free_bytes = cache_mib * _MIB
        self._plane_bytes = len(self.keys) * self._largest[0] * self._largest[1]
        self._images: Tensor | None = None
        if 3 * self._plane_bytes <= self._free_bytes:
            self._images = self._whole_split(lambda numbers: self._read_images(numbers, self._largest))
            self._free_bytes -= 3 * self._plane_bytes

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def canvas(self) -> tuple[int, int]:
        """(H, W) in pixels of the smallest canvas that holds every image of the split."""
        return self._largest

    @property
    def is_cached(self) -> bool:
        """Whether the images are held on the device."""
        return self._images is not None

    def rows(self, keys: Sequence[str]) -> Tensor:
        """Row numbers int64 [B] (on the CPU) of keys. Raises InputError for a key that the split does not have."""
        numbers = []
        for key in keys:
            row = self._row_of_key.get(key)
            if row is None:
                raise InputError(f"The split '{self._split}' has no sample '{key}'{nearest_key(key, self._row_of_key)}")
            numbers.append(row)
        return torch.tensor(numbers, dtype=torch.int64)

    def sizes(self, rows: Tensor) -> Tensor:
        """(H, W) in pixels of the images of some rows int64 [B], int64 [B, 2] on the device; reads no image."""
        return self._device_sizes.index_select(0, torch.tensor(self._numbers(rows), device=self.device))

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of some rows.

        Args:
            rows: int64 [B] (best on the CPU: the size of the canvas is looked up there).
        Returns:
            images uint8 [B, 3, H, W], each at the top left of a canvas as large as the largest of them (ImageNet's
            mean beside it), and sizes int64 [B, 2], (H, W) of each; both on the device.
        Raises:
            InputError: for a row number that the split does not have.
        """
        numbers = self._numbers(rows)
        canvas_size = self._canvas_size(numbers)
        device_rows = torch.tensor(numbers, dtype=torch.int64).to(self.device)
        sizes = self._device_sizes.index_select(0, device_rows)
        if self._images is None:
            return self._read_images(numbers, canvas_size), sizes
        height, width = canvas_size
        return self._images.index_select(0, device_rows)[:, :, :height, :width], sizes

    def labels(self, rows: Tensor, version: int) -> Tensor:
        """Label maps of some rows, on the device, with the canvas that `images` has for the same rows.

        Args:
            rows: int64 [B].
            version: a version of the label store, 0 for the scribbles, -1 for the ground truth.
        Returns:
            uint8 [B, H, W]: classes, 255 unlabelled, 254 beside an image.
        Raises:
            InputError: for an unknown row or version, and for a sample that has no such map or one of another size.
        """
        numbers = self._numbers(rows)
        canvas_size = self._canvas_size(numbers)
        held = self._held(version)
        if held is None:
            return self._read_labels(numbers, canvas_size, self._label_reader(version))
        for number in numbers:
            if number in held.missing:
                raise InputError(held.missing[number])
        height, width = canvas_size
        device_rows = torch.tensor(numbers, dtype=torch.int64).to(self.device)
        return held.labels.index_select(0, device_rows)[:, :height, :width]

    @property
    def has_instances(self) -> bool:
        """Whether objects are told apart in the split's first image; `instances` refuses an image that differs."""
        return self._store.has_instances(self.keys[0])

    def instances(self, rows: Tensor) -> Tensor:
        """The dataset's numbers of its objects in some rows, on the device, with the canvas of `images`; never held there.

        Args:
            rows: int64 [B].
        Returns:
            int32 [B, H, W], 0 to 65535; 0 beside an image.
        Raises:
            InputError: for an unknown row, and for a sample without instances.
        """
        numbers = self._numbers(rows)

        def instances_of(row: int) -> np.ndarray:
            found = self._store.instances(self.keys[row])
            if found is None:
                raise InputError(f"The sample '{self.keys[row]}' of the store '{self._store.uri}' has no instances.")
            return found

        canvas = torch.zeros(len(numbers), *self._canvas_size(numbers), dtype=torch.int32)
        return self._read_maps(numbers, canvas, instances_of)

    def release(self, version: int) -> None:
        """Frees the memory of a label version, if it is held; whoever asks for it again has it read again."""
        if self._versions.pop(version, None) is not None:
            self._free_bytes += self._plane_bytes

    def _held(self, version: int) -> _HeldVersion | None:
        """The version on the device, brought there now if it fits beside the images."""
        held = self._versions.get(version)
        if held is None and self._images is not None and self._plane_bytes <= self._free_bytes:
            label_of = self._label_reader(version)
            missing: dict[int, str] = {}

            def read(row: int) -> np.ndarray | None:
                # A sample without this map matters only to whoever asks for it, as it does without a cache.
                try:
                    return label_of(row)
                except InputError as error:
                    missing[row] = str(error)
                    return None

            labels = self._whole_split(lambda numbers: self._read_labels(numbers, self._largest, read))
            held = self._versions[version] = _HeldVersion(labels=labels, missing=missing)
            self._free_bytes -= self._plane_bytes
        return held

    def _maps_of(self, version: int) -> tuple[str, Callable[[str], np.ndarray | None]]:
        """What a label version is called, and the function that reads the map of a key."""
        if version == GROUND_TRUTH:
            return "ground truth label", self._store.label
        if version == SCRIBBLES:
            return "scribble", self._store.scribble
        if version < GROUND_TRUTH:
            raise InputError(
                f"The label version {version} is unknown; -1 (ground truth), 0 (scribbles) or more is expected."
            )
        label_store = self._label_store
        if label_store is None:
            raise InputError(f"The label version {version} was asked for, but no label store was given.")
        label_store.table(version)
        return f"label version {version}", lambda key: label_store.label(version, key)

    def _label_reader(self, version: int) -> Callable[[int], np.ndarray]:
        """A function that reads the map of a row, of the size of its image."""
        what, map_of = self._maps_of(version)

        def read(row: int) -> np.ndarray:
            key = self.keys[row]
            label = map_of(key)
            if label is None:
                raise InputError(f"The sample '{key}' of the store '{self._store.uri}' has no {what}.")
            if label.shape != self._store.size(key):
                raise InputError(f"The {what} of '{key}' is {label.shape}; {self._store.size(key)} is expected.")
            return label

        return read

    def _numbers(self, rows: Tensor) -> list[int]:
        numbers = rows.tolist()
        if not numbers:
            raise InputError("A batch without rows was asked for; at least one is expected.")
        for number in numbers:
            if not 0 <= number < len(self.keys):
                raise InputError(
                    f"The split '{self._split}' has no row {number}; 0 to {len(self.keys) - 1} are expected."
                )
        return numbers

    def _canvas_size(self, numbers: Sequence[int]) -> tuple[int, int]:
        height, width = self._sizes[list(numbers)].amax(dim=0).tolist()
        return height, width

    def _whole_split(self, read: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Brings all rows to the device piece by piece, so that the host never holds all of them."""
        count = len(self.keys)
        first = read(range(min(_PIECE, count)))
        whole = first.new_empty((count, *first.shape[1:]))
        whole[: len(first)] = first
        for start in range(len(first), count, _PIECE):
            whole[start : start + _PIECE] = read(range(start, min(start + _PIECE, count)))
        return whole

    def _read_images(self, numbers: Sequence[int], canvas_size: tuple[int, int]) -> Tensor:
        canvas = _MEAN_COLOUR.expand(len(numbers), 3, *canvas_size).contiguous()
        target = canvas.numpy()

        def read(place: int) -> None:
            image = self._store.image(self.keys[numbers[place]])
            height, width = image.shape[:2]
            target[place, :, :height, :width] = image.transpose(2, 0, 1)

        return self._decode(read, canvas)

    def _read_labels(
        self, numbers: Sequence[int], canvas_size: tuple[int, int], label_of: Callable[[int], np.ndarray | None]
    ) -> Tensor:
        canvas = torch.full((len(numbers), *canvas_size), PADDING, dtype=torch.uint8)
        return self._read_maps(numbers, canvas, label_of)

    def _read_maps(self, numbers: Sequence[int], canvas: Tensor, map_of: Callable[[int], np.ndarray | None]) -> Tensor:
        target = canvas.numpy()

        def read(place: int) -> None:
            found = map_of(numbers[place])
            if found is not None:
                height, width = found.shape
                target[place, :height, :width] = found

        return self._decode(read, canvas)

    def _decode(self, read: Callable[[int], None], canvas: Tensor) -> Tensor:
        """Lets the threads fill the canvas (decoding and copying leave Python's lock) and brings it to the device."""
        for _ in self._pool.map(read, range(len(canvas))):
            pass
        if self.device.type == "cuda":
            return canvas.pin_memory().to(self.device, non_blocking=True)
        return canvas.to(self.device)
