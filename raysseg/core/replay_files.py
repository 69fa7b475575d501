"""Files of a replay buffer in the checkpoints' folder: written once, whole or not there, and checked when they are read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raysseg.errors import InputError

PARTIAL = ".partial"
"""Ending of a file that is still being written; what is left of a killed process is garbage."""


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file. Source: design."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Source: design."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: Any) -> None:
    """Writes bytes under a temporary name, makes them durable and renames the file.

    Args:
        path: the file; its folder must exist.
        data: any object with the buffer protocol.

    Raises:
        OSError: the file could not be written; nothing of it is left.

    Source: design.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def named_by_content(prefix: str, ending: str, data: Any) -> dict[str, Any]:
    """Returns a file's entry in a state: its name, which tells its content, its size in bytes and its CRC-32.

    Source: design.
    """
    value = zlib.crc32(data)
    return {"file": f"{prefix}-{value:08x}{ending}", "bytes": len(memoryview(data)), "checksum": value}


def write_once(folder: Path, entry: dict[str, Any], data: Any, *, trusted: bool) -> None:
    """Writes the file of an entry where it is not there yet.

    Args:
        folder: is made where it does not exist.
        entry: from `named_by_content`.
        data: the file's bytes.
        trusted: whether this process has written or read the file before; then its size alone is compared.

    Source: design.
    """
    path = folder / entry["file"]
    if path.is_file() and path.stat().st_size == entry["bytes"] and (trusted or checksum(path) == entry["checksum"]):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)


def read_checked(folder: Path, entry: dict[str, Any]) -> bytes:
    """Returns the bytes of an entry's file.

    Raises:
        InputError: the file is missing, truncated or changed.

    Source: design.
    """
    path = folder / entry["file"]
    data = path.read_bytes() if path.is_file() else None
    if (wrong := _difference(entry, None if data is None else len(data))) is None:
        assert data is not None
        if zlib.crc32(data) == entry["checksum"]:
            return data
        wrong = f"the content of {entry['file']} has changed"
    raise InputError(f"The replay buffer in {folder} is damaged: {wrong}.")


def damage(folder: Path, entry: dict[str, Any]) -> str | None:
    """Returns what is wrong with an entry's file, or None where nothing is. Source: design."""
    path = folder / entry["file"]
    wrong = _difference(entry, path.stat().st_size if path.is_file() else None)
    if wrong is None and checksum(path) != entry["checksum"]:
        wrong = f"the content of {entry['file']} has changed"
    return wrong


def _difference(entry: dict[str, Any], size: int | None) -> str | None:
    if size is None:
        return f"{entry['file']} is missing"
    if size != entry["bytes"]:
        return f"{entry['file']} has {size} bytes instead of {entry['bytes']}"
    return None


def files_of(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the entries of all files that a replay buffer's state names, those of its episodes and shards too.

    Source: design.
    """
    yield from state.get("segments", ())
    yield from state.get("episodes", ())
    if state.get("priorities") is not None:
        yield state["priorities"]
    for shard in state.get("shards", ()):
        yield from files_of(shard)


def collect_garbage(folder: Path, states: Iterable[dict[str, Any]]) -> list[str]:
    """Removes the files that no state names, and returns their names.

    Args:
        folder: where one replay buffer saves; need not exist.
        states: what `save` returned for every checkpoint that is kept.

    Source: design.
    """
    if not folder.is_dir():
        return []
    named = {entry["file"] for state in states for entry in files_of(state)}
    garbage = sorted(path.name for path in folder.iterdir() if path.name not in named)
    for name in garbage:
        (folder / name).unlink()
    return garbage
