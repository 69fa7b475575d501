"""Progress of long work: a bar on a terminal, a line every ten seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

import rich.progress
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

LINE_INTERVAL = 10.0
"""Seconds between two plain lines of one phase."""

Value = str | float | int


def field_text(name: str, value: Value) -> str:
    """One field as a person reads it: shares in per cent, speeds without fractions, other numbers with four digits."""
    if name == "phase":
        return str(value)
    if isinstance(value, str):
        return f"{name} {value}"
    if name.lower() == "miou":
        return f"mIoU {100 * value:.1f} %"
    if name in ("images_per_second", "images/s"):
        return f"{value:.0f} images/s" if value >= 10 else f"{value:.1f} images/s"
    if name == "busy":
        return f"busy {100 * value:.0f} %"
    if name == "lag":
        return f"lag {value:.1f}"
    return f"{name} {value:.4g}"


def duration_text(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Bar(rich.progress.Progress):
    """The bar, and below it the fields: beside it they would leave it no room on a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields what is drawn."""
        yield self.make_tasks_table(self.tasks)
        yield from (Padding(Text(words), (0, 0, 0, 2)) for task in self.tasks if (words := task.fields["words"]))


class Progress:
    """Shows how far a run is; a `ProgressListener` and a context manager.

    Fields stay shown until a new value comes; at a change of phase all but the stage and the mIoU are dropped.

    Args:
        total: the amount of work in any unit, or None where it is not known yet.
        title: what runs.
        stream: where to write; by default standard error.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: float | None,
        title: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._title = title
        self._stream = stream or sys.stderr
        self._clock = clock
        self._fields: dict[str, Value] = {}
        self._completed = 0.0
        self._first: tuple[float, float] | None = None
        self._last_line: float | None = None
        self._shown = False
        self._bar: rich.progress.Progress | None = None
        if self._stream.isatty():
            self._bar = _Bar(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("{task.fields[left]}", markup=False),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(title, total=total, words="", left="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is not None and self._last_line is not None:
            self._write(f"stopped at {self._share()}")
        elif kind is None and not self._shown:
            self._line()

    def update(self, completed: float, total: float | None = None, **fields: Value) -> None:
        """Shows the amount of work that is done, and the fields (phase, stage, miou, reward, images_per_second, …)."""
        now = self._clock()
        changed = "phase" in fields and fields["phase"] != self._fields.get("phase")
        if changed:
            self._fields = {name: self._fields[name] for name in ("stage", "miou") if name in self._fields}
        self._fields = {"phase": fields["phase"], **self._fields, **fields} if changed else {**self._fields, **fields}
        self._total = self._total if total is None else total
        self._completed = completed
        self._shown = False
        if self._first is None:
            # A resumed run starts in the middle; what was done before says nothing about the speed now.
            self._first = (now, completed)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=completed, total=self._total, words=self._words(), left=self._left(now)
            )
        elif changed or self._last_line is None or now - self._last_line >= LINE_INTERVAL:
            self._line()

    def note(self, message: str) -> None:
        """Shows one sentence that stays."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._write(message)

    def _words(self) -> str:
        return ", ".join(field_text(name, value) for name, value in self._fields.items())

    def _share(self) -> str:
        if not self._total:
            return f"{self._completed:g}"
        return f"{100 * self._completed / self._total:.1f} %"

    def _left(self, now: float) -> str:
        """The time that is left at the speed so far; empty while that is not known."""
        if (
            self._first is None
            or not self._total
            or self._completed <= self._first[1]
            or self._completed >= self._total
        ):
            return ""
        seconds = (now - self._first[0]) / (self._completed - self._first[1]) * (self._total - self._completed)
        return f"{duration_text(seconds)} left"

    def _line(self) -> None:
        now = self._clock()
        self._last_line = now
        self._shown = True
        self._write("; ".join(part for part in (self._share(), self._words(), self._left(now)) if part))

    def _write(self, text: str) -> None:
        print(f"{self._title}: {text}", file=self._stream, flush=True)
