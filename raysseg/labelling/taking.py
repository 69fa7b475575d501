"""Takes answers into the ledger: each is recorded, known already, not there yet, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from raysseg.errors import nearest_name
from raysseg.functional.constants import UNLABELLED
from raysseg.labelling.answers import Found, Given, Open, Refusal
from raysseg.labelling.ledger import Ledger
from raysseg.labelling.masks import mask_digest
from raysseg.labelling.project import Project
from raysseg.labelling.regions import Region
from raysseg.labelling.rounds import Rounds

_NAMES_COMPARED = 2000


@dataclass(slots=True, kw_only=True)
class Taken:
    """What became of the answers of one call, by the ids of their regions."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    """Of the added ones those that equal the segmenter's pre-label in every pixel."""
    surplus: int = 0
    """Regions with labels in maps of whole images that were not asked for; their labels are left out."""
    refused: list[Refusal] = field(default_factory=list)


class AnswerTaker:
    """Checks answers against what was asked for, and records them.

    Args:
        project: the run.
        rounds: what was asked for.
        ledger: opened for adding.
        replace: whether an answer takes the place of an earlier call's for the same region.
    """

    def __init__(self, project: Project, rounds: Rounds, ledger: Ledger, *, replace: bool = False) -> None:
        self._project, self._rounds, self._ledger, self._replace = project, rounds, ledger, replace
        self._given: set[str] = set()
        self.taken = Taken()

    def take(self, answers: Iterable[Found]) -> None:
        """Takes answers, one after the other; one that is refused keeps none of the others out.

        Raises:
            InputError: the disk refuses; what was taken before stays taken.
        """
        for answer in answers:
            if isinstance(answer, Refusal):
                self.taken.refused.append(answer)
                continue
            region = self._project.find(answer.name)
            if region is not None:
                self._take_region(region, answer)
            elif answer.name in self._project.images:
                self._take_image(answer)
            else:
                known = list(self._rounds.asked)[:_NAMES_COMPARED] or self._project.names[:_NAMES_COMPARED]
                self._refuse(
                    answer, f"there is no region and no image of the name '{answer.name}'{_hint(answer.name, known)}"
                )

    def _take_region(self, region: Region, answer: Given | Open) -> None:
        if region.id not in self._rounds.asked:
            self._refuse(answer, "the region was not asked for")
        elif isinstance(answer, Open):
            self._leave_open(region)
        elif answer.mask.shape != region.size:
            self._refuse(
                answer, f"{_size(answer.mask.shape)}; {_size(region.size)} are expected, the size of the region"
            )
        else:
            self._record(region, answer.mask, answer)

    def _take_image(self, answer: Given | Open) -> None:
        """Takes from the label map of a whole image the regions of it that were asked for."""
        size = self._project.images[answer.name].size
        if isinstance(answer, Given) and answer.mask.shape != size:
            self._refuse(answer, f"{_size(answer.mask.shape)}; {_size(size)} are expected, the size of the image")
            return
        regions = [self._project.region(answer.name, number) for number in range(self._project.grid.count)]
        if isinstance(answer, Given) and not any(region.id in self._rounds.asked for region in regions):
            self._refuse(answer, "no region of the image was asked for")
            return
        for region in regions:
            labelled = isinstance(answer, Given) and bool((answer.mask[region.cell] != UNLABELLED).any())
            if region.id not in self._rounds.asked:
                self.taken.surplus += labelled
            elif labelled and isinstance(answer, Given):
                self._record(region, np.ascontiguousarray(answer.mask[region.cell]), answer)
            else:
                self._leave_open(region)

    def _record(self, region: Region, mask: np.ndarray, answer: Given | Open) -> None:
        asked = self._rounds.asked[region.id]
        # Of two answers in one call neither is the correction of the other, in whichever order their files come.
        replace = self._replace and region.id not in self._given
        self._given.add(region.id)
        outcome = self._ledger.add(region.id, mask, round_number=asked.round, source=answer.source, replace=replace)
        if outcome == "added":
            self.taken.added.append(region.id)
            if asked.prelabel == mask_digest(mask):
                self.taken.unchanged.append(region.id)
        elif outcome == "replaced":
            self.taken.replaced.append(region.id)
        elif outcome == "known":
            self.taken.known.append(region.id)
        else:
            first = self._ledger.answers[region.id]
            hint = "" if self._replace else ", unless --replace is given"
            self.taken.refused.append(
                Refusal(
                    name=region.id,
                    source=answer.source,
                    reason=f"already labelled, otherwise, by {first.source} at {first.time}; the first answer stays{hint}",
                )
            )

    def _leave_open(self, region: Region) -> None:
        if region.id not in self._ledger.answers:
            self.taken.open.append(region.id)

    def _refuse(self, answer: Given | Open, reason: str) -> None:
        self.taken.refused.append(Refusal(name=answer.name, source=answer.source, reason=reason))


def _hint(name: str, known: Iterable[str]) -> str:
    hint = nearest_name(name, known)
    return hint.rstrip("?") if hint.startswith("; did you mean") else ""


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]} pixels (width×height)"
