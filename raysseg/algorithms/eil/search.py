"""The search for a stage's policy: actors rehearse the stage with drawn policies, the distribution follows the best ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raysseg.algorithms.eil.policy import POLICY_FILE, Policy, PolicyDistribution
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.seeding import draw_order, draw_seeds, generator
from raysseg.functional.policy_search import follow_elites
from raysseg.functional.statistics import correlation

if TYPE_CHECKING:
    from raysseg.algorithms.eil.algorithm import EIL


class PolicySearch:
    """What a run knows of good policies. Only parameters and returns travel; each actor holds the images' encoder maps.

    Args:
        algorithm: the run.

    Source: reconstruction.
    """

    def __init__(self, algorithm: EIL) -> None:
        self._algorithm = algorithm
        self._options = algorithm.settings.eil
        self.distribution = PolicyDistribution.of(self._options)
        self.centre: list[list[float]] | None = None

    def generations(self, stage: int) -> int:
        """Returns the generations of a stage 1…T."""
        population = self._options.population
        return population.generations if stage == 1 else population.later_generations

    def prepare(self, stage: int) -> None:
        """Measures the mean and spread of the images' traits, which policies see in units of that spread."""
        (traits,) = self._algorithm.map_runners("rehearsed_traits", [{"context": self._context(stage)}])
        self.centre = [traits.mean(0).tolist(), np.maximum(traits.std(0), 1e-3).tolist()]

    def generation(self, stage: int, number: int) -> dict[str, Any]:
        """Draws, rehearses and follows; returns the numbers of one generation.

        Args:
            stage: t + 1 in 1…T.
            number: of the generation in this stage, from 0.
        """
        assert self.centre is not None
        population, seed, own = self._options.population, self._algorithm.settings.seed, self.distribution
        drawn = own.draw(generator(seed, "population", stage, number), population.size)
        # One seed for all: policies are told apart by their labels, and not by the order that these are learned in.
        shared = int(draw_seeds(seed, "rehearsal", stage, number, count=1)[0])
        context = {**self._context(stage), "seed": shared, "fold": number, "centre": self.centre}
        outcomes = self._algorithm.map_runners("rehearse", [{"parameters": one, "context": context} for one in drawn])
        returns = np.array([outcome.overlap for outcome in outcomes])
        own.best = drawn[returns.argmax()]
        moved = follow_elites(
            torch.tensor(drawn),
            torch.tensor(returns),
            torch.tensor(own.mean),
            torch.tensor(own.std),
            elites=population.elites,
            rate=population.rate,
            smallest=population.smallest_spread,
        )
        own.mean, spread = (part.numpy() for part in moved)
        own.std = np.where(own.std > 0, spread, 0.0)
        mious = [outcome.miou for outcome in outcomes]
        numbers: dict[str, Any] = {
            "reward": float(returns.mean()),
            "reward_of_mean_policy": float(returns[0]),
            "reward_best": float(returns.max()),
            "returns": returns.tolist(),
            "agreements": [outcome.agreement for outcome in outcomes],
            "overlaps_with_strokes": [outcome.on_strokes for outcome in outcomes],
            "rehearsed_shares": [outcome.labelled_share for outcome in outcomes],
            "policy_mean": own.mean.tolist(),
            "policy_std": own.std.tolist(),
            "threshold_mean": self._thresholds(),
        }
        if all(miou is not None for miou in mious):
            known = torch.tensor([float(miou or 0.0) for miou in mious])
            found = float(correlation(torch.tensor(returns), known))
            numbers |= {"rehearsed_mious": known.tolist(), "corr_return_miou": None if np.isnan(found) else found}
        return numbers

    def _thresholds(self) -> list[float]:
        """The mean policy's thresholds for an average image."""
        return Policy.of(self.played(), self._options).thresholds(torch.zeros(1, 2))[0].tolist()

    def played(self) -> np.ndarray:
        """Returns the parameters of the policy that infers label maps `[D]`."""
        own = self.distribution
        return own.best if self._options.population.play == "best" and own.best is not None else own.mean

    def order(self) -> dict[str, Any]:
        """Returns what an actor needs to play it."""
        return {"parameters": self.played(), "centre": self.centre}

    def _context(self, stage: int) -> dict[str, Any]:
        algorithm = self._algorithm
        count = min(self._options.population.images, len(algorithm.train_keys))
        return {
            "rows": np.sort(draw_order(algorithm.settings.seed, "rehearsed", count=len(algorithm.train_keys))[:count]),
            "stage": stage,
            "label_version": algorithm.label_version,
            "segmenter_version": algorithm.segmenter_version,
            "truth": algorithm.has_truth,
        }

    def export(self, folder: Path) -> None:
        """Writes the distribution into the folder of a run, for `population.start`."""
        options = self._options
        values = {
            **self.distribution.get_state(),
            "windows": list(options.population.windows),
            "action": options.action,
        }
        write_atomically(folder / POLICY_FILE, json.dumps(values, indent=1))

    def get_state(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint."""
        return {"distribution": self.distribution.get_state(), "centre": self.centre}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` gave."""
        self.distribution.set_state(state["distribution"])
        self.centre = state["centre"]
