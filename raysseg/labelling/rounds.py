"""The rounds of a labelling run: which regions people were asked for, by whom, and what the segmenter took them for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysseg.errors import InputError
from raysseg.labelling.durable import write_durably


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A region that a person was asked for.

    `box` is (x0, y0, x1, y1) in pixels; `score` what the policy gave it, None where it gives none; `policy_version` the
    fingerprint of the networks that chose, `answers` on how many answers they were trained; `prelabel` the digest of the
    segmenter's classes, None where it knew none.
    """

    id: str
    image: str
    box: tuple[int, int, int, int]
    score: float | None
    round: int
    policy: str
    policy_version: str
    answers: int
    prelabel: str | None

    def line(self) -> str:
        """The region as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Rounds:
    """The rounds of a run, in the order in which they were asked for.

    Args:
        folder: `rounds` of the run.

    Raises:
        InputError: a file of a round is damaged, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: dict[str, Asked] = {}
        """Every region that was asked for, by its id."""
        self.count = 0
        while (lines := _lines(path := self.record(self.count + 1))) is not None:
            self.count += 1
            for number, line in enumerate(lines, start=1):
                one = _read(line, path, number)
                self.asked[one.id] = one

    def record(self, number: int) -> Path:
        """The file of a round."""
        return self.folder / f"{number:04d}.jsonl"

    def add(self, regions: list[Asked]) -> None:
        """Records the next round; from here on its answers are taken."""
        self.count += 1
        write_durably(self.record(self.count), "".join(f"{one.line()}\n" for one in regions).encode())
        self.asked |= {one.id: one for one in regions}


def _lines(path: Path) -> list[bytes] | None:
    """The lines of a round's file; None where there is none."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(line: bytes, path: Path, number: int) -> Asked:
    try:
        entry: dict[str, Any] = json.loads(line)
        x0, y0, x1, y1 = entry.pop("box")
        return Asked(box=(x0, y0, x1, y1), **entry)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"Line {number} of {path} is damaged; put a copy of the file in its place.") from None
