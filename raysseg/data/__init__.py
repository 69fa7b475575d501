"""Datasets: samples, the Arrow store, label versions, augmentation and batches on a device."""

from raysseg.data.sample import DatasetInfo, Expression, Sample, default_palette

__all__ = ["DatasetInfo", "Expression", "Sample", "default_palette"]
