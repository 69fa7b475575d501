"""The images of a labelling run and people's answers on a device, as ranking and training ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from raysseg.data.augmentation import IMAGENET_MEAN
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.labelling.ledger import Answer, read_mask
from raysseg.labelling.project import Project

_DECODING_THREADS = 4
_KEPT_BYTES = 1 << 30


class FolderImages:
    """Images and answers by the number of the image in the run's list.

    Decoded images are kept up to a GiB: training comes back to the few that have answers. To be used from one thread.

    Args:
        project: the run.
        answers: by the id of their region; regions without one are unlabelled.
        device: where batches are to be.
    """

    def __init__(self, project: Project, answers: Mapping[str, Answer], device: torch.device) -> None:
        self.keys = project.names
        self.device = device
        self._project = project
        self._answers = answers
        self._pool = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0
        self._mean = np.array([round(255 * mean) for mean in IMAGENET_MEAN], dtype=np.uint8)

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of some rows.

        Args:
            rows: int64 [B].

        Returns:
            uint8 [B, 3, H, W], each at the top left of a canvas that holds all of them, and int64 [B, 2], (H, W) of each.

        Raises:
            InputError: a file has gone or changed.
        """
        numbers = rows.tolist()
        pictures = list(self._pool.map(self._picture, numbers))
        for number, picture in zip(numbers, pictures, strict=True):
            if number not in self._kept and self._kept_bytes + picture.nbytes <= _KEPT_BYTES:
                self._kept[number] = picture
                self._kept_bytes += picture.nbytes
        sizes = [picture.shape[:2] for picture in pictures]
        height, width = np.max(sizes, axis=0)
        canvas: np.ndarray = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
        canvas[:] = self._mean
        for place, picture in enumerate(pictures):
            canvas[place, : picture.shape[0], : picture.shape[1]] = picture
        images = torch.from_numpy(canvas).to(self.device).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(sizes, dtype=torch.int64).to(self.device)

    def sizes(self, rows: Tensor) -> Tensor:
        """(H, W) in pixels of some rows `[B]`, int64 [B, 2], on the device; nothing is decoded for it."""
        sizes = [self._project.images[self.keys[row]].size for row in rows.tolist()]
        return torch.tensor(sizes, dtype=torch.int64).to(self.device)

    def labels(self, rows: Tensor, version: int) -> Tensor:
        """Answers on some rows, on the canvas that `images` has for them.

        Args:
            rows: int64 [B].
            version: there is one, whatever it is called.

        Returns:
            uint8 [B, H, W]: classes, 255 unlabelled, 254 beside an image.

        Raises:
            InputError: the label map of an answer has gone or changed.
        """
        names = [self.keys[row] for row in rows.tolist()]
        sizes = [self._project.images[name].size for name in names]
        height, width = np.max(sizes, axis=0)
        canvas: np.ndarray = np.full((len(names), height, width), PADDING, dtype=np.uint8)
        for place, name in enumerate(names):
            answered = answered_map(self._project, self._answers, name)
            canvas[place, : answered.shape[0], : answered.shape[1]] = answered
        return torch.from_numpy(canvas).to(self.device)

    def _picture(self, number: int) -> np.ndarray:
        kept = self._kept.get(number)
        return self._project.image(self.keys[number]) if kept is None else kept


def answered_map(project: Project, answers: Mapping[str, Answer], image: str) -> np.ndarray:
    """All answers on one image as a label map, uint8 [H, W] with 255 where there is none.

    Raises:
        InputError: the label map of an answer has gone or changed.
    """
    labels: np.ndarray = np.full(project.images[image].size, UNLABELLED, dtype=np.uint8)
    for number in range(project.grid.count):
        region = project.region(image, number)
        answer = answers.get(region.id)
        if answer is not None:
            labels[region.cell] = read_mask(project.ledger, answer)
    return labels
