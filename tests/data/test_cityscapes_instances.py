"""Cityscapes' instances on their way from the files through the store onto a device, and what is wrong with some."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from raysseg.configuration import load_settings
from raysseg.data import store as store_module
from raysseg.data.batches import DeviceDataset
from raysseg.data.codec import decode_map, encode_map
from raysseg.data.readers.cityscapes import CityscapesReader
from raysseg.data.sample import DatasetInfo, Sample, default_palette
from raysseg.data.settings import DataSettings, open_dataset
from raysseg.data.store import Store, write_store
from raysseg.errors import InputError

KEYS = ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
LABEL = np.array([[7, 24, 24, 26, 26, 33, 29, 0]] * 6, np.uint8)
INSTANCES = np.array([[7, 24000, 24001, 26, 26999, 33012, 29001, 0]] * 6, np.uint16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def instances_of(root: Path, key: str = KEYS[1], split: str = "train") -> Path:
    return root / "gtFine" / split / key.split("_")[0] / f"{key}_gtFine_instanceIds.png"


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Three images to train on, one of them larger, and one to validate on; all with instances."""
    root = tmp_path / "cityscapes"
    for split, keys in (("train", KEYS), ("val", ["lindau_000000_000019"])):
        for number, key in enumerate(keys):
            repeat = ((1, 1), (2, 1), (1, 3))[number]
            city = key.split("_")[0]
            image = np.full((6 * repeat[0], 8 * repeat[1], 3), 40, np.uint8)
            save(root / "leftImg8bit" / split / city / f"{key}_leftImg8bit.png", image)
            save(root / "gtFine" / split / city / f"{key}_gtFine_labelIds.png", np.tile(LABEL, repeat))
            save(instances_of(root, key, split), np.tile(INSTANCES, repeat))
    return root


def stored(root: Path, place: Path) -> Store:
    reader = CityscapesReader(root)
    samples = (reader.read(files) for split in ("train", "val") for files in reader.files(split))
    return write_store(place, samples, reader.info, image_encoding="png")


