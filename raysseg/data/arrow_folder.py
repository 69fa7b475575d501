"""Folders of Arrow files that exist entirely or not at all, on a local disk or behind any `pyarrow.fs` URI.

A folder exists from the moment its manifest can be read. The manifest is written last and lists every Arrow file with
its size. On a local disk the whole folder is written under a temporary name first and then renamed.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from raysseg.errors import InputError

_TEMPORARY = ".tmp-"


class ArrowFolder:
    """One folder: where it lies, what its manifest says, and how its files are opened."""

    def __init__(self, uri: str | os.PathLike[str], manifest_name: str) -> None:
        text = os.fspath(uri)
        self.manifest_name = manifest_name
        try:
            if "://" in text:
                self.filesystem, path = pyarrow.fs.FileSystem.from_uri(text)
            else:
                text = os.path.abspath(os.path.expanduser(text))
                self.filesystem, path = pyarrow.fs.LocalFileSystem(), text
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise InputError(f"The location '{text}' cannot be used: {error}") from None
        self.uri = text.rstrip("/")
        self.path = path.rstrip("/")
        self.is_local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def child(self, name: str) -> ArrowFolder:
        """The folder `name` inside this one, with the same name of the manifest."""
        return self._beside(f"/{name}")

    def _beside(self, suffix: str) -> ArrowFolder:
        """The folder whose path is this one's with `suffix` behind it, on the same filesystem."""
        other = copy.copy(self)
        other.uri, other.path = self.uri + suffix, self.path + suffix
        return other

    def names(self) -> list[str]:
        """Names of what lies directly in the folder, sorted; empty where it does not exist."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        return sorted(entry.base_name for entry in self.filesystem.get_file_info(selector))

    def exists(self) -> bool:
        """True once the manifest has been written."""
        info = self.filesystem.get_file_info(f"{self.path}/{self.manifest_name}")
        return info.type == pyarrow.fs.FileType.File

    def manifest(self) -> dict[str, Any]:
        """Reads the manifest.

        Raises:
            InputError: where there is none, or it is not a JSON object.
        """
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{self.manifest_name}") as stream:
                content = json.loads(stream.read())
        except FileNotFoundError:
            raise InputError(f"There is no '{self.manifest_name}' in '{self.uri}': nothing was built there.") from None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InputError(f"The file '{self.uri}/{self.manifest_name}' is not a JSON object.")
        return content

    def check_files(self, sizes: dict[str, int]) -> None:
        """Compares the files with their sizes in bytes.

        Raises:
            InputError: naming the first file that is missing or has another size.
        """
        infos = self.filesystem.get_file_info([f"{self.path}/{name}" for name in sizes])
        for info, (name, expected) in zip(infos, sizes.items(), strict=True):
            if info.type != pyarrow.fs.FileType.File:
                raise InputError(f"The file '{self.uri}/{name}' is missing.")
            if info.size != expected:
                raise InputError(
                    f"The file '{self.uri}/{name}' has {info.size} bytes; {expected} are expected: it is not complete."
                )

    def open_reader(self, name: str) -> pa.ipc.RecordBatchFileReader:
        """Opens one Arrow file, as a memory map where the folder is local.

        Raises:
            InputError: where it is not a complete Arrow file.
        """
        path = f"{self.path}/{name}"
        try:
            source = pa.memory_map(path) if self.is_local else self.filesystem.open_input_file(path)
            return pa.ipc.open_file(source)
        except FileNotFoundError:
            raise InputError(f"The file '{self.uri}/{name}' is missing.") from None
        except pa.ArrowInvalid as error:
            raise InputError(f"The file '{self.uri}/{name}' is not a complete Arrow file: {error}") from None

    @contextmanager
    def new_file(self, name: str, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
        """Writes one new Arrow file of the folder, complete when the context ends."""
        with (
            self.filesystem.open_output_stream(f"{self.path}/{name}") as stream,
            pa.ipc.new_file(stream, schema) as writer,
        ):
            yield writer

    def file_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of files that exist."""
        listed = list(names)
        infos = self.filesystem.get_file_info([f"{self.path}/{name}" for name in listed])
        return {name: info.size for name, info in zip(listed, infos, strict=True)}

    def publish(self, fill: Callable[[ArrowFolder], dict[str, Any]]) -> None:
        """Creates the folder: `fill` writes Arrow files into the folder it is given and returns the manifest's content.

        What an interrupted attempt left behind is replaced. Where `fill` raises, the folder does not exist.

        Raises:
            InputError: where the folder exists already, or holds files of another kind.
        """
        if self.exists():
            raise InputError(f"'{self.uri}' exists already and is never overwritten.")
        # Only an interrupted attempt on a remote filesystem leaves Arrow files without a manifest.
        foreign = [name for name in self.names() if self.is_local or not name.endswith(".arrow")]
        if foreign:
            raise InputError(f"'{self.uri}' is not empty (it holds '{foreign[0]}'); a new or empty folder is expected.")
        if not self.is_local:
            self.filesystem.create_dir(self.path, recursive=True)
            self._write_manifest(fill(self))
            return
        target = self._temporary()
        os.makedirs(target.path)
        try:
            target._write_manifest(fill(target))
            _flush_to_disk(Path(target.path))
            os.rename(target.path, self.path)
        except BaseException as error:
            shutil.rmtree(target.path, ignore_errors=True)
            if isinstance(error, OSError) and self.exists():
                raise InputError(f"'{self.uri}' was written by another process at the same time.") from None
            raise

    def remove(self) -> None:
        """Deletes the folder so that it never exists in part."""
        if self.is_local:
            target = self._temporary()
            os.rename(self.path, target.path)
            shutil.rmtree(target.path)
        else:
            self.filesystem.delete_file(f"{self.path}/{self.manifest_name}")
            self.filesystem.delete_dir(self.path)

    def _write_manifest(self, content: dict[str, Any]) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{self.manifest_name}") as stream:
            stream.write(json.dumps(content, indent=1).encode())

    def _temporary(self) -> ArrowFolder:
        """A name for a local folder in the making; deletes what dead processes of this host left under such names."""
        prefix = f"{_TEMPORARY}{platform.node()}-"
        mine = self._beside(f"{prefix}{os.getpid()}")
        parent, start = os.path.split(self.path + prefix)
        os.makedirs(parent, exist_ok=True)
        for name in os.listdir(parent):
            owner = name.removeprefix(start)
            if name.startswith(start) and owner.isdigit() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
        return mine


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_to_disk(folder: Path) -> None:
    """Makes the files durable before the rename makes them visible, for the case of a power failure."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
