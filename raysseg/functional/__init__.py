"""The methods' equations as pure tensor functions: batched, on any device, torch alone."""

from raysseg.functional.constants import MAX_CLASSES, PADDING, UNLABELLED
from raysseg.functional.counting import count_indices
from raysseg.functional.ddpg import assessor_loss, bootstrap_target, explore, searcher_loss, soft_update
from raysseg.functional.label_inference import (
    candidates,
    dilate_classes,
    expand_thresholds,
    infer_labels,
    infer_labels_from_mask,
    infer_labels_oracle,
    within_window,
)
from raysseg.functional.random import mix, normal, uniform
from raysseg.functional.reward import (
    ContrastiveReward,
    cell_counts,
    cell_index,
    class_centres,
    class_reliability,
    contrastive_reward,
    distance,
    pixel_reliability,
    reliability,
)
from raysseg.functional.selection import (
    confidence_histogram,
    moving_average,
    quantiles_from_histogram,
    select_labels,
)
from raysseg.functional.state import operator_planes, plane_count
from raysseg.functional.statistics import correlation, label_precision

__all__ = [
    "MAX_CLASSES",
    "PADDING",
    "UNLABELLED",
    "ContrastiveReward",
    "assessor_loss",
    "bootstrap_target",
    "candidates",
    "cell_counts",
    "cell_index",
    "class_centres",
    "class_reliability",
    "confidence_histogram",
    "contrastive_reward",
    "correlation",
    "count_indices",
    "dilate_classes",
    "distance",
    "expand_thresholds",
    "explore",
    "infer_labels",
    "infer_labels_from_mask",
    "infer_labels_oracle",
    "label_precision",
    "mix",
    "moving_average",
    "normal",
    "operator_planes",
    "pixel_reliability",
    "plane_count",
    "quantiles_from_histogram",
    "reliability",
    "searcher_loss",
    "select_labels",
    "soft_update",
    "uniform",
    "within_window",
]
