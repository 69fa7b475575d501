"""Checkpoints on disk: complete or not there at all, and refused in one sentence where a file was truncated."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.errors import InputError

MANIFEST = "manifest.json"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def save(algorithm: SegmentationAlgorithm, folder: Path, *, keep: int) -> Path:
    """Writes the checkpoint of the current iteration under a temporary name, renames it, and removes all but the
    newest `keep`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{algorithm.iteration:08d}"
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    algorithm.save_to_path(str(temporary.resolve()))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): [path.stat().st_size, _checksum(path)] for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if (path / MANIFEST).is_file())


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of a folder, or None."""
    found = _complete(folder) if folder.is_dir() else []
    return found[-1] if found else None


def verify(checkpoint: Path) -> None:
    """Compares every file with the checkpoint's manifest.

    Raises:
        InputError: a file is missing, truncated or changed.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name, (size, checksum) in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            raise InputError(
                f"The checkpoint {checkpoint} is damaged: {name} is missing; remove it to resume from the one before."
            )
        if path.stat().st_size != size:
            raise InputError(
                f"The checkpoint {checkpoint} is damaged: {name} has {path.stat().st_size} bytes instead of {size}; "
                "remove that folder to resume from the checkpoint before it."
            )
        if _checksum(path) != checksum:
            raise InputError(
                f"The checkpoint {checkpoint} is damaged: the content of {name} has changed; "
                "remove that folder to resume from the checkpoint before it."
            )
