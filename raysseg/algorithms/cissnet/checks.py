"""What of a run can be refused before anything is trained: the reward's box, and whose classes the features are from."""

from __future__ import annotations

import json
from pathlib import Path

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.episode import box_of_positions
from raysseg.algorithms.cissnet.features import feature_shape
from raysseg.core.run import DATASET_FILE
from raysseg.data.store import Store
from raysseg.errors import InputError
from raysseg.segmenters import build_segmenter


def check_run(settings: CiSSNetSettings, store: Store) -> None:
    """Refuses settings that do not fit the data, whatever the policy: a run's pre-training is shared by all of its variants.

    Args:
        settings: of one variant.
        store: what it is trained on.

    Raises:
        InputError: the reward's box is larger than the maps, or `training.pretrained` was trained on other classes.

    Source: design.
    """
    network = settings.segmenter.model_copy(update={"weights": "none"})
    _, stride = feature_shape(build_segmenter(network, store.info.num_classes), settings.cissnet.network.features)
    crop = settings.crops.augmentation.crop
    if crop is None:
        sizes = [store.size(key) for key in store.keys(settings.data.train_split)]
        crop = (max(height for height, _ in sizes), max(width for _, width in sizes))
    box_of_positions(settings.cissnet.reward.box, (-(-crop[0] // stride), -(-crop[1] // stride)), stride)
    _check_classes(settings.training.pretrained, store)


def _check_classes(pretrained: str | None, store: Store) -> None:
    """Raises where a run wrote down the classes of a pre-trained segmenter and they are others; outside weights say none."""
    record = None if pretrained is None else Path(pretrained).parent / DATASET_FILE
    if record is None or not record.is_file():
        return
    given, own = json.loads(record.read_text())["info"]["class_names"], list(store.info.class_names)
    if given != own:
        raise InputError(
            f"training.pretrained is {pretrained}, whose segmenter tells {', '.join(given)} apart, but the data has "
            f"{', '.join(own)}: the same classes in the same order are expected."
        )
