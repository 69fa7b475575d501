"""A small CiSS-Net for the tests: 12 images of 48×48, maps of 6×6 positions, networks of a few channels."""

from __future__ import annotations

from typing import Any

from algorithms.tiny_eil import changed

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.configuration import load_settings

CLASSES = 5
STEPS = 3
CELLS = (6, 6)

VALUES: dict[str, Any] = {
    "method": "cissnet",
    "data": {
        "scribbles": "none",
        "synthetic": {"train_images": 12, "val_images": 4, "height": 48, "width": 48, "objects": 4},
    },
    "segmenter": {
        "architecture": "PSPNet",
        "encoder": "resnet18",
        "weights": "none",
        "encoder_depth": 3,
        "decoder_channels": 16,
    },
    "training": {
        "pretrain_epochs": 1,
        "batch_size": 4,
        "optimiser": {"name": "adamw", "learning_rate": 0.003},
        "head_multiplier": 1.0,
        "augmentation": {"crop": [48, 48]},
    },
    "cissnet": {
        "network": {"width": 16, "context_width": 16, "prediction_width": 16, "group_channels": 8, "bins": [1, 2]},
        "reward": {"box": [24, 24]},
        "learning": {
            "updates": 4,
            "batch_size": 4,
            "steps": STEPS,
            "optimiser": {"name": "adamw", "learning_rate": 0.003},
        },
        "inference": {"steps": 2, "scored_steps": [0, 2]},
    },
    "engine": {"updates_per_iteration": 1, "inference_batch_size": 4, "torch_threads": 1, "cache_mib": 64},
}


def settings_of(**changes: Any) -> CiSSNetSettings:
    """Returns the small settings; `cissnet__learning__steps=2` replaces `cissnet.learning.steps`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_settings(CiSSNetSettings, changed(VALUES, dotted))
