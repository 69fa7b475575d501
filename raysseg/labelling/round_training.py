"""Trains the segmenter on all answers so far, from the weights that the run started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from raysseg.algorithms.ralis.config import RegionOptions, SegmenterStepOptions
from raysseg.algorithms.ralis.maps import Autocast, FreshMaps
from raysseg.algorithms.ralis.training import RegionTrainer
from raysseg.core.seeding import generator
from raysseg.labelling.folder_images import FolderImages
from raysseg.labelling.ledger import Answer
from raysseg.labelling.project import Project
from raysseg.labelling.settings import RoundTraining
from raysseg.segmenters import Segmenter

OnUpdate = Callable[[int, float], None]
"""Is told the number of updates that are done, and the loss of the last one."""


def train_on_answers(
    segmenter: Segmenter,
    project: Project,
    answers: Mapping[str, Answer],
    source: FolderImages,
    autocast: Autocast,
    *,
    round_number: int,
    on_update: OnUpdate,
) -> None:
    """Trains a segmenter in place, for the number of updates that the run's settings fix.

    Every update draws its regions uniformly from all answers, so that no round counts more than another. The same answers,
    settings and starting weights give the same segmenter on one machine.

    Args:
        segmenter: on the device of `source`.
        project: the run.
        answers: by the id of their region, at least one.
        source: images, and the labels of these answers.
        autocast: the precision.
        round_number: which is ranked next; all randomness depends on it and the run's seed.
        on_update: shows how far it is.

    Raises:
        NonFiniteError: a loss is not finite.
        InputError: a file has gone or changed.
    """
    settings, options = project.settings, project.settings.training
    number_of = {name: row for row, name in enumerate(project.names)}
    regions = [region for region in map(project.find, answers) if region is not None]
    rows = np.array([number_of[region.image] for region in regions])
    numbers = np.array([region.number for region in regions])
    trainer = _trainer(settings.regions, options, source, autocast, settings.inference_batch_size)
    trainer.begin(segmenter)
    for update in range(options.updates):
        draws = generator(settings.seed, "answers", round_number, update)
        chosen = draws.choice(len(regions), size=min(options.batch_size, len(regions)), replace=False)
        loss = trainer.train(
            rows[chosen], numbers[chosen], seed=int(draws.integers(2**62)), progress=update / options.updates
        )
        on_update(update + 1, loss)
    segmenter.requires_grad_(False).eval()


def _trainer(
    regions: RegionOptions, options: RoundTraining, source: FolderImages, autocast: Autocast, batch_size: int
) -> RegionTrainer:
    """RALIS' own training pass, an update of which sees as many regions as are drawn here."""
    step = SegmenterStepOptions(
        batch_size=options.batch_size,
        optimiser=options.optimiser,
        head_multiplier=options.head_multiplier,
        augmentation=options.augmentation,
    )
    return RegionTrainer(source, regions, step, FreshMaps(source, batch_size, autocast), autocast)
