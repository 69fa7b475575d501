"""CiSS-Net's actor: plays episodes of context on crops, and scores whole images at several t."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from gymnasium.vector import AutoresetMode

from raysseg.algorithms.cissnet.config import CiSSNetSettings
from raysseg.algorithms.cissnet.env import CiSSNetVectorEnv
from raysseg.algorithms.cissnet.features import NewestFeatures
from raysseg.algorithms.cissnet.module import CONTEXT, ContextNetworks
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.algorithms.cissnet.steps import EpisodeMaps, episode_records
from raysseg.core.env_runner import SegmentationEnvRunner
from raysseg.core.modules import SEGMENTER
from raysseg.data.batches import GROUND_TRUTH
from raysseg.errors import NonFiniteError
from raysseg.evaluation import Counts, predict_steps


class CiSSNetEnvRunner(SegmentationEnvRunner):
    """Plays the ordered crops and scores the ordered images, each a pure function of its order and the weights."""

    settings: CiSSNetSettings
    newest_features: NewestFeatures | None = None
    """Where a learner of the same process looks for X."""

    def make_env(self) -> None:
        """Builds the environment; its networks are replaced by the module's before it is played."""
        own = (
            self.module
            if self.module is not None
            else self.config.get_multi_rl_module_spec(inference_only=True).build()
        )
        self.env: CiSSNetVectorEnv = CiSSNetVectorEnv(
            self.workspace,
            self.settings,
            num_envs=self.settings.rollout_size,
            segmenter=own[SEGMENTER].online,
            networks=own[CONTEXT].networks if CONTEXT in own else None,
            autoreset_mode=AutoresetMode.DISABLED,
        )

    @property
    def networks(self) -> ContextNetworks:
        """Base, Bias and Context Net."""
        assert self.module is not None
        return self.module[CONTEXT].networks

    @torch.inference_mode()
    def sample(self, *, records: pa.RecordBatch, context: dict[str, Any]) -> pa.RecordBatch:  # type: ignore[override]
        """Plays one episode on each of the ordered crops, side by side.

        Args:
            records: columns `row` and `seed`; the seed is that of the crop and of everything drawn in its episode.
            context: `segmenter_version`, `policy_version`, `steps` of every episode, and `probabilities`: whether those of the
                actions are wanted.

        Returns:
            The episodes in the schema of `raysseg.algorithms.cissnet.steps`.

        Raises:
            NonFiniteError: a logit is not finite; with the keys.
        """
        rows, seeds = (np.array(records.column(name)) for name in ("row", "seed"))
        env = self.env
        env.use_networks(self.segmenter.online, self.networks.eval())
        observation, _ = env.reset(options={"rows": rows.astype(np.int64), "seeds": seeds})
        if self.newest_features is not None:
            self.newest_features.keep(rows, seeds, observation["features"])
        episode = env.episode
        assert episode is not None
        own_seeds = torch.as_tensor(seeds, dtype=torch.int64, device=self.device)
        predictions, actions, probabilities = [episode.predictions], [], []
        rewards, shares, taken_right, right = [], [], [], [env.accuracy()]
        finite = torch.isfinite(episode.logits).flatten(1).all(1)
        for _ in range(context["steps"]):
            with self.workspace.autocast():
                choice = episode.choose(own_seeds)
            _, reward, _, _, info = env.step(choice.actions)
            predictions.append(episode.predictions)
            actions.append(choice.actions)
            if choice.probabilities is not None and context["probabilities"]:
                probabilities.append(choice.probabilities.half())
            rewards.append(reward)
            shares.append(info["context_share"])
            taken_right.append(info["context_right"])
            right.append(info["accuracy"])
            finite &= torch.isfinite(episode.logits).flatten(1).all(1)
        keys = [self.workspace.train.keys[row] for row in rows]
        if not bool(finite.all()):
            bad = [key for key, good in zip(keys, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(f"The logits of {', '.join(bad)} are not finite.")
        count, cells = len(rows), env.cells
        maps = EpisodeMaps(
            predictions=_host(predictions, (0, count, *cells)),
            actions=_host(actions, (0, count, *cells)).astype(bool),
            probabilities=_host(probabilities, (0,)) if probabilities else None,
        )
        columns = {
            "key": keys,
            "row": rows,
            "seed": seeds,
            "reward": list(_host(rewards, (0, count)).T),
            "context_share": list(_host(shares, (0, count)).T),
            "context_right": list(_host(taken_right, (0, count)).T),
            "accuracy": list(_host(right, (0, count)).T),
            "segmenter_version": [context["segmenter_version"]] * count,
            "policy_version": [context["policy_version"]] * count,
        }
        return episode_records(columns, maps)

    def score_steps(self, *, rows: np.ndarray, split: str) -> list[Counts]:
        """Scores whole images of a split at every t that the variant is scored at.

        Args:
            rows: int64 `[N]` rows of the split.
            split: its name.

        Returns:
            What was counted over them at every t, on the CPU.
        """
        data, settings = self.workspace.split(split), self.settings.evaluation
        steps, classes = self.settings.cissnet.scored_steps, self.workspace.num_classes
        totals: list[Counts] = []
        network = ContextSegmenter(self.segmenter.online, self.networks.eval(), self.settings.cissnet)
        for index in self.inference_batches(rows):
            images, sizes = data.images(index)
            labels = data.labels(index, GROUND_TRUTH)
            probabilities = predict_steps(
                network,
                images,
                sizes,
                steps=steps,
                labels=labels if self.settings.cissnet.policy == "oracle" else None,
                scales=settings.scales,
                flip=settings.flip,
                autocast_dtype=self.workspace.low_precision,
            )
            instances = self.scored_instances(data, index)
            counts = [
                Counts.of(one.argmax(1), labels, classes, instances=instances, sizes=sizes) for one in probabilities
            ]
            totals = [total + one for total, one in zip(totals, counts, strict=True)] if totals else counts
        return [total.cpu() for total in totals]


def _host(values: list[torch.Tensor], empty: tuple[int, ...]) -> np.ndarray:
    """Stacks tensors in front; an empty list gives an empty array of the shape."""
    return torch.stack(values).cpu().numpy() if values else np.zeros(empty, dtype=np.float32)
