"""What long work tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class ProgressListener(Protocol):
    """Takes the progress of a run; the command shows it as a bar, a test may record it."""

    def update(self, completed: float, total: float, **fields: str | float | int) -> None:
        """Says how much of the work is done, with the fields that matter (phase, stage, mIoU, reward, images/s).

        Where remote actors work, also actors, lag, busy and drops, as `telemetry.progress_fields` gives them.
        """

    def note(self, message: str) -> None:
        """Says one sentence that should stay visible."""


class Silent:
    """A listener that shows nothing."""

    def update(self, completed: float, total: float, **fields: str | float | int) -> None:
        """Ignores the progress."""

    def note(self, message: str) -> None:
        """Ignores the sentence."""
