"""The store: what is written comes back, and what is wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysseg.data import store as store_module
from raysseg.data.sample import DatasetInfo, Expression, Sample, default_palette
from raysseg.data.store import Store, write_store
from raysseg.errors import InputError

INFO = DatasetInfo(
    name="test",
    class_names=("ground", "thing", "other thing"),
    palette=default_palette(3),
    has_background=True,
    source="made by a test",
)


def make_sample(index: int, **changes: object) -> Sample:
    random = np.random.default_rng(index)
    height, width = (int(side) for side in random.integers(4, 30, 2))
    values = {
        "key": f"folder/sample {index}",
        "image": random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "split": "val" if index % 4 == 0 else "train",
        "label": random.choice(np.array([0, 1, 2, 255], np.uint8), (height, width)) if index % 3 else None,
        "scribble": random.choice(np.array([0, 1, 2, 255], np.uint8), (height, width)) if index % 2 else None,
        "tags": (0, 2) if index % 5 else (),
        "expressions": (Expression(text="die größte Kugel", mask=random.random((height, width)) < 0.5),)
        if index % 2
        else (),
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


def assert_same(first: Sample, second: Sample) -> None:
    assert (first.key, first.split, first.tags) == (second.key, second.split, second.tags)
    assert np.array_equal(first.image, second.image)
    for name in ("label", "scribble"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)
    assert [e.text for e in first.expressions] == [e.text for e in second.expressions]
    for one, other in zip(first.expressions, second.expressions, strict=True):
        assert other.mask.dtype == np.bool_
        assert np.array_equal(one.mask, other.mask)


def new_location(kind: str, tmp_path: Path) -> str:
    if kind == "remote":
        pytest.importorskip("fsspec")
        uri = f"fsspec+memory:///{uuid.uuid4().hex}/store"
        try:
            pa.fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid:
            pytest.skip("this pyarrow cannot open fsspec's filesystems by their URI")
        return uri
    return str(tmp_path / "new" / "store")


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("image_encoding", ["png", "raw"])
def test_what_is_written_comes_back(kind: str, image_encoding: str, tmp_path: Path) -> None:
    samples = [make_sample(index) for index in range(23)]
    written = write_store(new_location(kind, tmp_path), samples, INFO, image_encoding=image_encoding, shard_rows=4)
    for store in (written, Store.open(written.uri), pickle.loads(pickle.dumps(written))):
        assert store.info == INFO
        assert store.image_encoding == image_encoding
        assert store.splits == {"val": 6, "train": 17}
        for split in ("train", "val"):
            assert store.keys(split) == [sample.key for sample in samples if sample.split == split]
        for sample in samples:
            assert_same(sample, store.sample(sample.key))
            assert store.size(sample.key) == sample.image.shape[:2]
            assert np.array_equal(store.image(sample.key), sample.image)
            assert not store.image(sample.key).flags.writeable
            assert (store.label(sample.key) is None) == (sample.label is None)
            assert (store.scribble(sample.key) is None) == (sample.scribble is None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list a process's mappings")
def test_a_raw_image_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    samples = (make_sample(0, key=str(number), image=image, expressions=()) for number in range(3))
    samples = (Sample(key=s.key, image=s.image, split="train") for s in samples)
    store = write_store(tmp_path / "store", samples, INFO, image_encoding="raw")
    address = store.image("1").__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(value, 16) for value in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith("train-00000.arrow")
            return
    pytest.fail("the image lies in no mapping")


def test_samples_are_not_held_while_writing(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.remove(id(self))

    def stream() -> Iterator[Sample]:
        for number in range(20):
            image = np.zeros((8, 8, 3), np.uint8).view(Counted)
            alive.append(id(image))
            assert len(alive) <= 3
            yield Sample(key=str(number), image=image, split="train")

    assert write_store(tmp_path / "store", stream(), INFO, image_encoding="raw").splits == {"train": 20}


@pytest.mark.parametrize("image_encoding", ["png", "raw"])
def test_threads_read_what_one_thread_reads(image_encoding: str, tmp_path: Path) -> None:
    samples = [make_sample(index) for index in range(40)]
    store = write_store(tmp_path / "store", samples, INFO, image_encoding=image_encoding, shard_rows=8)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda sample: store.sample(sample.key), samples * 4))
    for expected, sample in zip(samples * 4, read, strict=True):
        assert_same(expected, sample)


IMAGE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": ""}, "empty key"),
        ({"split": "a/b"}, r"'k'.*'a/b'"),
        ({"image": IMAGE.astype(np.float32)}, r"image of 'k'.*float32"),
        ({"image": IMAGE[..., 0]}, r"image of 'k'.*\(4, 5\)"),
        (
            {"label": np.full((4, 5), 17, np.uint8)},
            r"label of 'k' holds the value 17 in 20 pixels; classes 0 to 2 or 255",
        ),
        ({"label": np.full((4, 5), 3, np.uint8)}, r"label of 'k' holds the value 3"),
        ({"label": np.full((4, 5), 254, np.uint8)}, r"label of 'k' holds the value 254"),
        ({"scribble": np.full((4, 5), 9, np.uint8)}, r"scribble of 'k' holds the value 9"),
        ({"label": np.zeros((5, 4), np.uint8)}, r"label of 'k'.*\(5, 4\).*\(4, 5\)"),
        ({"scribble": np.zeros((4, 5), np.int64)}, r"scribble of 'k'.*int64"),
        ({"tags": (1, 3)}, r"'k' has the tag 3"),
        ({"expressions": (Expression(text="it", mask=np.zeros((4, 5), np.uint8)),)}, r"mask of 'it' of 'k'.*uint8"),
    ],
)
def test_a_wrong_sample_is_named_and_leaves_nothing(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    good = Sample(key="good", image=IMAGE, split="train")
    wrong = Sample(**{"key": "k", "image": IMAGE, "split": "train", **changes})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        write_store(tmp_path / "store", [good, wrong], INFO, image_encoding="raw")
    assert list(tmp_path.iterdir()) == []


def write_some(uri: str | Path, count: int = 6) -> Store:
    return write_store(uri, map(make_sample, range(count)), INFO, image_encoding="raw", shard_rows=2)


def test_duplicate_keys_no_samples_and_an_unknown_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'folder/sample 1' occurs twice"):
        write_store(tmp_path / "a", [make_sample(1), make_sample(1, split="val")], INFO, image_encoding="raw")
    with pytest.raises(InputError, match="no sample"):
        write_store(tmp_path / "a", [], INFO, image_encoding="raw")
    with pytest.raises(InputError, match="'jpeg'"):
        write_store(tmp_path / "a", [make_sample(1)], INFO, image_encoding="jpeg")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_and_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    write_some(tmp_path / "store")
    with pytest.raises(InputError, match="exists already"):
        write_some(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.arrow").write_bytes(b"1")
    with pytest.raises(InputError, match=r"precious\.arrow"):
        write_some(tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.arrow").read_bytes() == b"1"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_an_interrupted_build_is_no_store_and_can_be_repeated(kind: str, tmp_path: Path) -> None:
    location = new_location(kind, tmp_path)

    def stream() -> Iterable[Sample]:
        yield from map(make_sample, range(5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(location, stream(), INFO, image_encoding="raw", shard_rows=2)
    with pytest.raises(InputError, match="not a store"):
        Store.open(location)
    assert write_some(location).splits == {"val": 2, "train": 4}


def test_a_killed_build_is_no_store_and_its_remains_are_cleared(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:

        def stream() -> Iterable[Sample]:
            yield from map(make_sample, range(5))
            os._exit(0)

        write_store(tmp_path / "store", stream(), INFO, image_encoding="raw", shard_rows=2)
    os.waitpid(child, 0)
    remains = [path.name for path in tmp_path.iterdir()]
    assert len(remains) == 1
    assert remains[0].startswith("store.tmp-")
    write_some(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_empty_folder_may_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert write_some(tmp_path / "store").splits == {"val": 2, "train": 4}


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing' is not a store"):
        Store.open(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a store"):
        Store.open(tmp_path)
    with pytest.raises(InputError, match="nonsense://x"):
        Store.open("nonsense://x")


def test_another_schema_version_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "SCHEMA_VERSION", 99)
        write_some(tmp_path / "store")
    with pytest.raises(InputError, match=r"version 99; this release reads version 1: it must be built again"):
        Store.open(tmp_path / "store")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write_some(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text("{")
    with pytest.raises(InputError, match=r"store\.json' is not a JSON object"):
        Store.open(tmp_path / "store")


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    write_some(tmp_path / "store")
    shard = tmp_path / "store" / "train-00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"train-00001\.arrow' has {len(content) - 1} bytes; {len(content)} are"):
        Store.open(tmp_path / "store")
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00001\.arrow' is missing"):
        Store.open(tmp_path / "store")


def test_a_file_of_the_right_size_that_is_no_arrow_file_is_named(tmp_path: Path) -> None:
    key = write_some(tmp_path / "store").keys("val")[0]
    shard = tmp_path / "store" / "val-00000.arrow"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(InputError, match=r"val-00000\.arrow' is not a complete Arrow file"):
        Store.open(tmp_path / "store").image(key)


def test_unknown_splits_and_keys_get_the_nearest_name(tmp_path: Path) -> None:
    store = write_some(tmp_path / "store")
    with pytest.raises(InputError, match="no split 'trian'; did you mean 'train'"):
        store.keys("trian")
    for read in (store.image, store.label, store.scribble, store.size, store.sample):
        with pytest.raises(InputError, match="no sample 'folder/smaple 3'; did you mean 'folder/sample 3'"):
            read("folder/smaple 3")


def test_every_file_says_what_it_is(tmp_path: Path) -> None:
    write_some(tmp_path / "store")
    with pa.memory_map(str(tmp_path / "store" / "val-00000.arrow")) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    assert metadata[b"raysseg.schema_version"] == b"1"
    assert json.loads(metadata[b"raysseg.info"])["class_names"] == list(INFO.class_names)


def test_a_palette_or_class_count_that_does_not_fit_is_refused() -> None:
    values = {"name": "n", "has_background": False, "source": "s"}
    with pytest.raises(InputError, match="palette of 2 colours"):
        DatasetInfo(class_names=("a", "b", "c"), palette=default_palette(2), **values)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 classes"):
        DatasetInfo(class_names=(), palette=(), **values)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\(0, 0, 256\)"):
        DatasetInfo(class_names=("a",), palette=((0, 0, 256),), **values)  # type: ignore[arg-type]


def test_the_default_palette_is_that_of_voc() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = default_palette(21)
    assert {index: palette[index] for index in known} == known
