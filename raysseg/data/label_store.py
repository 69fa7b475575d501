"""Label maps M, one immutable version after every stage; a version exists entirely or not at all."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.data.arrow_folder import ArrowFolder
from raysseg.data.codec import decode_map, encode_map
from raysseg.data.store import nearest_key
from raysseg.errors import InputError, nearest_name

LABEL_SCHEMA_VERSION = 1
"""Changes whenever a label version written before can no longer be read."""

_MANIFEST = "version.json"
_FILE = "labels.arrow"
_FOLDER_NAME = re.compile(r"v(\d{4,})")
_ROWS_PER_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelRow:
    """One sample's label map in a version.

    `label` uint8 [H, W] or the bytes that `encode_map` made of it; `extra` numbers to keep with it (None: not known),
    under the same names in every row of a version.
    """

    key: str
    label: np.ndarray | bytes
    extra: Mapping[str, float | None] = field(default_factory=dict)


class LabelStore:
    """Versions 1, 2, … of the label maps below one folder; version 0 is the scribbles and is not stored here.

    Safe to use from several threads; pickles as its location.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._folder = ArrowFolder(uri, _MANIFEST)
        self.uri = self._folder.uri
        self._lock = threading.Lock()
        self._tables: dict[int, tuple[pa.Table, dict[str, int]]] = {}

    def __reduce__(self) -> tuple[type[LabelStore], tuple[str]]:
        return (LabelStore, (self.uri,))

    def versions(self) -> list[int]:
        """Numbers of the versions that exist, ascending; torn remains of an interrupted write are none."""
        matches = [_FOLDER_NAME.fullmatch(name) for name in self._folder.names()]
        numbers = sorted(int(match.group(1)) for match in matches if match)
        return [number for number in numbers if self._version_folder(number).exists()]

    def write(self, version: int, rows: Iterable[LabelRow]) -> None:
        """Writes a new version; `rows` is consumed one by one.

        Args:
            version: 1 or more.
            rows: one per sample, in any order.

        Raises:
            InputError: where the version exists or is not positive, a key occurs twice, the names in `extra` differ
                between rows, or there is no row.
        """
        if version < 1:
            raise InputError(
                f"The label version {version} cannot be written; versions start at 1 (0 is the scribbles)."
            )

        def fill(target: ArrowFolder) -> dict[str, Any]:
            iterator = iter(rows)
            first = next(iterator, None)
            if first is None:
                raise InputError(f"There is no label map to write into the label version {version}.")
            names = tuple(first.extra)
            schema = _schema(names, version)
            count = 0
            with target.new_file(_FILE, schema) as writer:
                for batch in _batches(first, iterator, names, schema):
                    writer.write_batch(batch)
                    count += batch.num_rows
            return {
                "schema_version": LABEL_SCHEMA_VERSION,
                "version": version,
                "rows": count,
                "files": target.file_sizes([_FILE]),
            }

        self._version_folder(version).publish(fill)

    def label(self, version: int, key: str) -> np.ndarray:
        """Label map M uint8 [H, W] of a sample.

        Raises:
            InputError: where the version does not exist, or does not hold the key.
        """
        table, index = self._open(version)
        row = index.get(key)
        if row is None:
            raise InputError(
                f"The label version {version} in '{self.uri}' has no sample '{key}'{nearest_key(key, index)}"
            )
        return decode_map(table.column("label")[row].as_buffer())

    def table(self, version: int) -> pa.Table:
        """All rows of a version: `key`, `label` (bytes for `decode_map`) and the numbers in `extra` as float64 columns.

        Raises:
            InputError: where the version does not exist.
        """
        return self._open(version)[0]

    def remove_after(self, version: int) -> list[int]:
        """Deletes the versions newer than `version`, which a resumed run writes again, and returns their numbers."""
        newer = [number for number in self.versions() if number > version]
        for number in reversed(newer):
            with self._lock:
                self._tables.pop(number, None)
            self._version_folder(number).remove()
        return newer

    def _version_folder(self, version: int) -> ArrowFolder:
        return self._folder.child(f"v{version:04d}")

    def _open(self, version: int) -> tuple[pa.Table, dict[str, int]]:
        with self._lock:
            if version not in self._tables:
                self._tables[version] = self._read(version)
            return self._tables[version]

    def _read(self, version: int) -> tuple[pa.Table, dict[str, int]]:
        folder = self._version_folder(version)
        if not folder.exists():
            known = nearest_name(str(version), map(str, self.versions()))
            raise InputError(f"There is no label version {version} in '{self.uri}'{known}")
        manifest = folder.manifest()
        if manifest.get("schema_version") != LABEL_SCHEMA_VERSION:
            raise InputError(
                f"The label version {version} in '{self.uri}' has the schema version {manifest.get('schema_version')}; "
                f"this release reads version {LABEL_SCHEMA_VERSION}: the run must be started again."
            )
        folder.check_files(manifest["files"])
        table = folder.open_reader(_FILE).read_all()
        return table, {key: row for row, key in enumerate(table.column("key").to_pylist())}


def _schema(names: tuple[str, ...], version: int) -> pa.Schema:
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("label", pa.large_binary(), nullable=False)]
    for name in names:
        if name in ("key", "label"):
            raise InputError(f"The label version {version} is to hold the number '{name}', which is a column already.")
        fields.append(pa.field(name, pa.float64()))
    metadata = {"raysseg.schema_version": str(LABEL_SCHEMA_VERSION), "raysseg.label_version": str(version)}
    return pa.schema(fields, metadata=metadata)


def _batches(
    first: LabelRow, rest: Iterator[LabelRow], names: tuple[str, ...], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Turns rows into record batches of a bounded size."""
    seen: set[str] = set()
    pending: list[dict[str, Any]] = []
    for row in itertools.chain([first], rest):
        if row.key in seen:
            raise InputError(f"The key '{row.key}' occurs twice in one label version.")
        seen.add(row.key)
        if set(row.extra) != set(names):
            raise InputError(
                f"The label map of '{row.key}' comes with the numbers {sorted(row.extra)}; {sorted(names)} are "
                "expected, as with the first one."
            )
        label = row.label if isinstance(row.label, bytes) else encode_map(row.label)
        numbers = {name: None if value is None else float(value) for name, value in row.extra.items()}
        pending.append({"key": row.key, "label": label, **numbers})
        if len(pending) == _ROWS_PER_BATCH:
            yield pa.RecordBatch.from_pylist(pending, schema=schema)
            pending = []
    if pending:
        yield pa.RecordBatch.from_pylist(pending, schema=schema)
