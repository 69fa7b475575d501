"""What a run writes while it goes: deterministic numbers, everything that depends on the clock, and TensorBoard files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from raysseg.core import telemetry
from raysseg.errors import InputError

BOARD_GROUP = "engine"
"""TensorBoard shows the telemetry under this name, whatever the phase."""

TIMINGS = {
    "seconds": "Wall time of the iteration.",
    "images_per_second": "Images that actors or learner went through per second.",
}
"""What is in timings.jsonl beside the telemetry, and what it means."""


def write_failure(path: Path, error: OSError) -> InputError:
    """Returns the sentence for a file that could not be written, as an exception to raise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space left on its disk; free some space, then go on with --resume"
    else:
        reason = error.strerror or str(error)
    return InputError(f"The file {path} could not be written: {reason}.")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is whole or not there.

    Raises:
        InputError: the disk is full, or refuses for another reason.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_failure(path, error) from error


class MetricsWriter:
    """Writes `metrics.jsonl` (deterministic numbers), `timings.jsonl` (everything that depends on the clock) and TensorBoard files.

    Args:
        folder: the variant's folder.
        iteration: the last iteration that counts; later lines, written before a kill, are removed.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._files = [folder / "metrics.jsonl", folder / "timings.jsonl"]
        for path in self._files:
            kept = [line for line in self._lines(path) if json.loads(line)["iteration"] <= iteration]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._board_folder = folder / "tensorboard"
        fresh = not self._board_folder.exists()
        with self._board_failures():
            self._board = SummaryWriter(str(self._board_folder), purge_step=iteration + 1)
            if fresh:
                self._board.add_text("fields", _fields_table())

    @staticmethod
    def _lines(path: Path) -> Iterator[str]:
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                json.loads(line)
            except json.JSONDecodeError:
                return
            yield line

    def write(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Appends one iteration: to both files, or to none.

        Args:
            record: deterministic numbers, with `iteration` and `phase`.
            timing: everything that depends on the clock, telemetry included.

        Raises:
            InputError: the disk is full, or refuses for another reason.
        """
        sizes = [path.stat().st_size if path.exists() else 0 for path in self._files]
        for path, row in zip(self._files, (record, {"iteration": record["iteration"], **timing}), strict=True):
            try:
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self._cut(sizes)
                raise write_failure(path, error) from error
        with self._board_failures():
            for name, value in {**record, **timing}.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    group = BOARD_GROUP if name in telemetry.FIELDS else record["phase"]
                    self._board.add_scalar(f"{group}/{name}", value, record["iteration"])

    def _cut(self, sizes: list[int]) -> None:
        """Removes what was written after the files had these sizes, in bytes."""
        for path, size in zip(self._files, sizes, strict=True):
            # What matters is why the writing failed; a reader stops at a torn last line anyway.
            with contextlib.suppress(OSError):
                os.truncate(path, size)

    @contextlib.contextmanager
    def _board_failures(self) -> Iterator[None]:
        # TensorBoard writes in a thread of its own, whose failure appears at some later call.
        try:
            yield
        except OSError as error:
            raise write_failure(self._board_folder, error) from error

    def records(self) -> list[dict[str, Any]]:
        """Returns all lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self._lines(self._files[0])]

    def close(self) -> None:
        """Closes the TensorBoard file.

        Raises:
            InputError: the disk is full, or refuses for another reason.
        """
        with self._board_failures():
            self._board.close()


def _fields_table() -> str:
    """What the clock-dependent tags mean, as a Markdown table."""
    rows = [(f"<phase>/{name}", text) for name, text in TIMINGS.items()]
    rows += [(f"{BOARD_GROUP}/{name}", text) for name, text in telemetry.FIELDS.items()]
    return "\n".join(["| tag | meaning |", "| --- | --- |", *(f"| `{tag}` | {text} |" for tag, text in rows)])
