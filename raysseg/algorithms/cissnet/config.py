"""CiSS-Net's settings, with the paper's defaults, and its RLlib configuration. [P]: the paper's word, [C]: only in the
authors' code, [R]: reconstruction.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from raysseg.configuration import Settings
from raysseg.core.config import SegmentationConfig, any_space
from raysseg.core.settings import MethodSettings, OptimiserSettings, TrainingSettings
from raysseg.data.augmentation import AugmentationSettings

Policy = Literal["none", "baseline", "p-map", "greedy", "oracle", "context"]


class NetworkOptions(Settings):
    """What the networks see and how wide they are (Sec. 2.2 and 2.3, Fig. 3)."""

    features: Literal["encoder", "pyramid"] = Field(
        "pyramid",
        description="[C] X: the last encoder map with PSPNet's pyramid of it; 'encoder': that map alone, of any architecture",
    )
    width: int = Field(512, ge=1, description="[P] channels of every layer of Base, Bias and Context Net")
    context_width: int = Field(256, ge=1, description="[P] channels of each pooled branch that encodes a context map")
    prediction_width: int = Field(
        256, ge=1, description="[P] channels of each pooled branch that encodes a p-map; [C] 64"
    )
    bins: tuple[int, ...] = Field((1, 2, 3, 6), min_length=1, description="[C] cells over height and width per branch")
    group_channels: int = Field(
        16, ge=2, description="[P] channels of a group of the normalisation; one alone has no variance in a single cell"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="[P] after the trunks of Base and Bias Net; without effect in [C]"
    )

    @model_validator(mode="after")
    def _groups_fit(self) -> NetworkOptions:
        for name in ("width", "context_width", "prediction_width"):
            if getattr(self, name) % self.group_channels:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which is not a multiple of group_channels, {self.group_channels}"
                )
        if min(self.bins) < 1:
            raise ValueError(f"bins is {list(self.bins)}, expected numbers of cells from 1 on")
        return self


class RewardOptions(Settings):
    """What a context is paid for (Eq. 4)."""

    box: tuple[int, int] = Field(
        (40, 40),
        description="[C] C_h and C_w in pixels of the input, brought to the next odd number of positions: 5 at stride 8",
    )
    correct_weight: float = Field(0.4, ge=0, description="[P] beta_1: for a context that is the truth")
    uncertain_weight: float = Field(0.2, ge=0, description="[P] beta_2: for a position left uncertain")

    @model_validator(mode="after")
    def _positive(self) -> RewardOptions:
        if min(self.box) < 1:
            raise ValueError(f"box is {list(self.box)}, expected sides in pixels from 1 on")
        return self


class LearningOptions(Settings):
    """How the three networks learn together (Eq. 5-7)."""

    base_updates: int = Field(0, ge=0, description="[R] updates of the Base Net alone, before contexts begin")
    updates: int = Field(20000, ge=1, description="[R] updates with contexts; not in the paper")
    batch_size: int = Field(
        32, ge=1, description="[P] crops per update, 2 on each of 16 GPUs; the rollouts of an update share them"
    )
    augmentation: AugmentationSettings | None = Field(
        None, description="[R] of the crops that episodes are played on; null: that of training.augmentation"
    )
    steps: int = Field(8, ge=1, description="[C] T: steps of an episode")
    gamma: float = Field(0.9, ge=0, le=1, description="[P] discount")
    return_steps: int | None = Field(
        None, ge=1, description="[C] k of Eq. 5: rewards before the value that follows; null: all up to the end"
    )
    trace: float = Field(1.0, ge=0, le=1, description="[R] lambda of GAE; 1 are the paper's returns")
    entropy_weight: float = Field(
        0.05, ge=0, le=1, description="[P] lambda_2; 0.001 is 'gated p-map', above 0.15 it did not converge"
    )
    segmentation_weight: float = Field(1.0, gt=0, description="[P] lambda_1")
    optimiser: OptimiserSettings = Field(
        OptimiserSettings(learning_rate=2e-3, momentum=0.9, weight_decay=1e-4, schedule="poly"),
        description="[P] SGD 2e-3 for the Base Net (ADE20K; Cityscapes 5e-4); momentum, decay and schedule are [R]",
    )
    context_rate: float = Field(
        0.1, gt=0, description="[P] learning rate of Bias and Context Net over that of the Base Net"
    )
    clip_ratio: float = Field(1.0, gt=0, description="[R] rho-bar of V-trace; asynchronous")
    clip_trace: float = Field(1.0, gt=0, description="[R] c-bar of V-trace; asynchronous")

    @model_validator(mode="after")
    def _possible(self) -> LearningOptions:
        if self.return_steps is not None and self.return_steps > self.steps:
            raise ValueError(f"return_steps is {self.return_steps}, but an episode has {self.steps} steps")
        if self.return_steps is not None and self.trace != 1.0:
            raise ValueError(
                f"trace is {self.trace:g} and return_steps {self.return_steps}: returns are cut by one of them; "
                "set trace to 1 or return_steps to null"
            )
        return self


class InferenceOptions(Settings):
    """How a trained variant segments."""

    steps: int = Field(2, ge=0, description="[P] t: contexts that a prediction has seen")
    scored_steps: tuple[int, ...] = Field(
        (0, 2, 4, 6), min_length=1, description="[P] t at which the variant is scored"
    )
    action: Literal["greedy", "sample"] = Field(
        "greedy", description="[R] the likelier action, or drawn as in training ([C], its monitoring)"
    )

    @model_validator(mode="after")
    def _possible(self) -> InferenceOptions:
        steps = list(self.scored_steps)
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError(f"scored_steps is {steps}, expected rising numbers from 0 on")
        if self.steps not in steps:
            raise ValueError(f"steps is {self.steps}, but scored_steps is {steps}: what is used is to be scored")
        return self


class CiSSNetOptions(Settings):
    """Context-reinforced segmentation, and what it is compared with."""

    policy: Policy = Field(
        "context",
        description="what becomes context: 'context' the Context Net's choice [P]; 'p-map' every prediction [P]; 'greedy' the most "
        "confident [R]; 'oracle' every right one [R]; 'baseline' has the Base Net alone [P], 'none' the segmenter that X is from",
    )
    greedy_share: float = Field(
        0.5, gt=0, le=1, description="[R] share of an image's positions that 'greedy' takes; used by it alone"
    )
    network: NetworkOptions = NetworkOptions()
    reward: RewardOptions = RewardOptions()
    learning: LearningOptions = LearningOptions()
    inference: InferenceOptions = InferenceOptions()

    @model_validator(mode="after")
    def _effect(self) -> CiSSNetOptions:
        if self.greedy_share != 0.5 and self.policy != "greedy":
            raise ValueError(
                f"greedy_share is {self.greedy_share:g} but policy is '{self.policy}', where it has no effect"
            )
        return self

    @property
    def stages(self) -> int:
        """Learning is one stage, so schedulers that compare stages have nothing to decide."""
        return int(self.trains)

    @property
    def total_updates(self) -> int:
        """Updates of every variant, which one schedule runs over."""
        return self.learning.base_updates + self.learning.updates

    @property
    def trains(self) -> bool:
        """Whether anything is trained on X."""
        return self.policy != "none"

    @property
    def uses_context(self) -> bool:
        """Whether there is a Bias Net."""
        return self.policy not in ("none", "baseline")

    @property
    def learns(self) -> bool:
        """Whether there is a Context Net, trained by its rewards."""
        return self.policy == "context"

    @property
    def episode_steps(self) -> int:
        """T of this variant: without contexts an episode has no step."""
        return self.learning.steps if self.uses_context else 0

    @property
    def scored_steps(self) -> tuple[int, ...]:
        """t at which this variant is scored."""
        return self.inference.scored_steps if self.uses_context else (0,)

    @property
    def inference_steps(self) -> int:
        """t of a prediction of this variant."""
        return self.inference.steps if self.uses_context else 0


class CiSSNetSettings(MethodSettings):
    """Everything that one trained variant of CiSS-Net needs.

    `training` trains the segmenter that X is from, on whole label maps (`pretrain_epochs`); its augmentation is used by
    episodes too, where `cissnet.learning.augmentation` does not give them their own.
    """

    method: Literal["cissnet"] = "cissnet"
    cissnet: CiSSNetOptions = CiSSNetOptions()

    @model_validator(mode="after")
    def _possible(self) -> CiSSNetSettings:
        options = self.cissnet
        if self.data.scribbles != "none":
            raise ValueError(
                f"data.scribbles is '{self.data.scribbles}', but CiSS-Net learns from whole maps: use 'none'"
            )
        if options.network.features == "pyramid" and self.segmenter.architecture != "PSPNet":
            raise ValueError(
                f"cissnet.network.features is 'pyramid' but segmenter.architecture is '{self.segmenter.architecture}', expected "
                "'PSPNet'; 'encoder' takes any"
            )
        if self.training.crop_place != "anywhere":
            raise ValueError(
                "training.crop_place is 'labelled', which has no effect on maps that are labelled everywhere"
            )
        if options.learning.batch_size % self.rollouts_per_update:
            raise ValueError(
                f"cissnet.learning.batch_size is {options.learning.batch_size}, which the {self.rollouts_per_update} "
                "rollouts of an update cannot share equally"
            )
        if self.engine.mode == "asynchronous" and options.learning.return_steps is not None:
            raise ValueError(
                f"cissnet.learning.return_steps is {options.learning.return_steps} but engine.mode is 'asynchronous', where "
                "V-trace cuts returns by cissnet.learning.trace alone; set return_steps to null"
            )
        for name in ("clip_ratio", "clip_trace"):
            value = getattr(options.learning, name)
            if self.engine.mode == "synchronous" and value != type(options.learning).model_fields[name].default:
                raise ValueError(
                    f"cissnet.learning.{name} is {value:g} but engine.mode is 'synchronous', where nothing is corrected"
                )
        return self

    @property
    def crops(self) -> TrainingSettings:
        """How the crops that episodes are played on are read."""
        own = self.cissnet.learning.augmentation
        return self.training if own is None else self.training.model_copy(update={"augmentation": own})

    @property
    def rollouts_per_update(self) -> int:
        """Rollouts that one update learns from, each once."""
        engine = self.engine
        if engine.mode == "synchronous":
            return max(1, engine.num_env_runners)
        if engine.rollouts_per_update != int(engine.rollouts_per_update):
            raise ValueError(
                f"engine.rollouts_per_update is {engine.rollouts_per_update:g}, but a rollout is learned from once: "
                "expected a whole number"
            )
        return int(engine.rollouts_per_update)

    @property
    def rollout_size(self) -> int:
        """Crops of one rollout."""
        return self.cissnet.learning.batch_size // self.rollouts_per_update


class CiSSNetConfig(SegmentationConfig):
    """RLlib's configuration of CiSS-Net: `CiSSNetConfig().apply(CiSSNetSettings(…), run_dir=…).build_algo()`."""

    settings: CiSSNetSettings

    def __init__(self, algo_class: type | None = None) -> None:
        if algo_class is None:
            from raysseg.algorithms.cissnet.algorithm import CiSSNet

            algo_class = CiSSNet
        super().__init__(algo_class=algo_class)
        from raysseg.algorithms.cissnet.env_runner import CiSSNetEnvRunner

        self.env_runners(env_runner_cls=CiSSNetEnvRunner)

    def apply(self, settings: MethodSettings, *, run_dir: str, store_uri: str | None = None) -> CiSSNetConfig:
        """Takes over the settings, as `SegmentationConfig.apply` does, and refuses what does not fit the data."""
        from raysseg.algorithms.cissnet.checks import check_run
        from raysseg.data.store import Store

        super().apply(settings, run_dir=run_dir, store_uri=store_uri)
        check_run(self.settings, Store.open(self.store_uri))
        return self

    def get_default_learner_class(self) -> type:
        """Returns CiSS-Net's learner."""
        from raysseg.algorithms.cissnet.learner import CiSSNetLearner

        return CiSSNetLearner

    def method_specs(self) -> dict[str, RLModuleSpec]:
        """Returns the module of the networks on X, where the variant trains any."""
        from raysseg.algorithms.cissnet.features import feature_shape
        from raysseg.algorithms.cissnet.module import CONTEXT, ContextModule
        from raysseg.data.store import Store
        from raysseg.segmenters import build_segmenter

        options = self.settings.cissnet
        if not options.trains:
            return {}
        num_classes = Store.open(self.store_uri).info.num_classes
        segmenter = build_segmenter(self.settings.segmenter.model_copy(update={"weights": "none"}), num_classes)
        channels, _ = feature_shape(segmenter, options.network.features)
        config: dict[str, Any] = {
            "network": options.network.model_dump(),
            "policy": options.policy,
            "features": channels,
            "num_classes": num_classes,
            "seed": self.settings.seed,
        }
        return {CONTEXT: RLModuleSpec(module_class=ContextModule, **any_space(), model_config=config)}
