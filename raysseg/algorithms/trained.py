"""A trained variant, ready to segment images: on a GPU where there is one, in the precision it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from raysseg.algorithms.recipes import load_variant
from raysseg.core.settings import EvaluationSettings
from raysseg.core.workspace import choose_device, low_precision
from raysseg.data import DatasetInfo, Store
from raysseg.evaluation import predict_probabilities


class TrainedVariant:
    """The segmenter of a finished variant with everything that inference needs.

    Args:
        folder: of the variant.
        scales: factors on the side of the images in place of the variant's own, each > 0.
        flip: whether images also run mirrored, in place of the variant's own choice.

    Raises:
        InputError: the folder is not a finished variant's.
    """

    def __init__(self, folder: Path, *, scales: Sequence[float] | None = None, flip: bool | None = None) -> None:
        self.folder = folder.resolve()
        self._variant = load_variant(self.folder)
        self.settings = settings = self._variant.settings
        self._device = choose_device(torch.cuda.device_count())
        self._segmenter = self._variant.predictor().to(self._device)
        given = {"scales": None if scales is None else tuple(scales), "flip": flip}
        self.protocol: EvaluationSettings = settings.evaluation.model_copy(
            update={name: value for name, value in given.items() if value is not None}
        )
        """The scales and the mirroring that are used."""

    @property
    def store(self) -> Store:
        """The data that the variant was trained on; raises `InputError` where it has gone."""
        return self._variant.store()

    @property
    def info(self) -> DatasetInfo:
        """The classes that the segmenter tells apart."""
        return self._variant.info

    def probabilities(self, image: np.ndarray) -> torch.Tensor:
        """Returns the class probabilities of one image of any size.

        Args:
            image: uint8 [H, W, 3] RGB.

        Returns:
            float32 [K, H, W] on the segmenter's device; sums to 1 over K.
        """
        pixels = torch.tensor(image).permute(2, 0, 1)[None].to(self._device)
        return predict_probabilities(
            self._segmenter,
            pixels,
            scales=self.protocol.scales,
            flip=self.protocol.flip,
            autocast_dtype=low_precision(self.settings.engine.precision, self._device),
        )[0]
