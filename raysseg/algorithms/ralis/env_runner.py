"""RALIS' actor: plays whole episodes on D_T with the query network, and labels D_V step by step with any policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.ralis.config import RALISSettings
from raysseg.algorithms.ralis.env import RALISVectorEnv
from raysseg.algorithms.ralis.episode import Game, LabellingEpisode, Step
from raysseg.algorithms.ralis.module import QUERY, START, QueryNetwork
from raysseg.algorithms.ralis.policies import POLICIES, Choice, Direction, Exploration, epsilon_at
from raysseg.algorithms.ralis.sets import RegionSets
from raysseg.algorithms.ralis.state import Observation
from raysseg.algorithms.ralis.steps import step_records
from raysseg.algorithms.ralis.variant_sets import SETS_FILE
from raysseg.core.env_runner import SegmentationEnvRunner


class RALISEnvRunner(SegmentationEnvRunner):
    """Plays the ordered episodes and labels what it is ordered to, each a pure function of its order and the weights."""

    settings: RALISSettings

    def make_env(self) -> None:
        """Builds the environment with a segmenter of its own; what it starts with comes with each order."""
        self._sets: RegionSets | None = None
        self.env: RALISVectorEnv = RALISVectorEnv(
            self.workspace, self.settings, num_envs=1, autoreset_mode=AutoresetMode.DISABLED
        )

    @property
    def sets(self) -> RegionSets:
        """The run's sets, as its driver left them in its folder."""
        if self._sets is None:
            self._sets = RegionSets.load(Path(self.config.run_dir) / SETS_FILE, self.workspace.train.keys)
        return self._sets

    @property
    def query(self) -> QueryNetwork:
        """The query network."""
        assert self.module is not None
        return self.module[QUERY].query

    @property
    def episode(self) -> LabellingEpisode:
        """The episode that is played."""
        return self.env.episodes[0]

    def sample(self, *, records: pa.RecordBatch, context: dict[str, Any]) -> pa.RecordBatch:  # type: ignore[override]
        """Plays one whole episode on D_T's play part, under one query network.

        Args:
            records: one order; `seed` is that of everything drawn in the episode.
            context: `episode`, `first_step` (steps played before, on the schedule of epsilon), `segmenter_version`,
                `policy_version`.

        Returns:
            The steps in the schema of `raysseg.algorithms.ralis.steps`.

        Raises:
            NonFiniteError: a value, a loss or a reward is not finite.
        """
        assert self.module is not None
        learning, episode = self.settings.ralis.learning, self.episode
        seed = records.column("seed")[0].as_py()
        episode.reset(self.module[START].network, self.env.played(self.sets, seed))
        observations: list[Observation] = []
        choices: list[Choice] = []
        steps: list[Step] = []
        epsilons: list[float] = []
        while not episode.over:
            epsilons.append(epsilon_at(learning, context["first_step"] + len(steps)))
            observation, choice, step = self._play("query", epsilons[-1])
            observations.append(observation)
            choices.append(choice)
            steps.append(step)
        count = len(steps)
        return step_records(
            {
                "episode": [context["episode"]] * count,
                "step": [step.number for step in steps],
                "terminated": [step.terminated for step in steps],
                "reward": [step.reward for step in steps],
                "miou": [step.miou for step in steps],
                "epsilon": epsilons,
                "mean_q": [choice.mean_q for choice in choices],
                "rows": [step.rows for step in steps],
                "regions": [step.regions for step in steps],
                "chosen": [choice.chosen for choice in choices],
                "state": np.stack([_host(observation.state) for observation in observations]),
                "candidates": np.stack([_host(observation.candidates) for observation in observations]),
                "segmenter_version": [context["segmenter_version"]] * count,
                "policy_version": [context["policy_version"]] * count,
            }
        )

    def acquire(self, *, context: dict[str, Any]) -> dict[str, Any]:
        """Labels some steps of D_V with the variant's policy, from theta_0 (the segmenter's module) or from where it stopped.

        Args:
            context: `steps`, `seed` of the whole acquisition, and `state`, None or what the order before gave back.

        Returns:
            `rows` and `regions`, int64 `[steps, K]`; `reward`, `miou` and `loss` `[steps]`, of the training pass after each;
            `state`, bytes from which any actor goes on to the very same result.

        Raises:
            NonFiniteError: a value or a loss is not finite.
        """
        options, sets, episode = self.settings.ralis, self.sets, self.episode
        game = Game(
            rows=sets.pool,
            state=sets.state,
            reward=sets.reward,
            pool_size=options.pool_size,
            budget=max(options.budgets),
            seed=context["seed"],
            name="ralis.budgets",
            known=sets.labelled,
        )
        start = self.segmenter.online
        if context["state"] is None:
            episode.reset(start, game)
        else:
            episode.set_state(start, game, context["state"])
        count = min(context["steps"], episode.steps - episode.step)
        steps = [self._play(options.policy, 0.0)[2] for _ in range(count)]
        shape = (len(steps), options.per_step)
        return {
            "rows": np.array([step.rows for step in steps], dtype=np.int64).reshape(shape),
            "regions": np.array([step.regions for step in steps], dtype=np.int64).reshape(shape),
            "reward": np.array([step.reward for step in steps]),
            "miou": np.array([step.miou for step in steps]),
            "loss": np.array([step.loss for step in steps]),
            "state": episode.get_state(),
        }

    def _play(self, policy: str, epsilon: float) -> tuple[Observation, Choice, Step]:
        """Plays one step."""
        chooser, episode = POLICIES[policy], self.episode
        assert episode.game is not None
        observation = episode.observe(chooser.wanted)
        learning, direction = self.settings.ralis.learning, None
        if learning.exploration == "direction":
            groups = self.settings.ralis.regions.feature_groups(self.workspace.num_classes)
            direction = Direction.draw(groups, episode.game.seed)
        exploration = Exploration(
            seed=episode.step_seed,
            query=self.query if policy == "query" else None,
            epsilon=epsilon,
            coin=learning.epsilon_coin,
            direction=direction,
        )
        choice = chooser.choose(observation, exploration)
        return observation, choice, episode.label(choice.chosen)


def _host(values: Any) -> np.ndarray:
    return values.cpu().numpy()
