import io
import re

import pytest

from raysseg.cli.progress import Progress
from raysseg.core.telemetry import Telemetry, progress_fields

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def busy_run() -> dict[str, str | float]:
    """The fields of an asynchronous run with four actors, one of them dead."""
    clock = Clock()
    telemetry = Telemetry(clock=clock)
    telemetry.actors(3, 4)
    telemetry.rollout(8, 1, 0.5)
    telemetry.rollout(8, 2, 0.5)
    telemetry.update(9.7, 0.3, 0.1)
    telemetry.dropped(2)
    telemetry.lost(1)
    clock.now = 1.0
    return progress_fields(telemetry.snapshot())


def test_lines_say_what_the_actors_and_the_learner_do() -> None:
    stream = io.StringIO()
    with Progress(100, "eil seed 0", stream=stream) as progress:
        progress.update(50, phase="explore", stage=2, **busy_run())
    assert stream.getvalue().splitlines() == [
        "eil seed 0: 50.0 %; explore, stage 2, actors 3/4, lag 1.5, busy 97 %, drops 3"
    ]


def test_a_terminal_of_100_columns_shows_the_bar_and_every_field_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(100, "eil seed 0", stream=stream) as progress:
        progress.update(50, phase="explore", stage=2, images_per_second=33.0, reward=-0.01234, miou=0.531, **busy_run())
    lines = [line.rstrip() for line in ESCAPES.sub("", stream.getvalue()).replace("\r", "\n").splitlines()]
    bar = max(index for index, line in enumerate(lines) if line.startswith("eil seed 0 ━"))
    assert "━  50% 0:00:0" in lines[bar]
    # What does not fit is wrapped between fields, not cut.
    assert " ".join(line.strip() for line in lines[bar + 1 :] if line) == (
        "explore, stage 2, 33 images/s, reward -0.01234, mIoU 53.1 %, actors 3/4, lag 1.5, busy 97 %, drops 3"
    )
    assert max(map(len, lines)) <= 100
