"""Synthetic scenes of any size and number of classes, so that anyone can run the benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raysseg.data import DatasetInfo, Sample, Store, default_palette, synthetic_samples, write_store
from raysseg.data.synthetic import SyntheticSettings


def scenes(count: int, height: int, width: int, num_classes: int) -> Iterator[Sample]:
    """Makes scenes whose objects' classes are spread over 1…K−1: four of them in each scene, other ones in the next."""
    settings = SyntheticSettings(train_images=count, height=height, width=width, objects=10)
    for number, sample in enumerate(synthetic_samples(settings, splits=("train",))):
        spread: np.ndarray = np.arange(256, dtype=np.uint8)
        spread[1:5] = 1 + (np.arange(4) + 4 * number) % (num_classes - 1)
        assert sample.label is not None
        assert sample.scribble is not None
        label = spread[sample.label]
        yield dataclasses.replace(
            sample,
            label=label,
            scribble=spread[sample.scribble],
            tags=tuple(int(k) for k in np.unique(label) if k),
            expressions=(),
        )


def write_scenes(folder: Path, count: int, height: int, width: int, num_classes: int) -> Store:
    """Writes scenes into a store with the split `train`."""
    info = DatasetInfo(
        name="scenes",
        class_names=tuple(f"class {k}" for k in range(num_classes)),
        palette=default_palette(num_classes),
        has_background=True,
        source="synthetic scenes, classes spread",
    )
    return write_store(str(folder), scenes(count, height, width, num_classes), info, image_encoding="raw")
