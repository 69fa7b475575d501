"""RALIS' settings, with the paper's defaults, and its RLlib configuration. [P]: the paper's word, [C]: only in the authors'
code, [R]: reconstruction.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from raysseg.configuration import Settings
from raysseg.core.config import SegmentationConfig, any_space
from raysseg.core.settings import MethodSettings, OptimiserSettings, ReplaySettings
from raysseg.data.augmentation import AugmentationSettings
from raysseg.segmenters.settings import SegmenterSettings

UNVARIED = AugmentationSettings(scale=(1.0, 1.0), flip=0.0, rotation=0.0, crop=None)
Policy = Literal["none", "uniform", "entropy", "bald", "margin", "coreset", "query", "full"]
Pooling = Literal["min", "mean", "max"]
Normalisation = Literal["batch", "layer"]


class SetsOptions(Settings):
    """How the training split is cut into the paper's sets, each image in one of them."""

    state: int = Field(10, ge=1, description="[P] |D_S|: images whose regions are the state")
    play: int = Field(100, ge=2, description="[P] |D_T|: images on which the labelling game is played (CamVid)")
    start: int = Field(
        20,
        ge=1,
        description="[R] of D_T: images whose labels train the segmenter that every played episode starts with",
    )
    reward: int = Field(80, ge=1, description="[R] |D_R|: images on which the reward is measured; [C] CamVid's val set")

    @model_validator(mode="after")
    def _possible(self) -> SetsOptions:
        if self.start >= self.play:
            raise ValueError(f"start is {self.start} but play is {self.play}: D_T keeps at least one image to play on")
        return self


class RegionOptions(Settings):
    """The grid of regions and what is known of each (Sec. 3.2, 3.3)."""

    rows: int = Field(4, ge=1, description="[C] regions over the height; CamVid 4, Cityscapes 8")
    columns: int = Field(6, ge=1, description="[C] regions over the width; CamVid 6, Cityscapes 16")
    entropy_poolings: tuple[Pooling, ...] = Field(
        ("min", "mean", "max"), min_length=1, description="[P] of the entropy map; Table E.1 has max alone"
    )
    entropy_cells: int = Field(8, ge=1, description="[C] cells over a region's height and width after the pooling")
    divergences: bool = Field(True, description="[P] whether an action carries the two histograms of KL divergences")
    divergence_bins: int = Field(32, ge=2, description="[C] bins of each histogram")
    divergence_limit: float = Field(
        16.0, gt=0, description="[R] upper edge of the last bin in nats; the edges are fixed, those of [C] move"
    )
    smoothing: float = Field(1e-7, gt=0, lt=1, description="[C] share of a class that does not occur")

    @model_validator(mode="after")
    def _no_pooling_twice(self) -> RegionOptions:
        if len(set(self.entropy_poolings)) < len(self.entropy_poolings):
            raise ValueError(f"entropy_poolings lists one twice: {list(self.entropy_poolings)}")
        return self

    @property
    def count(self) -> int:
        """Regions of one image."""
        return self.rows * self.columns

    def feature_groups(self, num_classes: int) -> tuple[int, ...]:
        """How many consecutive numbers of a region say the same: each class share alone, the cells of each pooled entropy."""
        return (1,) * num_classes + (self.entropy_cells**2,) * len(self.entropy_poolings)

    def state_features(self, num_classes: int) -> int:
        """Numbers that describe a region of D_S: class shares and pooled entropies."""
        return num_classes + len(self.entropy_poolings) * self.entropy_cells**2

    def action_features(self, num_classes: int) -> int:
        """Numbers that describe a candidate: those of a state's region and both histograms."""
        return self.state_features(num_classes) + (2 * self.divergence_bins if self.divergences else 0)


