"""Checkpoints on disk: complete or not there at all, and refused in one sentence where a file was damaged.

    checkpoints/
      00000040/            one checkpoint: RLlib's state, replay.json, and manifest.json with every file's size and CRC-32
      00000050/            the same iteration written again is 00000050-1
      replay/<name>/       segments of a replay buffer, written once and shared by all checkpoints whose replay.json names them

The order of a save makes it safe to be killed at any moment: segments, the checkpoint under a temporary name, fsync, one
rename, and only then what is no longer needed is removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.replay_files import PARTIAL, checksum, collect_garbage, damage, files_of, sync_folder
from raysseg.errors import InputError

MANIFEST = "manifest.json"
REPLAY_STATES = "replay.json"
REPLAY_FOLDER = "replay"

_NAME = re.compile(r"(\d{8,})(?:-(\d+))?")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save(algorithm: SegmentationAlgorithm, folder: Path, *, keep: int) -> Path:
    """Writes the checkpoint of the current iteration, and removes all but the newest `keep`.

    Checkpoints of later iterations go, too: the run has gone on from an earlier one, so they are none of its own.

    Args:
        algorithm: whose state and replay buffers are written.
        folder: of all checkpoints of the run.
        keep: at least 1.

    Raises:
        InputError: there is no space left; older checkpoints are as they were.

    Source: design.
    """
    folder.mkdir(parents=True, exist_ok=True)
    iteration = algorithm.iteration
    for leftover in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(leftover)
    target = _unused(folder, iteration)
    temporary = folder / f".{target.name}{PARTIAL}"
    try:
        _write(algorithm, folder, temporary)
        temporary.rename(target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (reason := _no_space(error)) is None:
            raise
        _remove_unused_segments(folder)
        raise InputError(
            f"The checkpoint of iteration {iteration} could not be written to {folder}: {reason}; "
            + _what_is_left(folder)
        ) from error
    sync_folder(folder)
    for old in _superseded(folder, target, keep):
        # Under another name first: a kill in the middle must not leave a checkpoint with holes.
        shutil.rmtree(old.rename(folder / f".{old.name}{PARTIAL}"))
    _remove_unused_segments(folder)
    return target


def _write(algorithm: SegmentationAlgorithm, folder: Path, temporary: Path) -> None:
    """Writes segments and the checkpoint under a temporary name, down to the disk."""
    states = {name: buffer.save(folder / REPLAY_FOLDER / name) for name, buffer in algorithm.replay_buffers().items()}
    algorithm.save_to_path(str(temporary.resolve()))
    (temporary / REPLAY_STATES).write_text(json.dumps(states))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): [path.stat().st_size, checksum(path)] for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    inside = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [*inside, temporary, *folder.glob(REPLAY_FOLDER), folder]:
        sync_folder(path)


def _unused(folder: Path, iteration: int) -> Path:
    """Returns a name that is not taken: a folder cannot be replaced by another in one step."""
    target, attempt = folder / f"{iteration:08d}", 0
    while target.exists():
        attempt += 1
        target = folder / f"{iteration:08d}-{attempt}"
    return target


def _order(checkpoint: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1)), int(match.group(2) or 0)


def _complete(folder: Path) -> list[Path]:
    """Returns all checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=_order)


def _superseded(folder: Path, target: Path, keep: int) -> list[Path]:
    """Returns what a complete new checkpoint makes superfluous."""
    found = _complete(folder)
    iteration = _order(target)[0]
    later = [path for path in found if _order(path)[0] >= iteration and path != target]
    own = [path for path in found if path not in later]
    return later + own[:-keep]


def _remove_unused_segments(folder: Path) -> None:
    """Removes the segments that no checkpoint names; a damaged replay.json names none, as its checkpoint is of no use."""
    states: list[dict[str, Any]] = []
    for checkpoint in _complete(folder):
        with contextlib.suppress(OSError, ValueError):
            states.append(json.loads((checkpoint / REPLAY_STATES).read_text()))
    replay = folder / REPLAY_FOLDER
    for buffer in sorted(replay.iterdir()) if replay.is_dir() else []:
        collect_garbage(buffer, [state[buffer.name] for state in states if buffer.name in state])


def _no_space(error: BaseException | None) -> str | None:
    """Returns what the system says where no space is the cause of an exception, in this process or in an actor's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno).lower()
        error = error.cause if isinstance(error, RayTaskError) else error.__cause__
    return None


def _what_is_left(folder: Path) -> str:
    left = newest(folder)
    if left is None:
        return "there is none before it, so the run starts again when it is resumed."
    return f"the run goes on from the checkpoint of iteration {_order(left)[0]} when it is resumed."


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of a folder, or None. Source: design."""
    return next(reversed(_complete(folder)), None)


def newest_usable(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that verifies, or None, and one sentence for every newer one.

    Source: design.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(_complete(folder)):
        try:
            verify(checkpoint)
        except InputError as error:
            passed_over.append(str(error))
        else:
            return checkpoint, passed_over
    return None, passed_over


def verify(checkpoint: Path) -> None:
    """Compares every file with the checkpoint's manifest, and every segment of its replay buffers with their states.

    Raises:
        InputError: a file is missing, truncated or changed.

    Source: design.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except ValueError as error:
        raise _damaged(checkpoint, f"{MANIFEST} cannot be read") from error
    for name, (size, value) in manifest.items():
        if (wrong := damage(checkpoint, {"file": name, "bytes": size, "checksum": value})) is not None:
            raise _damaged(checkpoint, wrong)
    for name, state in _replay_states(checkpoint).items():
        folder = checkpoint.parent / REPLAY_FOLDER / name
        for entry in files_of(state):
            if (wrong := damage(folder, entry)) is not None:
                raise _damaged(checkpoint, f"{wrong} in {folder}")


def _damaged(checkpoint: Path, wrong: str) -> InputError:
    return InputError(
        f"The checkpoint {checkpoint} is damaged: {wrong}; the run goes on from the one before it, or from its start."
    )


def _replay_states(checkpoint: Path) -> dict[str, dict[str, Any]]:
    path = checkpoint / REPLAY_STATES
    if not path.is_file():
        raise InputError(
            f"The checkpoint {checkpoint} has no {REPLAY_STATES}: it was written by another version of raysseg, "
            "so the run must be started again."
        )
    states: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return states


def restore(algorithm: SegmentationAlgorithm, checkpoint: Path) -> None:
    """Restores RLlib's state and the replay buffers.

    Args:
        algorithm: built with the settings of the run.
        checkpoint: from `newest_usable` or `save`.

    Raises:
        InputError: a file of a replay buffer is damaged, or the settings name another number of shards.

    Source: design.
    """
    states = _replay_states(checkpoint)
    algorithm.restore_from_path(str(checkpoint.resolve()))
    algorithm.restore_replay(states, checkpoint.parent / REPLAY_FOLDER)
