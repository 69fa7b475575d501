"""The failures that a user meets, each one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that was given (a key, a file, a dataset) is wrong; the message is one sentence that says what was expected."""


class CannotPredictError(InputError):
    """A finished variant looks at the truth, so it segments nothing that has none."""


class NonFiniteError(RuntimeError):
    """A loss or a reward is not finite; the message names the step, the tensor and the sample keys that held it."""


class ActorsLostError(RuntimeError):
    """All actors died and none came back; the message says how many there were and what the last one said."""


class LearnerLostError(RuntimeError):
    """A learner's process died; the run goes on from its newest checkpoint."""


class Stopped(RuntimeError):
    """The run was asked to stop (a signal, a preemption notice); a checkpoint was written and `--resume` goes on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest known name, or the list of known names where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""
