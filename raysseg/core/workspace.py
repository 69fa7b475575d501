"""What every process that touches pixels needs: the data on its device, the label versions, and the arithmetic it
may use.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from raysseg.core.settings import MethodSettings
from raysseg.data.batches import DeviceDataset
from raysseg.data.label_store import LabelStore
from raysseg.data.store import Store


class Workspace:
    """The dataset's splits on one device, with the label maps of every version.

    Args:
        settings: the variant's settings.
        store_uri: where the Arrow store is.
        labels_uri: where the label versions are.
        device: where batches are needed.
    """

    def __init__(self, settings: MethodSettings, store_uri: str, labels_uri: str, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        if device.type == "cpu" and self.low_precision is not None and not _cpu_has_bf16():
            warnings.warn(
                "engine.precision is 'bf16' but this CPU has no instructions for it, which can make networks many times slower: "
                "expected 'auto' or 'fp32'",
                stacklevel=2,
            )
        self.store = Store.open(store_uri)
        self.label_store = LabelStore(labels_uri)
        self._splits: dict[str, DeviceDataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes K, the background included."""
        return self.store.info.num_classes

    @property
    def train(self) -> DeviceDataset:
        """The training split."""
        return self.split(self.settings.data.train_split)

    def split(self, name: str) -> DeviceDataset:
        """Returns a split on the device, opened at the first call."""
        if name not in self._splits:
            self._splits[name] = DeviceDataset(
                self.store, name, self.device, self.settings.engine.cache_mib, self.label_store
            )
        return self._splits[name]

    @property
    def low_precision(self) -> torch.dtype | None:
        """The dtype of autocast, or None where everything stays in fp32."""
        return low_precision(self.settings.engine.precision, self.device)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs the networks in the low precision, where there is one."""
        dtype = self.low_precision
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield


def low_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast for the setting `engine.precision` on a device, or None for fp32."""
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and device.type == "cuda") else None


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def choose_device(num_gpus: float) -> torch.device:
    """Returns the GPU where one is asked for and visible, else the CPU."""
    return torch.device("cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu")
