"""Pictures of a finished run: label maps of a few images, with what the trained segmenter says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from raysseg.core.workspace import choose_device
from raysseg.data.augmentation import normalise
from raysseg.data.store import Store
from raysseg.segmenters import Segmenter, upsample_logits
from raysseg.visualization import EvolutionRow, evolution_sheet


def draw_label_maps(
    store: Store,
    segmenter: Segmenter,
    maps: Mapping[str, Sequence[np.ndarray]],
    titles: Sequence[str],
    path: Path,
    *,
    over_image: bool = False,
) -> None:
    """Draws label maps of some images side by side, then the segmenter's prediction and the truth.

    Args:
        store: where the images are.
        segmenter: on any device; it is left on the CPU.
        maps: sample key to its label maps, uint8 `[H, W]` each; at least one.
        titles: one caption per map.
        path: PNG to write; its folder is made.
        over_image: lay the maps over the image instead of hatching what is not labelled.

    Source: EIL, Fig. 3.
    """
    device = choose_device(torch.cuda.device_count())
    network = segmenter.to(device).eval()
    rows = []
    for key, given in maps.items():
        image = store.image(key)
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].to(device).float()
        with torch.inference_mode():
            logits = upsample_logits(network(normalise(pixels)).logits.float(), (image.shape[0], image.shape[1]))
        rows.append(
            EvolutionRow(
                image=np.asarray(image),
                maps=list(given),
                titles=list(titles),
                truth=store.label(key),
                prediction=logits.argmax(1)[0].to(torch.uint8).cpu().numpy(),
                over_image=over_image,
            )
        )
    network.cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    evolution_sheet(rows, store.info.palette, class_names=store.info.class_names).save(path)
