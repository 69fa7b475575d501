"""A policy of a few parameters that names no class, so that it can be played on any dataset: thresholds by an image's traits,
and a window.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysseg.algorithms.eil.config import EILOptions
from raysseg.errors import InputError
from raysseg.functional.policy_search import TRAITS, policy_thresholds

POLICY_FILE = "policy.json"
"""The searched policy of a run, in its folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy, ready to be played.

    Args:
        parameters: A · (1 + 2) numbers, a bias and two weights for each threshold, and one number that chooses the window.
        windows: sides in pixels that it chooses from, None for the whole image.
        size: A, the thresholds of an action.
    """

    parameters: tuple[float, ...]
    windows: tuple[int | None, ...]
    size: int

    @classmethod
    def of(cls, parameters: np.ndarray, options: EILOptions) -> Policy:
        """Returns the policy of some parameters `[D]` under the settings."""
        windows = tuple(None if side == "image" else side for side in options.population.windows)
        return cls(parameters=tuple(parameters.tolist()), windows=windows, size=options.action_size(0))

    def thresholds(self, traits: torch.Tensor) -> torch.Tensor:
        """Returns actions float32 `[B, A]` for standardised traits `[B, 2]`."""
        own = torch.tensor(self.parameters[:-1], dtype=torch.float32, device=traits.device)
        return policy_thresholds(own, traits, self.size)

    @property
    def window(self) -> int | None:
        """The side that it chooses: the interval of the last parameter's sigmoid, all equally long."""
        share = 1.0 / (1.0 + np.exp(-self.parameters[-1]))
        return self.windows[min(int(share * len(self.windows)), len(self.windows) - 1)]


@dataclasses.dataclass(slots=True, kw_only=True)
class PolicyDistribution:
    """The Gaussian over policies that the search moves.

    Args:
        mean: float64 `[D]`.
        std: float64 `[D]`; 0 for what the settings hold fixed.
        best: the best policy of the last generation `[D]`, also of the run that the search starts from; None where there
            was none.
    """

    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray | None = None

    @classmethod
    def of(cls, options: EILOptions) -> PolicyDistribution:
        """Returns the distribution that the settings start from.

        Raises:
            InputError: `population.start` is no such file, one of other actions, or one without the best policy that is to be
                played.
        """
        population, size = options.population, options.action_size(0)
        bias = float(np.log(population.threshold / (1.0 - population.threshold)))
        mean = np.zeros(size * (1 + TRAITS) + 1)
        mean[: size * (1 + TRAITS) : 1 + TRAITS] = bias
        free, best = np.full(len(mean), population.spread), None
        if len(population.windows) == 1:
            free[-1] = 0.0
        if population.start is not None:
            mean, best = _read(Path(population.start), len(mean))
            if best is None and population.play == "best" and not population.generations:
                raise InputError(
                    f"eil.population.play is 'best', but {population.start} holds none: expected 'mean', or generations above 0."
                )
        if not population.state_dependent:
            for parameters in (mean, free, best):
                if parameters is not None:
                    parameters[:-1].reshape(size, 1 + TRAITS)[:, 1:] = 0.0
        return cls(mean=mean, std=free, best=best)

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draws policies, float64 `[count, D]`; the first is the mean itself."""
        noise = generator.standard_normal((count, len(self.mean)))
        noise[0] = 0.0
        return self.mean + noise * self.std

    def get_state(self) -> dict[str, Any]:
        """Returns plain values."""
        best = None if self.best is None else self.best.tolist()
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "best": best}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` gave."""
        self.mean, self.std = np.array(state["mean"]), np.array(state["std"])
        self.best = None if state["best"] is None else np.array(state["best"])


def _read(path: Path, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the mean and the best policy of a policy file, float64 `[size]` each; None where it has no best."""
    if not path.is_file():
        raise InputError(f"eil.population.start is {path}, but there is no such file.")
    try:
        values = json.loads(path.read_text())
        mean = np.array(values["mean"], dtype=np.float64)
        best = None if values.get("best") is None else np.array(values["best"], dtype=np.float64)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"eil.population.start is {path}, which is no policy.json of a run.") from None
    for one in (mean,) if best is None else (mean, best):
        if one.shape != (size,) or not np.isfinite(one).all():
            raise InputError(f"The policy in {path} has {one.size} parameters, expected {size} as eil.action says.")
    return mean, best