class SegmenterStepOptions(Settings):
    """How the segmenter is trained within an episode, on the newest regions of every step (Sec. 3.1)."""

    scope: Literal["all", "decoder"] = Field(
        "all", description="[P] all of the segmenter; [R] its decoder alone, on encoder maps that are computed once"
    )
    passes: int = Field(1, ge=1, description="[P] passes over the newest regions")
    batch_size: int = Field(32, ge=1, description="[C] regions per update")
    optimiser: OptimiserSettings = Field(
        OptimiserSettings(learning_rate=1e-3, momentum=0.95, weight_decay=1e-4, schedule="constant", clip_norm=4.0),
        description="[C] SGD 1e-3, 0.95, 1e-4, largest gradient norm 4",
    )
    head_multiplier: float = Field(1.0, gt=0, description="[C] one learning rate for all layers")
    class_balance_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="[P] 0: all labelled pixels weigh the same; [R] class weights are (share of the class in D_R)^-power, mean 1, "
        "and do some of the work that the choice of regions is paid for",
    )
    rehearsal: int = Field(
        0,
        ge=0,
        description="[R] images that join every minibatch, drawn from those whose labels are known before the episode (D_T's "
        "start part while playing, D_T on D_V) and those labelled in it so far, so that the reward is what regions add and not "
        "what a pass over them forgets; [P] none",
    )
    pass_size: int | None = Field(
        None,
        ge=1,
        description="[R] images of a minibatch that pass together, with their own statistics of batch normalisation; for scope "
        "'decoder'; null: all of one size",
    )
    augmentation: AugmentationSettings = Field(
        AugmentationSettings(scale=(1.0, 1.0), flip=0.5, rotation=0.0, crop=None),
        description="[R] flips; [C] crops of 224 around the region as well",
    )

    @model_validator(mode="after")
    def _effect(self) -> SegmenterStepOptions:
        if self.pass_size is not None and self.scope != "decoder":
            raise ValueError(f"pass_size is {self.pass_size} but scope is '{self.scope}', where it has no effect")
        return self


class LearningOptions(Settings):
    """How the query network learns (Sec. 3.4)."""

    episodes: int = Field(100, ge=1, description="[C] episodes played on D_T; Cityscapes 50")
    budget: int = Field(480, ge=1, description="[C] regions that one played episode labels; Cityscapes 3840")
    pool_size: int = Field(20, ge=1, description="[C] N in played episodes")
    updates_per_step: float = Field(1.0, gt=0, description="[C] updates of the query network per step of an episode")
    batch_size: int = Field(16, ge=2, description="[C] transitions per update")
    gamma: float = Field(0.999, ge=0, le=1, description="[C] discount")
    return_steps: int = Field(
        1,
        ge=1,
        description="[P] rewards summed before the value that follows; [R] with more, what a label does later counts",
    )
    reward_baseline: Literal["none", "step"] = Field(
        "none",
        description="[P] none; [R] 'step': rewards count from their mean over the episodes in replay at the same step, which "
        "changes no order of values: that early steps pay more than late ones, whatever is chosen, need not be learned",
    )
    double_q: Literal["standard", "paper"] = Field(
        "standard",
        description="[C] chosen by the query network, valued by the target; [P] the text says the reverse (Eq. 3)",
    )
    loss: Literal["squared", "huber"] = Field("squared", description="[P] Eq. 2; [C] has Huber")
    target: Literal["hard", "soft"] = Field("hard", description="[C] copies of the query network")
    target_interval: int = Field(5, ge=1, description="[C] updates between two copies; used by 'hard'")
    target_rate: float = Field(0.005, gt=0, le=1, description="[R] share per update; used by 'soft'")
    normalisation: Normalisation = Field(
        "batch",
        description="[C] of the query network, by the statistics of a minibatch, or where it scores by their running means; "
        "[R] 'layer': of each region by its own. A whole state is always normalised by its own [R]",
    )
    epsilon_start: float = Field(0.9, ge=0, le=1, description="[C]")
    epsilon_end: float = Field(0.05, ge=0, le=1, description="[C]")
    epsilon_decay: float = Field(
        10.0, gt=0, description="[C] steps after which exploration has fallen by 1/e, over all episodes"
    )
    epsilon_coin: Literal["step", "region"] = Field("step", description="[C] one coin for all pools of a step")
    exploration: Literal["uniform", "direction"] = Field(
        "uniform",
        description="[C] explored regions are drawn uniformly; [R] 'direction': all explored steps of an episode follow one random "
        "direction of class shares and entropies, which rewards that all pools share can tell apart",
    )
    reward_scale: float = Field(100.0, gt=0, description="[C] rewards in points of mIoU")
    optimiser: OptimiserSettings = Field(
        OptimiserSettings(learning_rate=1e-3, momentum=0.95, weight_decay=1e-3, schedule="cosine"),
        description="[C] SGD 1e-3, 0.95, 1e-3; [R] the schedule, over all updates: that of [C] ends after 5 episodes",
    )
    replay: ReplaySettings = Field(
        ReplaySettings(capacity=600),
        description="[C] 600 regions; Cityscapes 3200, less than one of the episodes that arrive whole here",
    )

    @model_validator(mode="after")
    def _possible(self) -> LearningOptions:
        if self.exploration == "direction" and self.epsilon_coin != "step":
            raise ValueError(
                "exploration 'direction' moves all pools of a step together, so epsilon_coin must be 'step'"
            )
        return self


