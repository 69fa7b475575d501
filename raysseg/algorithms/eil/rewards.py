"""EIL's rewards and gates: each one function behind one key of the settings.

A reward of one step is a function of a transition. What each measures, and where each fails, stands in the method's page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from raysseg.algorithms.eil.config import EILOptions
from raysseg.algorithms.eil.state import EILState, StateBuilder
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.held_out import balanced_log_likelihood, hide_strokes
from raysseg.functional.reward import ContrastiveReward, contrastive_reward, summed_reward
from raysseg.segmenters import Segmenter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One step of B images as a reward sees it.

    Args:
        builder: makes states, and takes virtual steps.
        segmenter: Φ, in evaluation mode.
        state: s, with M.
        following: s', with M'.
        seeds: int64 `[B]`, of whatever a reward draws.
    """

    builder: StateBuilder
    segmenter: Segmenter
    state: EILState
    following: EILState
    seeds: torch.Tensor

    @property
    def options(self) -> EILOptions:
        """EIL's settings."""
        return self.builder.options


def paper_reward(transition: Transition) -> ContrastiveReward:
    """Change of the contrastive reliability, `[B]` in (−1, 1), with its two parts. Source: Eq. 8-12."""
    state, following, options = transition.state, transition.following, transition.options
    return contrastive_reward(
        state.features,
        state.counts,
        following.features,
        following.counts,
        delta=options.delta,
        distance=options.distance,
    )


def summed_reliability_reward(transition: Transition) -> ContrastiveReward:
    """Change of the reliability summed over all labels, so that coverage pays: `[B]` in (−1, 1), with its two parts.

    Source: reconstruction.
    """
    state, following, options = transition.state, transition.following, transition.options
    return summed_reward(
        state.features,
        state.counts,
        following.features,
        following.counts,
        pixels=(state.labels != PADDING).flatten(1).sum(1),
        delta=options.delta,
        distance=options.distance,
    )


def held_out_reward(transition: Transition) -> ContrastiveReward:
    """How much better strokes that were kept back are predicted after virtual steps on M' than after the same steps on M.

    Both see the label maps without the strokes that were kept back. Prediction is measured by the mean over classes of the mean
    log-likelihood. `[B]`, of any sign; all of it is the part that the features changed.

    Source: reconstruction.
    """
    builder, state = transition.builder, transition.state
    hidden = hide_strokes(state.scribbles, transition.seeds, builder.num_classes)

    def likelihood(labels: torch.Tensor) -> torch.Tensor:
        seen = torch.where(hidden, UNLABELLED, labels)
        stepped = builder.advance(transition.segmenter, state, seen)
        return balanced_log_likelihood(stepped.probabilities.clamp_min(1e-7).log(), state.scribbles, hidden)

    value, next_value = likelihood(state.labels), likelihood(transition.following.labels)
    reward = next_value - value
    return ContrastiveReward(
        reward=reward, relabelling=torch.zeros_like(reward), features=reward, value=value, next_value=next_value
    )


def no_gate(values: torch.Tensor) -> torch.Tensor:
    """Accepts every image: bool `[B]`. Source: Table 3, Rand/PS."""
    return torch.ones_like(values, dtype=torch.bool)


def positive_gate(values: torch.Tensor) -> torch.Tensor:
    """Accepts images whose value `[B]` is above 0: bool `[B]`. Source: Eq. 13."""
    return values > 0


REWARDS: dict[str, Callable[[Transition], ContrastiveReward]] = {
    "paper": paper_reward,
    "summed_reliability": summed_reliability_reward,
    "held_out": held_out_reward,
}
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"none": no_gate, "positive": positive_gate}
