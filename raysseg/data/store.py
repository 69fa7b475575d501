"""The dataset on disk: a folder of Arrow files that all processes of a node map into memory and share."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from raysseg.data.arrow_folder import ArrowFolder
from raysseg.data.codec import decode_map, encode_map
from raysseg.data.sample import DatasetInfo, Expression, Sample
from raysseg.data.sample_checks import check_sample
from raysseg.errors import InputError, nearest_name

SCHEMA_VERSION = 1
"""Changes whenever a store written before can no longer be read."""

ImageEncoding = Literal["png", "raw"]

Content = TypeVar("Content")

_UNREADABLE = (OSError, ValueError, IndexError, SyntaxError, struct.error, zlib.error, pa.ArrowException)
"""What Arrow, pillow and the codec of maps raise over bytes that are not what was written."""

_MANIFEST = "store.json"
_INDEX = "index.arrow"
_EXPRESSION = pa.struct([("text", pa.string()), ("mask", pa.large_binary())])
_ROW = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("label", pa.large_binary()),
        pa.field("scribble", pa.large_binary()),
        pa.field("tags", pa.list_(pa.int32()), nullable=False),
        pa.field("expressions", pa.list_(_EXPRESSION), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        # Stores that were written before there were instances lack this column, and are read as having none.
        pa.field("instances", pa.large_binary()),
    ]
)


class _Place(NamedTuple):
    """Where one sample lies, and its size in pixels."""

    shard: str
    batch: int
    height: int
    width: int


_INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("split", pa.string()), ("shard", pa.string())]
    + [(name, pa.int32()) for name in ("batch", "height", "width")]
)


class Store:
    """A dataset that was built by `write_store`, opened for reading; safe to use from several threads.

    It pickles as its location: whoever receives it opens the same folder again.

    Raises:
        InputError: where the location is not a store, was written by another schema version, or lacks a part of a file.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._folder = ArrowFolder(uri, _MANIFEST)
        self.uri = self._folder.uri
        if not self._folder.exists():
            raise InputError(f"'{self.uri}' is not a store: it has no file '{_MANIFEST}'.")
        manifest = self._folder.manifest()
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"The store '{self.uri}' has the schema version {version}; this release reads version "
                f"{SCHEMA_VERSION}: it must be built again."
            )
        self.info = _info_from_json(manifest["info"])
        self.image_encoding: ImageEncoding = manifest["image_encoding"]
        self._folder.check_files(manifest["files"])
        self._places, self._keys = self._read_index()
        self._shards: dict[str, Callable[[int], pa.RecordBatch]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> Store:
        """Opens the store at a local path or a `pyarrow.fs` URI; raises InputError as the class says."""
        return cls(uri)

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return (Store.open, (self.uri,))

    @property
    def splits(self) -> dict[str, int]:
        """Number of samples of each split, at least one."""
        return {split: len(keys) for split, keys in self._keys.items()}

    def keys(self, split: str) -> list[str]:
        """Keys of a split in the order they were written.

        Raises:
            InputError: where the store has no such split, with the nearest name.
        """
        if split not in self._keys:
            raise InputError(f"The store '{self.uri}' has no split '{split}'{nearest_name(split, self._keys)}")
        return list(self._keys[split])

    def size(self, key: str) -> tuple[int, int]:
        """(H, W) of an image in pixels. Raises InputError for an unknown key."""
        place = self._place(key)
        return place.height, place.width

    def image(self, key: str) -> np.ndarray:
        """Image uint8 [H, W, 3] RGB, read-only; without a copy where it is stored raw on a local disk.

        Raises:
            InputError: for an unknown key.
        """
        return self._read(key, lambda row: self._decode_image(key, row))

    def label(self, key: str) -> np.ndarray | None:
        """Ground truth uint8 [H, W] (classes 0…K−1, 255 unlabelled) or None. Raises InputError for an unknown key."""
        return self._read(key, lambda row: _map_of(row, "label"))

    def has_label(self, key: str) -> bool:
        """Whether there is a ground truth; decodes nothing. Raises InputError for an unknown key."""
        return self._read(key, lambda row: bool(row.column("label")[0].is_valid))

    def scribble(self, key: str) -> np.ndarray | None:
        """Scribble map Y uint8 [H, W] (classes 0…K−1, 255 unlabelled) or None. Raises InputError for an unknown key."""
        return self._read(key, lambda row: _map_of(row, "scribble"))

    def instances(self, key: str) -> np.ndarray | None:
        """The dataset's numbers of its objects, uint16 [H, W], or None. Raises InputError for an unknown key."""
        return self._read(key, _instances_of)

    def has_instances(self, key: str) -> bool:
        """Whether the objects are told apart; decodes nothing. Raises InputError for an unknown key."""
        return self._read(key, _has_instances)

    def sample(self, key: str) -> Sample:
        """Everything that is known of one image. Raises InputError for an unknown key."""
        return self._read(key, lambda row: self._sample_of(key, row))

    def _sample_of(self, key: str, row: pa.RecordBatch) -> Sample:
        return Sample(
            key=key,
            image=self._decode_image(key, row),
            split=row.column("split")[0].as_py(),
            label=_map_of(row, "label"),
            scribble=_map_of(row, "scribble"),
            tags=tuple(row.column("tags")[0].as_py()),
            instances=_instances_of(row),
            expressions=tuple(
                Expression(text=entry["text"], mask=decode_map(entry["mask"]).astype(bool))
                for entry in row.column("expressions")[0].as_py()
            ),
        )

    def _read_index(self) -> tuple[dict[str, _Place], dict[str, list[str]]]:
        table = self._folder.open_reader(_INDEX).read_all()
        columns = [table.column(name).to_pylist() for name in _INDEX_SCHEMA.names]
        places: dict[str, _Place] = {}
        keys: dict[str, list[str]] = {}
        for key, split, *place in zip(*columns, strict=True):
            places[key] = _Place(*place)
            keys.setdefault(split, []).append(key)
        return places, keys

    def _place(self, key: str) -> _Place:
        place = self._places.get(key)
        if place is None:
            raise InputError(f"The store '{self.uri}' has no sample '{key}'{nearest_key(key, self._places)}")
        return place

    def _read(self, key: str, decode: Callable[[pa.RecordBatch], Content]) -> Content:
        """Returns what `decode` makes of a sample's row. Bytes that changed under a running job fail anywhere in it."""
        place = self._place(key)
        try:
            return decode(self._row(place))
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(
                f"The sample '{key}' cannot be read from the file '{self.uri}/{place.shard}' ({reason}); "
                "the file is damaged: restore it, or build the store again."
            ) from None

    def _row(self, place: _Place) -> pa.RecordBatch:
        with self._lock:
            read = self._shards.get(place.shard)
            if read is None:
                read = self._shards[place.shard] = self._open_shard(place.shard)
        return read(place.batch)

    def _open_shard(self, name: str) -> Callable[[int], pa.RecordBatch]:
        """Returns a thread-safe function that reads the record batch of a number."""
        reader = self._folder.open_reader(name)
        if self._folder.is_local:
            # Views of the map: only the batches' headers are touched here, an image's pages when it is read.
            return [reader.get_batch(number) for number in range(reader.num_record_batches)].__getitem__
        lock = threading.Lock()

        def read(number: int) -> pa.RecordBatch:
            with lock:
                return reader.get_batch(number)

        return read

    def _decode_image(self, key: str, row: pa.RecordBatch) -> np.ndarray:
        content = _binary(row, "image")
        height, width = self.size(key)
        if self.image_encoding == "raw":
            return np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3)
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture).reshape(height, width, 3)


