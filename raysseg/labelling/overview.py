"""What a labelling run has asked for and got, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from raysseg.functional.constants import UNLABELLED
from raysseg.labelling.ledger import read_answers, read_mask
from raysseg.labelling.project import Project
from raysseg.labelling.rounds import Rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOverview:
    """One round: who chose, trained on how many answers, and how many of its regions were answered."""

    number: int
    policy: str
    policy_version: str
    answers: int
    asked: int
    answered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A run: regions in all, asked for and answered; labelled pixels and those that people left open; the share of each class
    among the labelled ones; bytes of a torn line at the ledger's end.
    """

    total: int
    asked: int
    answered: int
    rounds: tuple[RoundOverview, ...]
    pixels: int
    open_pixels: int
    class_shares: dict[str, float]
    torn_bytes: int


def overview(project: Project) -> Overview:
    """Counts what a run has; while another process adds answers, those that it has acknowledged.

    Raises:
        InputError: a file of the run is damaged.
    """
    rounds = Rounds(project.path / "rounds")
    answers, torn = read_answers(project.ledger)
    counts: np.ndarray = np.zeros(256, dtype=np.int64)
    for answer in answers.values():
        counts += np.bincount(read_mask(project.ledger, answer).reshape(-1), minlength=256)
    classes = project.settings.classes
    labelled = int(counts[: len(classes)].sum())
    asked = Counter(one.round for one in rounds.asked.values())
    answered = Counter(one.round for one in answers.values())
    first = {one.round: one for one in reversed(rounds.asked.values())}
    return Overview(
        total=project.total,
        asked=len(rounds.asked),
        answered=len(answers),
        rounds=tuple(
            RoundOverview(
                number=number,
                policy=first[number].policy,
                policy_version=first[number].policy_version,
                answers=first[number].answers,
                asked=asked[number],
                answered=answered[number],
            )
            for number in sorted(asked)
        ),
        pixels=labelled,
        open_pixels=int(counts[UNLABELLED]),
        class_shares={name: int(counts[index]) / max(1, labelled) for index, name in enumerate(classes)},
        torn_bytes=torn,
    )
