"""The check that comes before any reinforcement learning: what each reward says of actions whose true gain is known.

States are frozen: the segmenter of a finished variant, its training images, one label version. The same actions are played with
every reward. A reward is worth training with where it follows the gain over actions of one image (within) and over images
under one action (between), where true labels earn more than none, and where what maximises it gains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.rewards import REWARDS, Transition
from raysseg.algorithms.eil.state import StateBuilder
from raysseg.algorithms.recipes import load_variant, set_options
from raysseg.configuration import load_settings
from raysseg.core.seeding import draw_order, draw_seeds
from raysseg.core.workspace import Workspace
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING, UNLABELLED
from raysseg.functional.held_out import label_gain
from raysseg.functional.random import mix, uniform
from raysseg.segmenters import Segmenter

CONSTANTS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Thresholds that every image is given, over which images are compared."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow:
    """One reward's line of the table. NaN where nothing varied.

    Args:
        reward: its key.
        within: mean over images of the correlation with the gain over drawn actions.
        within_balanced: the same with the class-balanced gain.
        between: mean over constant thresholds of the correlation with the gain over images.
        between_balanced: the same with the class-balanced gain.
        truth: mean reward of giving every window pixel its true label.
        truth_positive: share of images where that is above 0.
        greedy_gain: mean gain of each image's best action by the reward, nothing where no action pays.
        greedy_balanced: its mean class-balanced gain.
        greedy_share: share of the image's pixels that it labels anew.
    """

    reward: str
    within: float
    within_balanced: float
    between: float
    between_balanced: float
    truth: float
    truth_positive: float
    greedy_gain: float
    greedy_balanced: float
    greedy_share: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Played:
    """What N images earned and gained under A actions each: first `CONSTANTS`, then drawn ones.

    Args:
        rewards: key to float64 `[N, A]`.
        truths: key to float64 `[N]`, the reward of true labels.
        gain: float64 `[N, A]`.
        balanced: class-balanced gain, float64 `[N, A]`.
        share: of the image's pixels that become labelled, float64 `[N, A]`.
    """

    rewards: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]
    gain: np.ndarray
    balanced: np.ndarray
    share: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Played]) -> Played:
        """Puts the images of several batches together."""
        return cls(
            rewards={key: np.concatenate([part.rewards[key] for part in parts]) for key in parts[0].rewards},
            truths={key: np.concatenate([part.truths[key] for part in parts]) for key in parts[0].truths},
            gain=np.concatenate([part.gain for part in parts]),
            balanced=np.concatenate([part.balanced for part in parts]),
            share=np.concatenate([part.share for part in parts]),
        )

    def rows(self) -> list[RewardRow]:
        """Returns the table: one row per reward, and last what the true gain itself would reach as a reward."""
        found = [self._row(key, self.rewards[key], self.truths[key]) for key in self.rewards]
        return [*found, self._row("true gain", self.gain, np.full(len(self.gain), np.nan))]

    def _row(self, name: str, reward: np.ndarray, truth: np.ndarray) -> RewardRow:
        constants = slice(0, len(CONSTANTS))
        drawn = slice(len(CONSTANTS), None)
        best = reward.argmax(1)
        image = np.arange(len(best))
        pays = reward[image, best] > 0
        return RewardRow(
            reward=name,
            within=_mean_correlation(reward[:, drawn], self.gain[:, drawn]),
            within_balanced=_mean_correlation(reward[:, drawn], self.balanced[:, drawn]),
            between=_mean_correlation(reward[:, constants].T, self.gain[:, constants].T),
            between_balanced=_mean_correlation(reward[:, constants].T, self.balanced[:, constants].T),
            truth=float(truth.mean()),
            truth_positive=float((truth > 0).mean()) if np.isfinite(truth).all() else float("nan"),
            greedy_gain=float((self.gain[image, best] * pays).mean()),
            greedy_balanced=float((self.balanced[image, best] * pays).mean()),
            greedy_share=float((self.share[image, best] * pays).mean()),
        )


def _mean_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over rows of the correlation along them, of those where both vary; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        lengths = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    varies = lengths > 1e-12
    return float(((x * y).sum(1)[varies] / lengths[varies]).mean()) if varies.any() else float("nan")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenStates:
    """What a finished variant left and what its training images are seen with.

    Args:
        builder: makes states.
        segmenter: of the variant.
        rows: drawn training images, int64 `[N]`, ascending.
    """

    builder: StateBuilder
    segmenter: Segmenter
    rows: torch.Tensor

    @classmethod
    def open(cls, folder: Path, options: dict[str, Any], *, images: int) -> FrozenStates:
        """Reads a variant of EIL.

        Args:
            folder: the variant's, or that of a run's pre-training (`…/pretrain/seed-<s>`).
            options: by section (`eil`, `training`), in place of those it was trained with.
            images: how many are drawn; all where there are fewer.

        Raises:
            InputError: the folder is no variant of EIL, or an option is unknown or does not fit.
        """
        variant = load_variant(folder)
        if not isinstance(variant.settings, EILSettings):
            raise InputError(f"{folder} was trained with '{variant.settings.method}', but rewards are EIL's.")
        values = variant.settings.model_dump()
        values["eil"]["stages"] = max(1, variant.settings.eil.stages)
        for section, chosen in options.items():
            set_options(values, section, chosen)
        settings = load_settings(EILSettings, values, where="check-rewards")
        if settings.eil.action == "mask":
            raise InputError("The action 'mask' has no thresholds to draw; check rewards with another eil.action.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        workspace = Workspace(settings, variant.store().uri, str(variant.folder / "labels"), device)
        everyone = draw_order(settings.seed, "check-rewards", count=len(workspace.train.keys))
        return cls(
            builder=StateBuilder(workspace, settings),
            segmenter=variant.segmenter.to(device).eval(),
            rows=torch.tensor(np.sort(everyone[:images]), dtype=torch.int64, device=device),
        )


def with_policy(options: dict[str, Any], policy: str) -> dict[str, Any]:
    """Returns options by section in which EIL has a policy, unless they name one themselves."""
    return {**options, "eil": {"policy": policy, **options.get("eil", {})}}


@torch.inference_mode()
def play(
    builder: StateBuilder,
    segmenter: Segmenter,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    *,
    stage: int,
    version: int,
    drawn: int,
    rewards: Sequence[str],
) -> Played:
    """Plays `CONSTANTS` and some drawn thresholds on whole images.

    Args:
        builder: makes states.
        segmenter: the teacher.
        rows: int64 `[B]` of the training split, all with ground truth.
        seeds: int64 `[B]`.
        stage: t + 1 in 1…T, which says the window.
        version: label version of M.
        drawn: uniform actions per image.
        rewards: keys of `REWARDS`.
    """
    state = builder.observe(segmenter, rows, version)
    truth = builder.workspace.train.labels(rows, -1)
    size = builder.options.action_size(builder.num_classes)
    actions = [torch.full((len(rows), size), value, device=seeds.device) for value in CONSTANTS]
    actions += [uniform(mix(seeds, number), size) for number in range(drawn)]
    paid: dict[str, list[torch.Tensor]] = {key: [] for key in rewards}
    gains, balances, shares = [], [], []
    pixels = (state.labels != PADDING).flatten(1).sum(1)

    def pay(labels: torch.Tensor) -> dict[str, torch.Tensor]:
        following = builder.advance(segmenter, state, labels)
        transition = Transition(builder=builder, segmenter=segmenter, state=state, following=following, seeds=seeds)
        return {key: REWARDS[key](transition).reward for key in rewards}

    for action in actions:
        labels = builder.infer(state, action, stage)
        for key, reward in pay(labels).items():
            paid[key].append(reward)
        gain, balanced = label_gain(state.labels, labels, truth, builder.num_classes)
        gains.append(gain)
        balances.append(balanced)
        shares.append(((labels < PADDING) & (state.labels == UNLABELLED)).flatten(1).sum(1) / pixels)
    truths = pay(builder.infer_truth(state, truth, stage))
    return Played(
        rewards={key: torch.stack(values, 1).double().cpu().numpy() for key, values in paid.items()},
        truths={key: value.double().cpu().numpy() for key, value in truths.items()},
        gain=torch.stack(gains, 1).double().cpu().numpy(),
        balanced=torch.stack(balances, 1).double().cpu().numpy(),
        share=torch.stack(shares, 1).double().cpu().numpy(),
    )


def check_rewards(
    folder: Path,
    *,
    options: dict[str, Any],
    images: int,
    drawn: int,
    rewards: Sequence[str],
    show: Callable[[int, int], None],
) -> list[RewardRow]:
    """Returns the table of rewards for the segmenter of a finished variant, on training images with ground truth.

    Args:
        folder: of a finished variant of EIL, or of a run's pre-training (`…/pretrain/seed-<s>`).
        options: by section (`eil`, `training`), in place of those it was trained with.
        images: how many are drawn; all where there are fewer.
        drawn: uniform actions per image, besides `CONSTANTS`.
        rewards: keys; none: all whose needs the options meet.
        show: called with the images done and their number.

    Raises:
        InputError: the folder is no variant of EIL, an option or a reward is unknown, or an image has no ground truth.
    """
    states = FrozenStates.open(folder, with_policy(options, "fixed"), images=images)
    settings = states.builder.settings
    values = settings.model_dump()
    chosen = tuple(rewards) or tuple(key for key in REWARDS if key != "held_out" or settings.eil.virtual_steps > 0)
    for key in chosen:
        if key not in REWARDS:
            raise InputError(f"Unknown reward '{key}', expected one of {', '.join(REWARDS)}.")
        # Settings refuse a reward that cannot act under them.
        load_settings(EILSettings, {**values, "eil": {**values["eil"], "reward": key}}, where="check-rewards")
    seeds = torch.tensor(draw_seeds(settings.seed, "check-rewards", count=len(states.rows)), device=states.rows.device)
    parts, done = [], 0
    show(0, len(seeds))
    for part in torch.arange(len(seeds), device=seeds.device).split(settings.engine.inference_batch_size):
        parts.append(
            play(
                states.builder,
                states.segmenter,
                states.rows[part],
                seeds[part],
                stage=1,
                version=0,
                drawn=drawn,
                rewards=chosen,
            )
        )
        done += len(part)
        show(done, len(seeds))
    return Played.join(parts).rows()
