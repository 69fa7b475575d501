"""Label versions: immutable, whole or absent, and removable from the newest down."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysseg.data import label_store as label_store_module
from raysseg.data.codec import encode_map
from raysseg.data.label_store import LabelRow, LabelStore
from raysseg.errors import InputError


def label_map(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    return random.integers(0, 256, random.integers(1, 20, 2), dtype=np.uint8)


def rows(count: int, offset: int = 0) -> Iterator[LabelRow]:
    for number in range(count):
        label: np.ndarray | bytes = label_map(number + offset)
        if number % 2:
            label = encode_map(label_map(number + offset))
        value = None if number % 3 == 0 else number / 7
        yield LabelRow(key=f"k{number}", label=label, extra={"value": value, "accepted": float(number % 2)})


@pytest.fixture(params=["local", "remote"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "labels")
    pytest.importorskip("fsspec")
    uri = f"fsspec+memory:///{uuid.uuid4().hex}/labels"
    try:
        pa.fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        pytest.skip("this pyarrow cannot open fsspec's filesystems by their URI")
    return uri


def test_versions_come_back(location: str) -> None:
    store = LabelStore(location)
    assert store.versions() == []
    store.write(1, rows(150))
    store.write(2, rows(3, offset=1000))
    for opened in (store, LabelStore(location), pickle.loads(pickle.dumps(store))):
        assert opened.versions() == [1, 2]
        for number in range(150):
            assert np.array_equal(opened.label(1, f"k{number}"), label_map(number))
        assert np.array_equal(opened.label(2, "k2"), label_map(1002))
        table = opened.table(1)
        assert table.column_names == ["key", "label", "value", "accepted"]
        assert table.column("key").to_pylist() == [f"k{number}" for number in range(150)]
        assert table.column("value").to_pylist()[:3] == [None, 1 / 7, 2 / 7]
        assert table.schema.field("accepted").type == pa.float64()
        assert table.schema.metadata[b"raysseg.label_version"] == b"1"


def test_an_existing_version_is_refused_and_stays(location: str) -> None:
    store = LabelStore(location)
    store.write(1, rows(2))
    with pytest.raises(InputError, match="v0001' exists already"):
        store.write(1, rows(2, offset=5))
    assert np.array_equal(LabelStore(location).label(1, "k0"), label_map(0))


def test_an_interrupted_write_leaves_no_version_and_can_be_repeated(location: str) -> None:
    def torn() -> Iterator[LabelRow]:
        yield from rows(100)
        raise KeyboardInterrupt

    store = LabelStore(location)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, torn())
    assert store.versions() == []
    with pytest.raises(InputError, match="no label version 1"):
        store.label(1, "k0")
    store.write(1, rows(5))
    assert store.table(1).num_rows == 5


def test_what_a_killed_write_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:

        def killed() -> Iterator[LabelRow]:
            yield from rows(100)
            os._exit(0)

        LabelStore(tmp_path).write(1, killed())
    os.waitpid(child, 0)
    assert [path.name[:9] for path in tmp_path.iterdir()] == ["v0001.tmp"]
    store = LabelStore(tmp_path)
    assert store.versions() == []
    store.write(1, rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["v0001"]


def test_newer_versions_are_removed(location: str) -> None:
    store = LabelStore(location)
    for version in (1, 2, 3):
        store.write(version, rows(2, offset=version))
    store.label(3, "k0")
    assert store.remove_after(1) == [2, 3]
    assert store.remove_after(1) == []
    assert store.versions() == [1]
    with pytest.raises(InputError, match="no label version 3"):
        store.label(3, "k0")
    store.write(2, rows(2, offset=50))
    assert np.array_equal(store.label(2, "k0"), label_map(50))
    assert LabelStore(location).versions() == [1, 2]


def test_a_removed_version_that_is_still_mapped_can_be_read(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.write(1, rows(2))
    table = LabelStore(tmp_path).table(1)
    store.remove_after(0)
    assert table.column("key").to_pylist() == ["k0", "k1"]


def test_wrong_rows_are_named_and_leave_nothing(location: str) -> None:
    store = LabelStore(location)
    label = label_map(0)
    cases = [
        ([], "no label map"),
        ([LabelRow(key="a", label=label), LabelRow(key="a", label=label)], "'a' occurs twice"),
        ([LabelRow(key="a", label=label), LabelRow(key="b", label=label, extra={"v": 1.0})], r"'b'.*\['v'\]"),
        ([LabelRow(key="a", label=label, extra={"label": 1.0})], "'label', which is a column"),
        ([LabelRow(key="a", label=label.astype(np.int64))], "int64"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            store.write(1, wrong)
    with pytest.raises(InputError, match="versions start at 1"):
        store.write(0, rows(1))
    assert store.versions() == []


def test_unknown_versions_and_keys_are_named(tmp_path: Path) -> None:
    store = LabelStore(tmp_path)
    store.write(2, rows(3))
    with pytest.raises(InputError, match=r"no label version 7.*known are 2"):
        store.table(7)
    with pytest.raises(InputError, match=r"label version 2 .* has no sample 'k22'; did you mean 'k2'"):
        store.label(2, "k22")


def test_a_truncated_version_names_its_file(tmp_path: Path) -> None:
    LabelStore(tmp_path).write(1, rows(3))
    path = tmp_path / "v0001" / "labels.arrow"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"v0001/labels\.arrow"):
        LabelStore(tmp_path).label(1, "k0")


def test_another_schema_version_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(label_store_module, "LABEL_SCHEMA_VERSION", 42)
        LabelStore(tmp_path).write(1, rows(1))
    with pytest.raises(InputError, match="version 42; this release reads version 1"):
        LabelStore(tmp_path).label(1, "k0")