def write_store(
    uri: str | os.PathLike[str],
    samples: Iterable[Sample],
    info: DatasetInfo,
    *,
    image_encoding: ImageEncoding,
    shard_rows: int = 256,
) -> Store:
    """Writes samples one by one into a new store, which exists only once all of them are written.

    Args:
        uri: a new local folder or `pyarrow.fs` URI.
        samples: any number of them, of any splits in any order; only one is held in memory at a time.
        info: the classes; every label and scribble holds classes 0…K−1 or 255.
        image_encoding: "raw" is read without a copy, "png" takes about half of the space.
        shard_rows: samples per file.

    Raises:
        InputError: naming the key and the wrong value, for the first sample that does not fit; where there is no
            sample; where the folder exists already.
    """
    if image_encoding not in ("png", "raw"):
        raise InputError(f"The image encoding '{image_encoding}' is unknown; 'png' or 'raw' is expected.")
    if shard_rows < 1:
        raise InputError(f"A store is to be written with {shard_rows} samples per file; at least 1 is expected.")
    folder = ArrowFolder(uri, _MANIFEST)

    def fill(target: ArrowFolder) -> dict[str, Any]:
        info_json = dataclasses.asdict(info)
        schema = _ROW.with_metadata(
            {
                "raysseg.schema_version": str(SCHEMA_VERSION),
                "raysseg.info": json.dumps(info_json),
                "raysseg.image_encoding": image_encoding,
            }
        )
        index: dict[str, tuple[str, _Place]] = {}
        with ExitStack() as stack:
            writers: dict[str, _SplitWriter] = {}
            for sample in samples:
                check_sample(sample, info.num_classes)
                if sample.key in index:
                    raise InputError(f"The key '{sample.key}' occurs twice; keys are unique in a dataset.")
                if sample.split not in writers:
                    writers[sample.split] = _SplitWriter(target, sample.split, schema, shard_rows)
                    stack.callback(writers[sample.split].close)
                shard, batch = writers[sample.split].append(_row_of(sample, schema, image_encoding))
                height, width = sample.image.shape[:2]
                index[sample.key] = (sample.split, _Place(shard, batch, height, width))
        if not index:
            raise InputError(f"There is no sample to write into the store '{folder.uri}'.")
        rows = [(key, split, *place) for key, (split, place) in index.items()]
        with target.new_file(_INDEX, _INDEX_SCHEMA) as writer:
            writer.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], schema=_INDEX_SCHEMA))
        shards = sorted({place.shard for _, place in index.values()})
        return {
            "schema_version": SCHEMA_VERSION,
            "info": info_json,
            "image_encoding": image_encoding,
            "splits": Counter(split for split, _ in index.values()),
            "files": target.file_sizes([_INDEX, *shards]),
        }

    folder.publish(fill)
    return Store.open(uri)


