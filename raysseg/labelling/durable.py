"""Files that are still there, and whole, after a kill or a power cut; and a lock that dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from raysseg.core import replay_files
from raysseg.errors import InputError


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, brings it to the disk and renames it: it is there entirely or not at all.

    Raises:
        InputError: the disk is full, or refuses for another reason.
    """
    try:
        replay_files.write_durably(path, content)
    except OSError as error:
        raise write_refused(path, error) from error


def write_refused(path: Path, error: OSError) -> InputError:
    """The sentence for a file that cannot be written."""
    return InputError(f"{path} cannot be written: {error.strerror or error}.")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `out` at the end: that is there entirely or not at all.

    Args:
        out: a new or empty folder.

    Raises:
        InputError: the disk refuses.
    """
    # Of a path such as '.', only the absolute form has a name.
    target = out.resolve()
    partial = target.with_name(f".{target.name}{replay_files.PARTIAL}")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
        replay_files.sync_folder(target.parent)
    except OSError as error:
        raise write_refused(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ExclusiveLock:
    """Keeps a second process out; the kernel gives it back when its process ends, however that ends.

    Args:
        path: the lock's file, which stays.
        busy: what another process is doing while it holds the lock, for the message.

    Raises:
        InputError: on entering, where another process holds it.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self._path = path
        self._busy = busy
        self._descriptor: int | None = None

    def __enter__(self) -> ExclusiveLock:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_refused(self._path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            process = f"process {holder}" if holder else "another process"
            raise InputError(
                f"{self._path.parent} is in use: {process} is {self._busy}; wait until it is done."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
