"""Batches on a device: the same values with and without a cache, and what is missing is named when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysseg.data.augmentation import normalise
from raysseg.data.batches import GROUND_TRUTH, SCRIBBLES, DeviceDataset
from raysseg.data.label_store import LabelRow, LabelStore
from raysseg.data.sample import DatasetInfo, Sample, default_palette
from raysseg.data.store import Store, write_store
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING

COUNT = 150
HELD = 64
"""MiB; far more than the samples take."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make_sample(number: int) -> Sample:
    random = np.random.default_rng(number)
    height, width = (int(side) for side in random.integers(3, 20, 2))

    def label_map() -> np.ndarray:
        return random.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))

    return Sample(
        key=f"k{number}",
        image=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        split="train" if number else "val",
        label=None if number == 7 else label_map(),
        scribble=None if number == 9 else label_map(),
    )


SAMPLES = [make_sample(number) for number in range(COUNT + 1)]
TRAIN = SAMPLES[1:]


def stage(version: int, sample: Sample) -> np.ndarray:
    return np.random.default_rng(version).integers(0, 3, sample.image.shape[:2], dtype=np.uint8)


@pytest.fixture(scope="module", params=["raw", "png"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    info = DatasetInfo(
        name="test", class_names=("a", "b", "c"), palette=default_palette(3), has_background=True, source="a test"
    )
    return write_store(tmp_path_factory.mktemp("data") / "store", SAMPLES, info, image_encoding=request.param)


@pytest.fixture(scope="module")
def label_store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    store = LabelStore(tmp_path_factory.mktemp("labels"))
    for version in (1, 2):
        store.write(version, (LabelRow(key=sample.key, label=stage(version, sample)) for sample in TRAIN))
    return store


def check_batch(data: DeviceDataset, numbers: list[int]) -> None:
    chosen = [TRAIN[number] for number in numbers]
    height = max(sample.image.shape[0] for sample in chosen)
    width = max(sample.image.shape[1] for sample in chosen)
    rows = torch.tensor(numbers)
    images, sizes = data.images(rows)
    assert images.dtype == torch.uint8
    assert sizes.dtype == torch.int64
    assert images.shape == (len(numbers), 3, height, width)
    assert sizes.tolist() == [list(sample.image.shape[:2]) for sample in chosen]
    versions: dict[int, Callable[[Sample], np.ndarray | None]] = {
        GROUND_TRUTH: lambda sample: sample.label,
        SCRIBBLES: lambda sample: sample.scribble,
        1: lambda sample: stage(1, sample),
        2: lambda sample: stage(2, sample),
    }
    labels = {version: data.labels(rows, version) for version in versions}
    for index, sample in enumerate(chosen):
        h, w = sample.image.shape[:2]
        beside = np.ones((height, width), bool)
        beside[:h, :w] = False
        assert np.array_equal(images[index, :, :h, :w].cpu().numpy(), sample.image.transpose(2, 0, 1))
        if beside.any():
            assert normalise(images)[index].cpu()[:, torch.from_numpy(beside)].abs().max() < 0.01
        for version, map_of in versions.items():
            plane = labels[version][index].cpu().numpy()
            assert plane.shape == (height, width)
            assert np.array_equal(plane[:h, :w], map_of(sample))
            assert (plane[beside] == PADDING).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_mib", [0, HELD])
def test_any_rows_come_padded_to_the_largest_of_them(
    store: Store, label_store: LabelStore, device: str, cache_mib: int
) -> None:
    data = DeviceDataset(store, "train", device, cache_mib, label_store)
    assert data.is_cached == (cache_mib > 0)
    assert len(data) == COUNT
    assert data.keys == [sample.key for sample in TRAIN]
    assert data.canvas == tuple(max(sample.image.shape[axis] for sample in TRAIN) for axis in (0, 1))
    complete = [number for number, sample in enumerate(TRAIN) if sample.key not in ("k7", "k9")]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.sampled_from(complete), min_size=1, max_size=9))
    def check(numbers: list[int]) -> None:
        check_batch(data, numbers)

    check()
    check_batch(data, complete)


def test_held_rows_are_read_once_and_again_after_release(store: Store, label_store: LabelStore) -> None:
    data = DeviceDataset(store, "train", "cpu", HELD, label_store)
    rows = torch.tensor([0, 3, 3])
    with (
        mock.patch.object(store, "image", side_effect=AssertionError("read again")),
        mock.patch.object(label_store, "label", wraps=label_store.label) as read,
    ):
        data.images(rows)
        for _ in range(3):
            data.labels(rows, 1)
        assert read.call_count == COUNT
        data.release(1)
        data.release(2)
        data.labels(rows, 1)
        assert read.call_count == 2 * COUNT


