"""A file of JSON lines that only grows, each sealed by a checksum over itself and the seal before it.

    {"seal":"<16 hexadecimal digits>","entry":{…}}

What may be wrong with such a file is one of two things. Its last line may be torn: a process was killed, or the power
failed, while it was written; nobody was told that it is there. Any other line that does not fit its seal, and a last one
that has its newline, was damaged later: nothing here writes into the middle of the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysseg.errors import InputError

FIRST_SEAL = "0" * 16
"""What stands for the seal before the first line."""

_HEAD, _MIDDLE, _TAIL = b'{"seal":"', b'","entry":', b"}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedFile:
    """What a file holds: its entries, the seal of the last of them, the bytes that they fill, and a torn rest."""

    entries: list[dict[str, Any]]
    seal: str
    size: int
    torn: bytes
    complete: bool
    """Whether the last line ends with its newline."""


def seal_line(entry: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """Returns the line of an entry with its newline, and its seal.

    Args:
        entry: plain values.
        previous: the seal of the line before, `FIRST_SEAL` where there is none.
    """
    body = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
    seal = _seal(body, previous)
    return _HEAD + seal.encode() + _MIDDLE + body + _TAIL + b"\n", seal


def read_sealed(path: Path) -> SealedFile:
    """Reads a file of sealed lines; one that does not exist is empty.

    Raises:
        InputError: the file cannot be read, or a line that is not the last one does not fit its seal.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    entries: list[dict[str, Any]] = []
    seal, start = FIRST_SEAL, 0
    while start < len(content):
        newline = content.find(b"\n", start)
        end = len(content) if newline < 0 else newline
        unsealed = _unseal(content[start:end], seal)
        if unsealed is None:
            if newline >= 0 and newline + 1 < len(content):
                raise InputError(
                    f"Line {len(entries) + 1} of {path} is damaged: it does not fit its checksum, and lines follow it; "
                    "put a copy of the file in its place."
                )
            return SealedFile(entries=entries, seal=seal, size=start, torn=content[start:], complete=True)
        entry, seal = unsealed
        entries.append(entry)
        start = end + 1
    complete = not content or content.endswith(b"\n")
    return SealedFile(entries=entries, seal=seal, size=len(content), torn=b"", complete=complete)


def _seal(body: bytes, previous: str) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:16]


def _unseal(line: bytes, previous: str) -> tuple[dict[str, Any], str] | None:
    """The entry and seal of a line, or None where it is not a whole line that follows the seal `previous`."""
    start = len(_HEAD) + 16 + len(_MIDDLE)
    body = line[start : -len(_TAIL)]
    seal = _seal(body, previous)
    if line != _HEAD + seal.encode() + _MIDDLE + body + _TAIL:
        return None
    entry: dict[str, Any] = json.loads(body)
    return entry, seal
