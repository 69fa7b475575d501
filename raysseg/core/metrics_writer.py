"""What a run writes while it goes: deterministic numbers, everything that depends on the clock, and TensorBoard files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.rename(path)


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
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

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
        """Appends one iteration."""
        for path, row in zip(self._files, (record, {"iteration": record["iteration"], **timing}), strict=True):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in {**record, **timing}.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(f"{record['phase']}/{name}", value, record["iteration"])

    def records(self) -> list[dict[str, Any]]:
        """Returns all lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self._lines(self._files[0])]

    def close(self) -> None:
        """Closes the TensorBoard file."""
        self._board.close()
