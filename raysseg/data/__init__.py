"""Datasets: samples, the Arrow store, label versions, augmentation and batches on a device."""

from raysseg.data.codec import decode_map, encode_map
from raysseg.data.label_store import LabelRow, LabelStore
from raysseg.data.sample import DatasetInfo, Expression, Sample, default_palette
from raysseg.data.store import Store, write_store

__all__ = [
    "DatasetInfo",
    "Expression",
    "LabelRow",
    "LabelStore",
    "Sample",
    "Store",
    "decode_map",
    "default_palette",
    "encode_map",
    "write_store",
]