class _SplitWriter:
    """Appends rows to the files of one split, a new file after every `shard_rows` rows."""

    def __init__(self, folder: ArrowFolder, split: str, schema: pa.Schema, shard_rows: int) -> None:
        self._folder = folder
        self._split = split
        self._schema = schema
        self._shard_rows = shard_rows
        self._rows = 0
        self._open_file = ExitStack()

    def append(self, row: pa.RecordBatch) -> tuple[str, int]:
        """Writes one row as a record batch of its own, so that a read over the network fetches one image.

        Returns the file's name and the batch's number in it.
        """
        shard, batch = divmod(self._rows, self._shard_rows)
        name = f"{self._split}-{shard:05d}.arrow"
        if batch == 0:
            self._open_file.close()
            self._writer = self._open_file.enter_context(self._folder.new_file(name, self._schema))
        self._writer.write_batch(row)
        self._rows += 1
        return name, batch

    def close(self) -> None:
        """Completes the last file."""
        self._open_file.close()


def _row_of(sample: Sample, schema: pa.Schema, image_encoding: ImageEncoding) -> pa.RecordBatch:
    if image_encoding == "raw":
        image = sample.image.tobytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(sample.image).save(buffer, "PNG")
        image = buffer.getvalue()
    row = {
        "key": sample.key,
        "image": image,
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
        "label": None if sample.label is None else encode_map(sample.label),
        "scribble": None if sample.scribble is None else encode_map(sample.scribble),
        "tags": [int(tag) for tag in sample.tags],
        "expressions": [
            {"text": expression.text, "mask": encode_map(expression.mask.astype(np.uint8))}
            for expression in sample.expressions
        ],
        "split": sample.split,
        "instances": None if sample.instances is None else encode_map(sample.instances),
    }
    return pa.RecordBatch.from_pylist([row], schema=schema)


def _map_of(row: pa.RecordBatch, column: str) -> np.ndarray | None:
    return decode_map(_binary(row, column)) if row.column(column)[0].is_valid else None


def _has_instances(row: pa.RecordBatch) -> bool:
    return "instances" in row.schema.names and bool(row.column("instances")[0].is_valid)


def _instances_of(row: pa.RecordBatch) -> np.ndarray | None:
    return _map_of(row, "instances") if _has_instances(row) else None


def _binary(row: pa.RecordBatch, column: str) -> pa.Buffer:
    """The bytes of a row without a copy (a scalar's own buffer would be one)."""
    array = row.column(column)
    _, offsets, content = array.buffers()
    start, end = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + 2]
    return content.slice(int(start), int(end - start))


def _info_from_json(content: dict[str, Any]) -> DatasetInfo:
    return DatasetInfo(
        name=content["name"],
        class_names=tuple(content["class_names"]),
        palette=tuple((red, green, blue) for red, green, blue in content["palette"]),
        has_background=content["has_background"],
        source=content["source"],
    )


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` where a known key is close; unlike names, keys are too many to list."""
    close = difflib.get_close_matches(key, known, n=1)
    return nearest_name(key, close)
