"""One round: train the segmenter on the answers so far, rank, and hand out what people are to label."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import numpy as np
import torch

from raysseg.core.workspace import choose_device, low_precision
from raysseg.evaluation import predict_probabilities
from raysseg.labelling.durable import ExclusiveLock
from raysseg.labelling.folder_images import FolderImages
from raysseg.labelling.hand_out import check_target, hand_out
from raysseg.labelling.ledger import Answer, read_answers
from raysseg.labelling.masks import mask_digest
from raysseg.labelling.networks import Networks, fingerprint
from raysseg.labelling.project import Project
from raysseg.labelling.ranking import Ranked, RegionRanker
from raysseg.labelling.round_training import train_on_answers
from raysseg.labelling.rounds import Asked, Rounds
from raysseg.segmenters import Segmenter, save_segmenter


class Shown(Protocol):
    """Where progress is shown."""

    def update(self, completed: float, total: float | None = None, **fields: str | float | int) -> None:
        """Shows the amount of work that is done."""


_LOCAL_FILES = "/data/local-files/?d="

Show = Callable[[str, float | None], AbstractContextManager[Shown]]
"""Makes the progress of one part of the work from its title and its amount, None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRound:
    """What was handed out: the round's number, its folder, the policy that chose, on how many answers its segmenter was
    trained, and whether there are pre-labels.
    """

    number: int
    out: Path
    policy: str
    answers: int
    regions: int
    prelabelled: bool


def next_round(path: Path, count: int, out: Path | None, url: str | None, show: Show) -> NextRound:
    """Makes the next round of a run.

    A round exists once `rounds/NUMBER.jsonl` does; a kill before that leaves a folder that is made again.

    Args:
        path: of the run.
        count: regions to ask for.
        out: the round's folder; None is `rounds/NUMBER` in the run.
        url: what stands before the pictures' paths in Label Studio's tasks; None is the round's folder as one of its local
            files.
        show: shows progress.

    Raises:
        InputError: too few regions are left, another process makes a round, a file has gone or changed, or the disk refuses.
        NonFiniteError: training, ranking or predicting gives a value that is not finite.
    """
    project = Project(path)
    with ExclusiveLock(path / "lock", "making a round"):
        rounds = Rounds(path / "rounds")
        number = rounds.count + 1
        own = rounds.folder / f"{number:04d}"
        if out is None:
            # Nobody was told of this folder: the round has no record.
            shutil.rmtree(own, ignore_errors=True)
        else:
            check_target(out)
        answers, _ = read_answers(project.ledger)
        return _Round(project, rounds, answers, number, show).make(count, out or own, _address(out or own, url))


def _address(out: Path, url: str | None) -> str:
    if url is None:
        # Label Studio serves no storage that is its document root itself, so the root is the folder above.
        return f"{_LOCAL_FILES}{quote(out.resolve().name)}/"
    return url if not url or url.endswith(("/", "=")) else f"{url}/"


class _Round:
    """The work of one round on one device."""

    def __init__(self, project: Project, rounds: Rounds, answers: dict[str, Answer], number: int, show: Show) -> None:
        self._project, self._rounds, self._answers, self._number, self._show = project, rounds, answers, number, show
        self._device = choose_device(torch.cuda.device_count())
        self._source = FolderImages(project, answers, self._device)
        self._networks = Networks(project.settings)

    def make(self, count: int, out: Path, url: str) -> NextRound:
        """Trains, ranks, predicts and writes."""
        project, networks = self._project, self._networks
        RegionRanker.check_left(project, self._rounds.asked, count)
        networks.check_images(len(project.names))
        segmenter = copy.deepcopy(networks.segmenter).to(self._device)
        if self._answers:
            self._train(segmenter)
        knows_classes = networks.knows_classes or bool(self._answers)
        # Without a label and without a trained segmenter any score would be that of random numbers.
        policy = project.settings.policy if knows_classes else "uniform"
        ranked = self._rank(segmenter, count, policy)
        prelabels = self._predict(segmenter, ranked) if knows_classes else {}
        asked = self._asked(segmenter, ranked, policy, prelabels)
        with self._show("writing the regions", count) as bar:
            hand_out(out, project, asked, prelabels, url=url, on_region=lambda done: bar.update(done))
        self._rounds.add(asked)
        return NextRound(
            number=self._number,
            out=out,
            policy=policy,
            answers=len(self._answers),
            regions=len(asked),
            prelabelled=knows_classes,
        )

    def _train(self, segmenter: Segmenter) -> None:
        updates = self._project.settings.training.updates
        with self._show(f"training on {len(self._answers)} answers", updates) as bar:
            train_on_answers(
                segmenter,
                self._project,
                self._answers,
                self._source,
                self._autocast,
                round_number=self._number,
                on_update=lambda done, loss: bar.update(done, loss=loss),
            )
        save_segmenter(self._project.path / "segmenters" / f"{self._number:04d}.safetensors", segmenter)

    def _rank(self, segmenter: Segmenter, count: int, policy: str) -> list[Ranked]:
        query = self._networks.query
        with self._show(f"ranking by {policy}", None) as bar:
            ranker = RegionRanker(
                self._project,
                self._networks.options,
                segmenter,
                None if query is None else query.to(self._device),
                self._source,
                self._autocast,
                on_images=lambda images: bar.update(images, images=images),
            )
            return ranker.rank(count, policy, self._rounds.asked, self._answers, round_number=self._number)

    def _predict(self, segmenter: Segmenter, ranked: list[Ranked]) -> dict[str, np.ndarray]:
        """The segmenter's classes in every region, uint8 [h, w] by its id."""
        names = sorted({one.region.image for one in ranked})
        row_of = {name: row for row, name in enumerate(self._project.names)}
        prelabels = {}
        with self._show("predicting", len(names)) as bar:
            for done, name in enumerate(names, start=1):
                images, _ = self._source.images(torch.tensor([row_of[name]]))
                probabilities = predict_probabilities(
                    segmenter, images, autocast_dtype=low_precision("auto", self._device)
                )
                classes = probabilities[0].argmax(0).to(torch.uint8).cpu().numpy()
                for one in ranked:
                    if one.region.image == name:
                        prelabels[one.region.id] = np.ascontiguousarray(classes[one.region.cell])
                bar.update(done)
        return prelabels

    def _asked(
        self, segmenter: Segmenter, ranked: list[Ranked], policy: str, prelabels: dict[str, np.ndarray]
    ) -> list[Asked]:
        version = fingerprint(segmenter, self._networks.query)
        return [
            Asked(
                id=one.region.id,
                image=one.region.image,
                box=one.region.box,
                score=one.score,
                round=self._number,
                policy=policy,
                policy_version=version,
                answers=len(self._answers),
                prelabel=mask_digest(prelabels[one.region.id]) if prelabels else None,
            )
            for one in ranked
        ]

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = low_precision("auto", self._device)
        with torch.autocast(self._device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield
