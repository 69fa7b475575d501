"""A folder of plain images, labelling runs on it, and answers to what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg.labelling.answers import Given
from raysseg.labelling.ledger import Ledger
from raysseg.labelling.project import Project, create_project, list_images
from raysseg.labelling.rounds import Asked, Rounds
from raysseg.labelling.settings import LabellingSettings
from raysseg.labelling.taking import AnswerTaker

CLASSES = ("ground", "disc", "box")
TINY = {"encoder": "resnet18", "weights": "none", "encoder_depth": 3, "decoder_channels": 16}
TRAINING = {"updates": 2, "batch_size": 2, "augmentation": {"scale": [1, 1], "rotation": 0, "crop": [32, 32]}}


def label_of(seed: int) -> np.ndarray:
    """A label map of the three classes, uint8 [40, 48]."""
    generator = np.random.default_rng(seed)
    label: np.ndarray = np.zeros((40, 48), np.uint8)
    for number in (1, 2):
        top, left = generator.integers(0, 20, 2)
        label[top : top + 18, left : left + 22] = number
    return label


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Five images in which each class has its brightness."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, stem in enumerate("abcde"):
        noise = np.random.default_rng(index).integers(0, 40, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise + 70 * label_of(index)[..., None]).save(folder / f"{stem}.png")
    return folder


@pytest.fixture
def make_project(tmp_path: Path, image_folder: Path) -> Callable[..., Project]:
    """Makes a run on that folder, with a grid of 2 rows and 3 columns."""

    def make(**changes: object) -> Project:
        values = {
            "images": str(image_folder),
            "classes": CLASSES,
            "regions": {"rows": 2, "columns": 3},
            "pool_size": 2,
            "segmenter": TINY,
            "training": TRAINING,
            **changes,
        }
        settings = LabellingSettings.model_validate({key: value for key, value in values.items() if value is not None})
        return create_project(tmp_path / "run", settings, list_images(image_folder))

    return make


@pytest.fixture
def project(make_project: Callable[..., Project]) -> Project:
    """A run with that folder."""
    return make_project()


@pytest.fixture
def ask() -> Callable[..., Rounds]:
    """Asks for regions of a run by their ids, as one round."""

    def asked(project: Project, *ids: str, prelabel: str | None = None) -> Rounds:
        rounds = Rounds(project.path / "rounds")
        regions = []
        for identifier in ids:
            region = project.find(identifier)
            assert region is not None, identifier
            regions.append(
                Asked(
                    id=identifier,
                    image=region.image,
                    box=region.box,
                    score=None,
                    round=rounds.count + 1,
                    policy="uniform",
                    policy_version="0" * 12,
                    answers=0,
                    prelabel=prelabel,
                )
            )
        rounds.add(regions)
        return rounds

    return asked


@pytest.fixture
def answer() -> Callable[..., None]:
    """Answers regions of a run by their ids, as a person would who knows the truth."""

    def answered(project: Project, rounds: Rounds, *ids: str) -> None:
        found = []
        for identifier in ids:
            region = project.find(identifier)
            assert region is not None, identifier
            truth = label_of(project.names.index(region.image))
            found.append(Given(name=identifier, mask=truth[region.cell].copy(), source="truth"))
        with Ledger(project.ledger) as ledger:
            taker = AnswerTaker(project, rounds, ledger)
            taker.take(found)
        assert taker.taken.added == list(ids)

    return answered
