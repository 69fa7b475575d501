"""EIL's reward and gate: each one function behind one key of the settings."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raysseg.algorithms.eil.config import EILOptions
from raysseg.algorithms.eil.state import EILState
from raysseg.functional.reward import ContrastiveReward, contrastive_reward


def paper_reward(state: EILState, next_state: EILState, options: EILOptions) -> ContrastiveReward:
    """Change of the contrastive reliability, `[B]` in (−1, 1), with its two parts. Source: Eq. 8-12."""
    return contrastive_reward(
        state.features,
        state.counts,
        next_state.features,
        next_state.counts,
        delta=options.delta,
        distance=options.distance,
    )


def no_gate(values: torch.Tensor) -> torch.Tensor:
    """Accepts every image: bool `[B]`. Source: Table 3, Rand/PS."""
    return torch.ones_like(values, dtype=torch.bool)


def positive_gate(values: torch.Tensor) -> torch.Tensor:
    """Accepts images whose value `[B]` is above 0: bool `[B]`. Source: Eq. 13."""
    return values > 0


REWARDS: dict[str, Callable[[EILState, EILState, EILOptions], ContrastiveReward]] = {"paper": paper_reward}
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"none": no_gate, "positive": positive_gate}
