"""Contexts and predictions step by step, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.core.workspace import choose_device
from raysseg.data.augmentation import normalise
from raysseg.data.store import Store
from raysseg.functional.constants import UNLABELLED
from raysseg.segmenters import upsample_logits
from raysseg.visualization import EvolutionRow, evolution_sheet

PICTURED_IMAGES = 3


def draw_contexts(store: Store, keys: Sequence[str], network: ContextSegmenter, path: Path) -> None:
    """Draws p-map and context of every step up to the one that is used, the prediction, and the truth.

    Args:
        store: where the images are.
        keys: of the split that images are taken from, evenly.
        network: on any device; it is left on the CPU.
        path: PNG to write; its folder is made.

    Source: CiSS-Net, Fig. 5; where a position is uncertain, its context is hatched.
    """
    device = choose_device(torch.cuda.device_count())
    network = network.to(device).eval()
    rows = []
    for place in np.linspace(0, len(keys) - 1, min(PICTURED_IMAGES, len(keys))).astype(int):
        key = keys[place]
        image, truth = np.asarray(store.image(key)), store.label(key)
        maps, titles = _maps_of_steps(network, image, truth, device)
        rows.append(
            EvolutionRow(image=image, maps=maps[:-1], titles=titles, truth=truth, prediction=maps[-1], over_image=False)
        )
    network.cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    evolution_sheet(rows, store.info.palette, class_names=store.info.class_names).save(path)


@torch.inference_mode()
def _maps_of_steps(
    network: ContextSegmenter, image: np.ndarray, truth: np.ndarray | None, device: torch.device
) -> tuple[list[np.ndarray], list[str]]:
    """Returns p-map and context of every step and the prediction after them, uint8 `[H, W]` each, and titles of all but that."""
    pixels = normalise(torch.tensor(image).permute(2, 0, 1)[None].to(device).float())
    labels = None if truth is None else torch.tensor(truth)[None].to(device)
    size = (image.shape[0], image.shape[1])
    episode = network.play(pixels, labels)
    maps, titles = [], []
    for step in range(network.options.inference_steps):
        actions = network.choose(episode).actions
        predictions = episode.predictions
        maps += [_enlarged(predictions, size), _enlarged(predictions.masked_fill(~actions, UNLABELLED), size)]
        titles += [f"p-map {step}", f"context {step}"]
        episode.advance(actions)
    prediction = upsample_logits(episode.logits, size).argmax(1)[0]
    return [*maps, prediction.to(torch.uint8).cpu().numpy()], titles


def _enlarged(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Repeats the positions of a map uint8 `[1, h, w]` over their pixels, `[H, W]`."""
    stride = max(-(-side // cells) for side, cells in zip(size, maps.shape[-2:], strict=True))
    enlarged = maps[0].repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return enlarged[: size[0], : size[1]].cpu().numpy()