def test_the_store_gives_back_what_the_files_hold(cityscapes: Path, tmp_path: Path) -> None:
    store = stored(cityscapes, tmp_path / "store")
    for repeat, key in zip(((1, 1), (2, 1), (1, 3)), KEYS, strict=True):
        for found in (store.instances(key), store.sample(key).instances):
            assert found is not None
            assert found.dtype == np.uint16
            assert np.array_equal(found, np.tile(INSTANCES, repeat))
        assert store.has_instances(key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_mib", [0, 4])
def test_rows_come_padded_to_the_canvas_of_their_images(
    cityscapes: Path, tmp_path: Path, device: str, cache_mib: int
) -> None:
    data = DeviceDataset(stored(cityscapes, tmp_path / "store"), "train", device, cache_mib)
    assert data.has_instances
    rows = torch.tensor([2, 0])
    instances = data.instances(rows)
    assert instances.dtype == torch.int32
    assert instances.device.type == device
    assert instances.shape == data.labels(rows, -1).shape == (2, 6, 24)
    assert np.array_equal(instances[0].cpu().numpy(), np.tile(INSTANCES, (1, 3)))
    assert np.array_equal(instances[1, :, :8].cpu().numpy(), INSTANCES)
    assert not instances[1, :, 8:].any()
    assert data.instances(torch.tensor([1])).shape == (1, 12, 8)


def test_without_any_there_are_none(cityscapes: Path, tmp_path: Path) -> None:
    for key in KEYS:
        instances_of(cityscapes, key).unlink()
    store = stored(cityscapes, tmp_path / "store")
    assert store.instances(KEYS[0]) is None
    assert not DeviceDataset(store, "train", "cpu", 0).has_instances
    assert DeviceDataset(store, "val", "cpu", 0).has_instances, "each split is complete in itself"
    with pytest.raises(InputError, match=f"sample '{KEYS[0]}' of the store '.*' has no instances"):
        DeviceDataset(store, "train", "cpu", 0).instances(torch.tensor([0]))


def test_a_store_that_was_written_before_there_were_instances_still_opens(
    cityscapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pa.schema([field for field in store_module._ROW if field.name != "instances"])
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_ROW", before)
        stored(cityscapes, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    sample = store.sample(KEYS[0])
    assert sample.label is not None
    assert sample.instances is None
    assert not store.has_instances(KEYS[0])
    assert store.instances(KEYS[0]) is None


def test_a_built_dataset_notices_instances_that_are_added_later(cityscapes: Path, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in cityscapes.rglob("*_instanceIds.png")}
    for path in files:
        path.unlink()
    data = load_settings(DataSettings, {"source": "cityscapes", "path": str(cityscapes), "scribbles": "none"})
    without = open_dataset(data, tmp_path / "cache")
    for path, content in files.items():
        path.write_bytes(content)
    with_instances = open_dataset(data, tmp_path / "cache")
    assert without.instances(KEYS[0]) is None
    assert with_instances.instances(KEYS[0]) is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.unlink(),
            "2 of the 3 labels in '.*gtFine/train' have instances beside them, but "
            "'.*aachen_000001_000019_gtFine_instanceIds.png' does not exist; one for every label, or none at all",
        ),
        (
            lambda path: shutil.copy(path.with_name(path.name.replace("instance", "label")), path),
            "instance map '.*instanceIds.png' is an image of mode L; a PNG with one channel of 16 bits",
        ),
        (
            lambda path: save(path, np.full((12, 8), 34000, np.uint16)),
            "holds the value 34000 at row 0, column 0, which is no instance id of Cityscapes; 0 to 33999 are expected",
        ),
        (lambda path: save(path, INSTANCES), r"instance map '.*' has 8×6 pixels .* has 8×12; the same size"),
        (lambda path: path.write_bytes(b"torn"), "instance map '.*' cannot be read as an image"),
    ],
    ids=["one is missing", "8 bits", "no id", "other size", "torn"],
)
def test_wrong_files(cityscapes: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(instances_of(cityscapes))
    reader = CityscapesReader(cityscapes)
    with pytest.raises(InputError, match=message) as error:
        _ = [reader.read(files) for files in reader.files("train")]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("instances", [INSTANCES.astype(np.int32), INSTANCES[:5]], ids=["int32", "other size"])
def test_a_store_takes_only_instances_that_fit(tmp_path: Path, instances: np.ndarray) -> None:
    sample = Sample(key="k", image=np.zeros((6, 8, 3), np.uint8), split="train", instances=instances)
    info = DatasetInfo(
        name="test", class_names=("a",), palette=default_palette(1), has_background=False, source="a test"
    )
    with pytest.raises(InputError, match=r"instance map of 'k' has the dtype .* uint16 \(6, 8\) is expected"):
        write_store(tmp_path / "store", [sample], info, image_encoding="png")


def test_maps_of_sixteen_bits_are_coded_without_loss() -> None:
    large = np.random.default_rng(0).integers(0, 1 << 16, (37, 53)).astype(np.uint16)
    for values in (large, large[::-1, ::2], np.zeros((400, 500), np.uint16)):
        decoded = decode_map(encode_map(values))
        assert decoded.dtype == np.uint16
        assert np.array_equal(decoded, values)
    assert len(encode_map(np.zeros((400, 500), np.uint16))) < 100
    encoded = encode_map(large)
    with pytest.raises(InputError, match="damaged"):
        decode_map(encoded[:40])


def test_a_real_image(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "samples" / "cityscapes1"
    if not source.is_dir():
        pytest.skip("the sample of Cityscapes is not here")
    for ending, folder in (("leftImg8bit", "leftImg8bit"), ("labelIds", "gtFine"), ("instanceIds", "gtFine")):
        (path,) = source.rglob(f"*_{ending}.png")
        place = tmp_path / folder / "val" / "frankfurt" / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    reader = CityscapesReader(tmp_path)
    (files,) = reader.files("val")
    sample = reader.read(files)
    assert sample.label is not None
    assert sample.instances is not None
    assert sample.instances.shape == sample.label.shape == (128, 256)
    objects = sample.instances > 1000
    assert set(np.unique(sample.instances[objects])) == {24000, 24001, 24002, 24003, 26000, 26001, 26002}
    people = sample.instances // 1000 == 24
    assert (sample.label[people] == reader.info.class_names.index("person")).all()
    assert objects.sum() == 1909
