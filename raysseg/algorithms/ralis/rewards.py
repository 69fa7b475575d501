"""RALIS' reward: by how much a training pass on the newest regions changed the mean IoU on D_R."""

from __future__ import annotations

import numpy as np
import torch

from raysseg.algorithms.ralis.maps import Autocast, EncoderMaps
from raysseg.data.batches import GROUND_TRUTH, DeviceDataset
from raysseg.evaluation import Scores, confusion_matrix
from raysseg.functional.label_inference import predicted_classes
from raysseg.segmenters import Segmenter, evaluation_mode, upsample_logits


@torch.no_grad()
def measure_miou(
    segmenter: Segmenter, maps: EncoderMaps, data: DeviceDataset, rows: np.ndarray, *, autocast: Autocast
) -> float:
    """Returns the mean IoU of a segmenter on some images, in [0, 1]; one pass at the images' own size.

    Args:
        segmenter: f.
        maps: gives the images' encoder maps.
        data: gives their labels.
        rows: D_R, int64 `[M]`.
        autocast: the precision.

    Source: RALIS, Sec. 3.1.
    """
    total = torch.zeros(segmenter.num_classes, segmenter.num_classes, dtype=torch.int64, device=data.device)
    with evaluation_mode(segmenter):
        for batch in maps.batches(segmenter, rows):
            with autocast():
                output = segmenter.decode(batch.maps, batch.size)
            classes = predicted_classes(upsample_logits(output.logits, batch.size))
            truth = data.labels(torch.as_tensor(rows[batch.places]), GROUND_TRUTH)
            total += confusion_matrix(classes, truth, segmenter.num_classes)
    return Scores.from_confusion(total).miou


def miou_gain(before: float, after: float, scale: float) -> float:
    """Returns the reward: the change of the mean IoU, in `scale`-ths of 1; the first of an episode is a change as well.

    Args:
        before: mean IoU before the pass, in [0, 1].
        after: and after it.
        scale: 100 gives points.

    Source: RALIS, Sec. 3.1; the authors' code takes the whole mean IoU as the first reward.
    """
    return scale * (after - before)
