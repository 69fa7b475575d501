"""The ledger: every answer that a person gave, exactly once.

    ledger/lines.jsonl      one sealed line per answer, in the order in which they came
    ledger/masks/*.png      the label maps, named by what they hold
    ledger/torn-*.bin       what a killed process had written of a line, set aside by the next one
    ledger/lock             held by the process that adds

An answer is acknowledged when `Ledger.add` returns: its label map and then its line are on the disk by then. A kill
before that leaves at most a label map without a line, which is found again when the answer comes again, and a torn line.

A corrected answer is a line of its own that names the label map of the line that it replaces; no line is ever changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import numpy as np

from raysseg.core.replay_files import sync_folder
from raysseg.errors import InputError
from raysseg.labelling.durable import ExclusiveLock, write_durably, write_refused
from raysseg.labelling.masks import MaskFolder, mask_digest
from raysseg.labelling.sealed_lines import SealedFile, read_sealed, seal_line

LINES = "lines.jsonl"
MASKS = "masks"

Outcome = Literal["added", "known", "different", "replaced"]
"""What became of an answer: it is new; the very same was there; another one for its region was there and stays, or gave way.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One line of the ledger: the region, the digest of its label map, the round that asked for it, when it came (UTC, ISO
    8601) and from which file, and the digest of the region's label map until then, None where it had none.
    """

    region: str
    mask: str
    round: int
    time: str
    source: str
    replaces: str | None = None

    def entry(self) -> dict[str, Any]:
        """What its line holds."""
        return {key: value for key, value in asdict(self).items() if key != "replaces" or value is not None}


def read_answers(folder: Path) -> tuple[dict[str, Answer], int]:
    """Reads a ledger without the lock, while another process may be adding to it.

    Returns:
        The answers by region, in the order in which the regions were answered first, and the number of bytes of a last line
        that is torn or damaged.

    Raises:
        InputError: a line is damaged, or a region has two and the later one does not replace the earlier one.
    """
    content = read_sealed(folder / LINES)
    return _by_region(content, folder / LINES), len(content.torn)


def read_mask(folder: Path, answer: Answer) -> np.ndarray:
    """Returns the label map uint8 [h, w] of an answer; raises `InputError` where its file is missing or damaged."""
    return MaskFolder(folder / MASKS).get(answer.mask)


class Ledger:
    """A ledger opened for adding; a context manager that keeps other processes out.

    Args:
        folder: its folder; made where it does not exist.

    Raises:
        InputError: on entering, where another process adds to it, a line is damaged, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LINES
        self._lock = ExclusiveLock(folder / "lock", "adding answers")
        self._masks = MaskFolder(folder / MASKS)
        self._answers: dict[str, Answer] = {}
        self._seal = ""
        self._size = 0
        self._descriptor = -1
        self.repaired: str | None = None
        """What was wrong with the end of the file and what became of it, in one sentence; None where nothing was."""

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The answers by region, in the order in which the regions were answered first."""
        return MappingProxyType(self._answers)

    def __enter__(self) -> Ledger:
        try:
            (self._folder / MASKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_refused(self._folder, error) from error
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def add(self, region: str, mask: np.ndarray, *, round_number: int, source: str, replace: bool = False) -> Outcome:
        """Records an answer, unless its region has one; once it returns, the answer survives anything.

        The label map of an answer that is known is written again where its file was lost or damaged.

        Args:
            region: the region's identifier.
            mask: uint8 [h, w], classes and 255 where the person left it open.
            round_number: the round that asked for it.
            source: the file that it came in.
            replace: whether it takes the place of another answer for the region.

        Raises:
            InputError: the disk refuses; the ledger is then as it was before.
        """
        known = self._answers.get(region)
        if known is not None and known.mask == mask_digest(mask):
            self._masks.put(mask)
            return "known"
        if known is not None and not replace:
            return "different"
        answer = Answer(
            region=region,
            mask=self._masks.put(mask),
            round=round_number,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            source=source,
            replaces=None if known is None else known.mask,
        )
        line, seal = seal_line(answer.entry(), self._seal)
        self._append(line)
        self._answers[region], self._seal = answer, seal
        return "added" if known is None else "replaced"

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.__exit__(None, None, None)

    def _open(self) -> None:
        """Reads the lines, and takes away what a killed process left."""
        for folder in (self._folder, self._folder / MASKS):
            for left in folder.glob(".*.partial"):
                left.unlink(missing_ok=True)
        content = read_sealed(self._path)
        if content.torn:
            self._set_aside(content)
        self._answers = _by_region(content, self._path)
        self._seal, self._size = content.seal, content.size
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            if content.torn:
                os.ftruncate(self._descriptor, content.size)
                os.fsync(self._descriptor)
            sync_folder(self._folder)
            sync_folder(self._folder.parent)
        except OSError as error:
            raise write_refused(self._path, error) from error
        if not content.complete:
            self._append(b"\n")

    def _set_aside(self, content: SealedFile) -> None:
        """Keeps the bytes of a torn or damaged line in a file of their own, before they are cut off."""
        name = f"torn-{content.size}-{hashlib.sha256(content.torn).hexdigest()[:8]}.bin"
        write_durably(self._folder / name, content.torn)
        size, again = len(content.torn), ""
        what = f"torn ({size} bytes of an answer that was never acknowledged)"
        if content.torn.endswith(b"\n"):
            # A line with its end may have been acknowledged before something damaged it.
            what, again = f"damaged ({size} bytes)", "; give the last answer again"
        self.repaired = (
            f"The last line of {self._path} was {what}, and set aside: "
            f"it now lies in {name}, and all {len(content.entries)} answers before it are there{again}."
        )

    def _append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], self._size + written)
            os.fsync(self._descriptor)
        except OSError as error:
            # A full disk may have taken half of the line; this process goes on, so it must not stay.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise write_refused(self._path, error) from error
        self._size += len(line)


def _by_region(content: SealedFile, path: Path) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for number, entry in enumerate(content.entries, start=1):
        answer = _answer(entry, path, number)
        former = answers.get(answer.region)
        if answer.replaces != (None if former is None else former.mask):
            raise InputError(f"Line {number} of {path} is a second answer for the region '{answer.region}'.")
        answers[answer.region] = answer
    return answers


def _answer(entry: dict[str, Any], path: Path, number: int) -> Answer:
    try:
        return Answer(**entry)
    except TypeError:
        raise InputError(
            f"Line {number} of {path} has the keys {', '.join(entry)}; another version of raysseg wrote it."
        ) from None