def test_only_the_rows_of_a_batch_are_read_without_a_cache(store: Store, label_store: LabelStore) -> None:
    data = DeviceDataset(store, "train", "cpu", 0, label_store)
    with mock.patch.object(store, "image", wraps=store.image) as read:
        data.images(torch.tensor([5, 2]))
    assert sorted(call.args[0] for call in read.call_args_list) == ["k3", "k6"]


def test_the_cache_holds_no_more_than_it_may(tmp_path: Path) -> None:
    """Ten images of 256×512: 3.75 MiB, and 1.25 MiB for each label version."""
    image, label = np.zeros((256, 512, 3), np.uint8), np.zeros((256, 512), np.uint8)
    info = DatasetInfo(
        name="test", class_names=("a",), palette=default_palette(1), has_background=False, source="a test"
    )
    samples = (Sample(key=str(n), image=image, split="train", label=label, scribble=label) for n in range(10))
    store = write_store(tmp_path / "store", samples, info, image_encoding="raw")
    assert not DeviceDataset(store, "train", "cpu", 3).is_cached
    data = DeviceDataset(store, "train", "cpu", 5)
    assert data.is_cached
    rows = torch.tensor([1])

    def reads(version: int, method: str) -> int:
        with mock.patch.object(store, method, wraps=getattr(store, method)) as read:
            data.labels(rows, version)
        return read.call_count

    assert [reads(GROUND_TRUTH, "label"), reads(GROUND_TRUTH, "label")] == [10, 0]
    assert [reads(SCRIBBLES, "scribble"), reads(SCRIBBLES, "scribble")] == [1, 1]
    data.release(GROUND_TRUTH)
    assert [reads(SCRIBBLES, "scribble"), reads(SCRIBBLES, "scribble")] == [10, 0]


@pytest.mark.parametrize("cache_mib", [0, HELD])
def test_what_is_missing_is_named_by_whoever_asks_for_it(
    store: Store, label_store: LabelStore, cache_mib: int, tmp_path: Path
) -> None:
    data = DeviceDataset(store, "train", "cpu", cache_mib, label_store)
    for _ in range(2):
        with pytest.raises(InputError, match=r"'k7'.* has no ground truth label"):
            data.labels(torch.tensor([1, 6]), GROUND_TRUTH)
        with pytest.raises(InputError, match=r"'k9'.* has no scribble"):
            data.labels(torch.tensor([8]), SCRIBBLES)
    data.labels(torch.tensor([1, 8]), GROUND_TRUTH)
    with pytest.raises(InputError, match="no label version 3"):
        data.labels(torch.tensor([1]), 3)
    with pytest.raises(InputError, match="label version -2 is unknown"):
        data.labels(torch.tensor([1]), -2)
    with pytest.raises(InputError, match="no label store was given"):
        DeviceDataset(store, "train", "cpu", cache_mib).labels(torch.tensor([1]), 1)
    with pytest.raises(InputError, match="no row 150; 0 to 149"):
        data.images(torch.tensor([0, COUNT]))
    with pytest.raises(InputError, match="no row -1"):
        data.labels(torch.tensor([-1]), 1)
    with pytest.raises(InputError, match="without rows"):
        data.images(torch.tensor([], dtype=torch.int64))
    partial = LabelStore(tmp_path / "labels")
    partial.write(
        1, [LabelRow(key="k1", label=np.zeros((2, 2), np.uint8)), LabelRow(key="k2", label=stage(1, TRAIN[1]))]
    )
    data = DeviceDataset(store, "train", "cpu", cache_mib, partial)
    with pytest.raises(InputError, match=r"label version 1 of 'k1' is \(2, 2\); \(\d+, \d+\) is expected"):
        data.labels(torch.tensor([0]), 1)
    with pytest.raises(InputError, match=r"label version 1 .* has no sample 'k3'"):
        data.labels(torch.tensor([2]), 1)
    assert np.array_equal(data.labels(torch.tensor([1]), 1)[0].numpy(), stage(1, TRAIN[1]))


def test_keys_become_rows(store: Store) -> None:
    data = DeviceDataset(store, "train", "cpu", 0)
    rows = data.rows(["k4", "k1", "k4"])
    assert rows.dtype == torch.int64
    assert [data.keys[row] for row in rows.tolist()] == ["k4", "k1", "k4"]
    with pytest.raises(InputError, match="split 'train' has no sample 'k0'"):
        data.rows(["k0"])


def test_wrong_arguments_are_named(store: Store) -> None:
    with pytest.raises(InputError, match="did you mean 'train'"):
        DeviceDataset(store, "trian", "cpu", 0)
    with pytest.raises(InputError, match="cache_mib is -1"):
        DeviceDataset(store, "train", "cpu", -1)
