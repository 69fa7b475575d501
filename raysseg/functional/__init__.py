"""The methods' equations as pure tensor functions: batched, on any device, torch alone."""

from raysseg.functional.acquisition import BaldSums, add_bald_pass, bald_map, follow_direction, greedy_cover, margin_map
from raysseg.functional.box_mean import box_mean
from raysseg.functional.class_balance import class_weights, label_mass
from raysseg.functional.class_presence import only_classes, present_classes
from raysseg.functional.constants import MAX_CLASSES, PADDING, UNLABELLED
from raysseg.functional.context_reward import context_rewards, improvement
from raysseg.functional.counting import count_indices
from raysseg.functional.ddpg import assessor_loss, bootstrap_target, explore, searcher_loss, soft_update
from raysseg.functional.divergence import divergence_histograms, kl_matrix
from raysseg.functional.double_q import discounted_sums, double_q_targets, q_loss
from raysseg.functional.held_out import balanced_log_likelihood, hide_strokes, label_gain
from raysseg.functional.label_inference import (
    candidates,
    dilate_classes,
    expand_thresholds,
    infer_labels,
    infer_labels_from_mask,
    infer_labels_oracle,
    predicted_classes,
    within_window,
)
from raysseg.functional.pixel_policy import action_entropy, action_log_probabilities, actor_critic_losses
from raysseg.functional.policy_search import (
    class_overlap,
    estimated_overlap,
    follow_elites,
    image_traits,
    pair_counts,
    policy_thresholds,
)
from raysseg.functional.random import mix, normal, uniform
from raysseg.functional.regions import (
    class_shares,
    cut_regions,
    entropy_map,
    entropy_map_of_logits,
    label_shares,
    pooled_entropies,
    region_means,
)
from raysseg.functional.returns import generalised_advantages, n_step_advantages, v_trace
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
    summed_reward,
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
    "BaldSums",
    "ContrastiveReward",
    "action_entropy",
    "action_log_probabilities",
    "actor_critic_losses",
    "add_bald_pass",
    "assessor_loss",
    "balanced_log_likelihood",
    "bald_map",
    "bootstrap_target",
    "box_mean",
    "candidates",
    "cell_counts",
    "cell_index",
    "class_centres",
    "class_overlap",
    "class_reliability",
    "class_shares",
    "class_weights",
    "confidence_histogram",
    "context_rewards",
    "contrastive_reward",
    "correlation",
    "count_indices",
    "cut_regions",
    "dilate_classes",
    "discounted_sums",
    "distance",
    "divergence_histograms",
    "double_q_targets",
    "entropy_map",
    "entropy_map_of_logits",
    "estimated_overlap",
    "expand_thresholds",
    "explore",
    "follow_direction",
    "follow_elites",
    "generalised_advantages",
    "greedy_cover",
    "hide_strokes",
    "image_traits",
    "improvement",
    "infer_labels",
    "infer_labels_from_mask",
    "infer_labels_oracle",
    "kl_matrix",
    "label_gain",
    "label_mass",
    "label_precision",
    "label_shares",
    "margin_map",
    "mix",
    "moving_average",
    "n_step_advantages",
    "normal",
    "only_classes",
    "operator_planes",
    "pair_counts",
    "pixel_reliability",
    "plane_count",
    "policy_thresholds",
    "pooled_entropies",
    "predicted_classes",
    "present_classes",
    "q_loss",
    "quantiles_from_histogram",
    "region_means",
    "reliability",
    "searcher_loss",
    "select_labels",
    "soft_update",
    "summed_reward",
    "uniform",
    "v_trace",
    "within_window",
]
