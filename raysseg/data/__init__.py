"""Datasets: samples, the Arrow store, label versions, augmentation and batches on a device."""

from raysseg.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentationSettings,
    Geometry,
    crop_and_flip,
    draw_geometry,
    normalise,
    warp_images,
    warp_labels,
)
from raysseg.data.batches import GROUND_TRUTH, SCRIBBLES, DeviceDataset
from raysseg.data.codec import decode_map, encode_map
from raysseg.data.doctor import Finding, check_dataset
from raysseg.data.label_store import LabelRow, LabelStore
from raysseg.data.photometric import PhotometricSettings, vary_colours
from raysseg.data.sample import DatasetInfo, Expression, Sample, default_palette
from raysseg.data.scribbles import generate_scribbles
from raysseg.data.settings import DataSettings, open_dataset
from raysseg.data.store import Store, write_store
from raysseg.data.synthetic import synthetic_samples

__all__ = [
    "GROUND_TRUTH",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SCRIBBLES",
    "AugmentationSettings",
    "DataSettings",
    "DatasetInfo",
    "DeviceDataset",
    "Expression",
    "Finding",
    "Geometry",
    "LabelRow",
    "LabelStore",
    "PhotometricSettings",
    "Sample",
    "Store",
    "check_dataset",
    "crop_and_flip",
    "decode_map",
    "default_palette",
    "draw_geometry",
    "encode_map",
    "generate_scribbles",
    "normalise",
    "open_dataset",
    "synthetic_samples",
    "vary_colours",
    "warp_images",
    "warp_labels",
    "write_store",
]
