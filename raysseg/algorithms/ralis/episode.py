"""One labelling episode: a segmenter, its optimiser, what has been labelled and what may be asked for next (Sec. 3.1).

    reset ─▶ pools ─▶ observe ─▶ (a policy chooses) ─▶ label ─┬─ oracle ─▶ one training pass ─▶ mean IoU on D_R ─▶ reward
               ▲                                              │
               └──────────────────────────────────────────────┘

Everything is a pure function of the seed, the segmenter that it starts with and the choices.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import torch

from raysseg.algorithms.ralis.config import RALISSettings
from raysseg.algorithms.ralis.maps import EncoderMaps, FreshMaps, KeptMaps
from raysseg.algorithms.ralis.pools import Pools, check_budget, check_grid, draw_pools
from raysseg.algorithms.ralis.rewards import measure_miou, miou_gain
from raysseg.algorithms.ralis.state import LabelledRegions, Observation, RegionDescriber, Wanted
from raysseg.algorithms.ralis.training import KnownLabels, RegionTrainer, region_labels
from raysseg.core.seeding import generator
from raysseg.core.workspace import Workspace
from raysseg.data.batches import GROUND_TRUTH
from raysseg.functional.class_balance import class_weights
from raysseg.functional.regions import label_shares
from raysseg.segmenters import Segmenter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Game:
    """What an episode is played for.

    Args:
        rows: images whose regions may be labelled (D_T's play part, D_V), int64 `[M]`.
        state: D_S, int64 `[|D_S|]`.
        reward: D_R, int64 `[|D_R|]`.
        pool_size: N.
        budget: regions to label, a multiple of K.
        seed: of everything that is drawn.
        name: the setting that holds the budget.
        known: images whose labels are known before the episode, int64 `[M]`: rehearsed, and covered for the core-set.
    """

    rows: np.ndarray
    state: np.ndarray
    reward: np.ndarray
    pool_size: int
    budget: int
    seed: int
    name: str = "budget"
    known: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What one step of an episode gave.

    Args:
        number: of the step, from 0.
        rows: images of the labelled regions, int64 `[K]`.
        regions: their numbers therein, int64 `[K]`.
        miou: on D_R after the training pass, in [0, 1].
        reward: its change, times `reward_scale`.
        loss: of the training pass.
        class_pixels: labelled pixels of every class, int64 `[C]`.
        terminated: whether the budget is spent.
    """

    number: int
    rows: np.ndarray
    regions: np.ndarray
    miou: float
    reward: float
    loss: float
    class_pixels: np.ndarray
    terminated: bool


class LabellingEpisode:
    """Plays labelling on the training split, over and over.

    Args:
        workspace: the data on its device.
        settings: the variant's.
        segmenter: what the episode trains; it has the architecture of what episodes start with, and is this episode's own.

    Raises:
        InputError: the grid does not divide an image of the training split.

    Source: RALIS, Sec. 3.
    """

    def __init__(self, workspace: Workspace, settings: RALISSettings, segmenter: Segmenter) -> None:
        self.settings = settings
        self.options = settings.ralis
        self.segmenter = segmenter
        self._data, self._autocast = workspace.train, workspace.autocast
        regions, engine = self.options.regions, settings.engine
        keys = self._data.keys
        check_grid(keys, [workspace.store.size(key) for key in keys], regions.rows, regions.columns)
        self._kept: KeptMaps | None = None
        self.maps: EncoderMaps = FreshMaps(self._data, engine.inference_batch_size, self._autocast)
        if self.options.episode.scope == "decoder":
            self.maps = self._kept = KeptMaps(self._data, engine.inference_batch_size, self._autocast, engine.cache_mib)
        self._describer = RegionDescriber(self.options, workspace.num_classes, self._autocast)
        self._trainer = RegionTrainer(self._data, regions, self.options.episode, self.maps, self._autocast)
        self._num_classes = workspace.num_classes
        self.game: Game | None = None
        self._weights: tuple[np.ndarray, torch.Tensor] | None = None

    @property
    def steps(self) -> int:
        """Steps of the episode."""
        assert self.game is not None
        return self.game.budget // self.options.per_step

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.step >= self.steps

    @property
    def labelled(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and numbers of the regions labelled so far, int64 `[L]` each, in their order."""
        return self._rows.copy(), self._regions.copy()

    def reset(self, start: Segmenter, game: Game) -> None:
        """Begins anew with a segmenter's weights and no label.

        Args:
            start: theta of played episodes, or theta_0; it is left as it is.
            game: what is played.

        Raises:
            InputError: the budget is larger than the pool, or no multiple of K.
        """
        self._begin(start, game)
        self.miou = self._measure()
        self._draw()

    def _begin(self, start: Segmenter, game: Game) -> None:
        check_budget(game.name, game.budget, len(game.rows), self.options.regions.count)
        self.game = game
        self.segmenter.load_state_dict(start.state_dict())
        if self._kept is not None:
            self._kept.follow(self.segmenter)
        self._trainer.begin(self.segmenter, self._class_weights(game))
        self.step = 0
        self._unlabelled: np.ndarray = np.ones((len(game.rows), self.options.regions.count), dtype=bool)
        self._place = {int(row): place for place, row in enumerate(game.rows)}
        self._rows: np.ndarray = np.zeros(0, dtype=np.int64)
        self._regions: np.ndarray = np.zeros(0, dtype=np.int64)
        shares = torch.zeros(0, self._num_classes, device=self._data.device)
        self._known = LabelledRegions(shares=shares)
        self._observed: Observation | None = None

    def _class_weights(self, game: Game) -> torch.Tensor | None:
        """Returns the weights of the classes in the training pass, by their pixels in D_R; None weighs all alike."""
        power = self.options.episode.class_balance_power
        if power == 0.0:
            return None
        if self._weights is None or not np.array_equal(self._weights[0], game.reward):
            counts = torch.zeros(256, dtype=torch.int64, device=self._data.device)
            for part in torch.as_tensor(game.reward).split(64):
                counts += torch.bincount(self._data.labels(part, GROUND_TRUTH).flatten(), minlength=256)
            self._weights = (game.reward, class_weights(counts[: self._num_classes], power))
        return self._weights[1]

    def _measure(self) -> float:
        assert self.game is not None
        return measure_miou(self.segmenter, self.maps, self._data, self.game.reward, autocast=self._autocast)

    def _draw(self) -> None:
        """Draws the pools of the next step, from the episode's seed and the step alone."""
        assert self.game is not None
        self.pools: Pools | None = None
        if not self.over:
            self.pools = draw_pools(
                self._unlabelled,
                self.game.rows,
                self.options.per_step,
                self.game.pool_size,
                generator(self.game.seed, "pools", self.step),
            )

    @property
    def step_seed(self) -> int:
        """Seed of the choice at this step."""
        assert self.game is not None
        return int(generator(self.game.seed, "choice", self.step).integers(2**62))

    def observe(self, wanted: Wanted) -> Observation:
        """Returns what is wanted of D_S and of the candidates.

        Args:
            wanted: what the policy looks at.
        """
        assert self.game is not None
        assert self.pools is not None
        self._observed = self._describer.observe(
            self.segmenter,
            self.pools,
            wanted,
            maps=self.maps,
            state_rows=self.game.state,
            known_rows=self.game.known,
            labelled=self._known,
            seed=self.step_seed,
        )
        return self._observed

    def label(self, chosen: np.ndarray) -> Step:
        """Asks the oracle for one region of every pool, trains on these and measures what it was worth.

        Args:
            chosen: the position within each pool, int64 `[K]` in 0…N−1.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        assert self.pools is not None
        assert self.game is not None
        places = np.arange(self.options.per_step)
        rows, regions = self.pools.rows[places, chosen], self.pools.regions[places, chosen]
        known = KnownLabels.of(self.game.known, self._rows, self._regions, self.options.regions.count)
        counts = self._take(rows, regions, chosen)
        loss = self._trainer.train(
            rows,
            regions,
            seed=int(generator(self.game.seed, "train", self.step).integers(2**62)),
            progress=self.step / self.steps,
            known=known,
        )
        before, self.miou = self.miou, self._measure()
        self.step += 1
        self._draw()
        return Step(
            number=self.step - 1,
            rows=rows,
            regions=regions,
            miou=self.miou,
            reward=miou_gain(before, self.miou, self.options.learning.reward_scale),
            loss=loss,
            class_pixels=counts,
            terminated=self.over,
        )

    def _take(self, rows: np.ndarray, regions: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Moves regions from U to L, with what later steps need to know of them; returns their class pixels `[C]`."""
        self._unlabelled[[self._place[int(row)] for row in rows], regions] = False
        self._rows, self._regions = np.concatenate([self._rows, rows]), np.concatenate([self._regions, regions])
        shares = torch.empty(len(rows), self._num_classes, device=self._data.device)
        counts = torch.zeros(256, dtype=torch.int64, device=self._data.device)
        for places, labels in region_labels(self._data, rows, regions, self.options.regions):
            shares[torch.as_tensor(places)] = label_shares(labels, self._num_classes, self.options.regions.smoothing)
            counts += torch.bincount(labels.flatten(), minlength=256)
        features = self._known.features
        if self._observed is not None and self._observed.points is not None:
            own = self._observed.points[torch.arange(len(chosen)), torch.as_tensor(chosen)]
            features = own if features is None else torch.cat([features, own])
        self._known = LabelledRegions(shares=torch.cat([self._known.shares, shares]), features=features)
        self._observed = None
        return counts[: self._num_classes].cpu().numpy()

    # ---- going on elsewhere ------------------------------------------------------------------------------------------

    def get_state(self) -> bytes:
        """Returns where the episode stands: labelled regions, segmenter and optimiser; another process can go on."""
        state: dict[str, Any] = {
            "step": self.step,
            "rows": torch.as_tensor(self._rows),
            "regions": torch.as_tensor(self._regions),
            "shares": self._known.shares,
            "features": self._known.features,
            "miou": self.miou,
            "training": self._trainer.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def set_state(self, start: Segmenter, game: Game, state: bytes) -> None:
        """Goes on where `get_state` was called.

        Args:
            start: what that episode started with.
            game: that episode's.
            state: from `get_state`.
        """
        self._begin(start, game)
        values = torch.load(io.BytesIO(state), map_location=self._data.device, weights_only=True)
        self._trainer.set_state(values["training"])
        self._rows, self._regions = values["rows"].cpu().numpy(), values["regions"].cpu().numpy()
        self._unlabelled[[self._place[int(row)] for row in self._rows], self._regions] = False
        self._known = LabelledRegions(shares=values["shares"], features=values["features"])
        self.step, self.miou = values["step"], values["miou"]
        self._draw()