class RALISOptions(Settings):
    """The labelling game of RALIS, and every baseline of its tables."""

    policy: Policy = Field("query", description="who chooses one region of every pool; all but query are baselines")
    sets: SetsOptions = SetsOptions()
    regions: RegionOptions = RegionOptions()
    start_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="[R] updates of the segmenter that played episodes start with, as a share of those that theta_0 then gets; "
        "[P] one that has seen no image of the dataset, so that labels have much to add",
    )
    per_step: int = Field(24, ge=1, description="[P] K: regions labelled per step; Cityscapes 256")
    pool_size: int = Field(10, ge=1, description="[C] N when D_V is labelled; Cityscapes 100")
    budgets: tuple[int, ...] = Field(
        (480, 960), min_length=1, description="[C] regions of D_V after which the segmenter is trained and scored"
    )
    dropout_passes: int = Field(20, ge=2, description="[C] passes with dropout of the policy 'bald'")
    dropout: float = Field(
        0.5, gt=0, lt=1, description="[C] before the classifier for the policy 'bald', in training too [R]"
    )
    episode: SegmenterStepOptions = SegmenterStepOptions()
    learning: LearningOptions = LearningOptions()

    @model_validator(mode="after")
    def _possible(self) -> RALISOptions:
        if any(later <= earlier for earlier, later in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ValueError(f"budgets must rise, not {list(self.budgets)}")
        for name, budget in (("learning.budget", self.learning.budget), ("the largest of budgets", self.budgets[-1])):
            if budget % self.per_step:
                raise ValueError(f"{name} is {budget}, which is not a multiple of per_step, {self.per_step}")
        played = (self.sets.play - self.sets.start) * self.regions.count
        if self.learning.budget > played:
            raise ValueError(
                f"learning.budget is {self.learning.budget}, but the {self.sets.play - self.sets.start} images of D_T "
                f"that are played on have {played} regions"
            )
        if self.episode.rehearsal > self.sets.start:
            raise ValueError(
                f"episode.rehearsal is {self.episode.rehearsal}, but sets.start has {self.sets.start} images"
            )
        if self.learning.replay.shards:
            raise ValueError("learning.replay.shards has no effect: states are shared by transitions in one process")
        if self.episode.scope == "decoder" and self.episode.augmentation != UNVARIED:
            raise ValueError("episode.scope 'decoder' computes encoder maps once, so episode.augmentation must be off")
        return self

    @property
    def learns(self) -> bool:
        """Whether a query network is trained at all."""
        return self.policy == "query"

    def network(self, num_classes: int) -> dict[str, Any]:
        """Returns the arguments of the query network."""
        regions = self.regions
        state, action = regions.state_features(num_classes), regions.action_features(num_classes)
        return {
            "state_size": self.sets.state * regions.count,
            "state_features": state,
            "action_features": action,
            "histograms": action - state,
            "normalisation": self.learning.normalisation,
        }

    @property
    def steps_per_episode(self) -> int:
        """Steps of one played episode."""
        return self.learning.budget // self.per_step

    @property
    def labels(self) -> bool:
        """Whether regions of D_V are labelled."""
        return self.policy not in ("none", "full")


class RALISSettings(MethodSettings):
    """Everything that one trained variant of RALIS needs.

    `training` trains the segmenter on whole label maps: `pretrain_epochs` on D_T (theta_0; before that a share of as many
    updates on its start part, for played episodes), `stage_epochs` after each budget, on D_T and the labelled regions of D_V.
    """

    method: Literal["ralis"] = "ralis"
    ralis: RALISOptions = RALISOptions()

    @model_validator(mode="after")
    def _no_scribbles(self) -> RALISSettings:
        if self.data.scribbles != "none":
            raise ValueError(f"data.scribbles is '{self.data.scribbles}', but RALIS labels regions: use 'none'")
        return self

    @model_validator(mode="after")
    def _replay_holds_an_update(self) -> RALISSettings:
        learning, engine = self.ralis.learning, self.engine
        price = engine.rollouts_per_update if engine.mode == "asynchronous" else max(1, engine.num_env_runners)
        needed = math.ceil(price) * learning.budget
        if learning.replay.capacity < needed:
            raise ValueError(
                f"ralis.learning.replay.capacity is {learning.replay.capacity}, but {math.ceil(price)} × learning.budget = "
                f"{needed} transitions arrive between two updates, of which the first would be lost before any is learned from"
            )
        return self

    @property
    def own_segmenter(self) -> SegmenterSettings:
        """The segmenter's settings as this variant uses them: for 'bald' with its dropout, in training too."""
        dropout = {"dropout": self.ralis.dropout} if self.ralis.policy == "bald" else {}
        return self.segmenter.model_copy(update=dropout)


class RALISConfig(SegmentationConfig):
    """RLlib's configuration of RALIS: `RALISConfig().apply(RALISSettings(…), run_dir=…).build_algo()`."""

    settings: RALISSettings

    def __init__(self, algo_class: type | None = None) -> None:
        if algo_class is None:
            from raysseg.algorithms.ralis.algorithm import RALIS

            algo_class = RALIS
        super().__init__(algo_class=algo_class)
        from raysseg.algorithms.ralis.env_runner import RALISEnvRunner

        self.env_runners(env_runner_cls=RALISEnvRunner)

    def get_default_learner_class(self) -> type:
        """Returns RALIS' learner."""
        from raysseg.algorithms.ralis.learner import RALISLearner

        return RALISLearner

    def segmenter_spec(self) -> RLModuleSpec:
        """Returns the specification of the segmenter's module, with the variant's dropout."""
        spec = super().segmenter_spec()
        spec.model_config["segmenter"] = self.settings.own_segmenter.model_dump()
        return spec

    def method_specs(self) -> dict[str, RLModuleSpec]:
        """Returns the module of the starting segmenters, and the query network's where the variant trains one."""
        from raysseg.algorithms.ralis.module import QUERY, START, QueryModule, StartModule
        from raysseg.data.store import Store

        settings = self.settings
        num_classes = Store.open(self.store_uri).info.num_classes
        specs = {
            START: RLModuleSpec(
                module_class=StartModule,
                **any_space(),
                model_config={
                    "segmenter": settings.own_segmenter.model_dump(),
                    "num_classes": num_classes,
                    "seed": settings.seed,
                    "pretrained": settings.training.pretrained,
                },
            )
        }
        if settings.ralis.learns:
            specs[QUERY] = RLModuleSpec(
                module_class=QueryModule,
                **any_space(),
                model_config={"network": settings.ralis.network(num_classes), "seed": settings.seed},
            )
        return specs
