"""EIL's settings, with the paper's defaults, and its RLlib configuration. [P]: the paper's word, [R]:
reconstruction.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from raysseg.configuration import Settings
from raysseg.core.config import SegmentationConfig, any_space
from raysseg.core.settings import MethodSettings, OptimiserSettings, ReplaySettings

Policy = Literal[
    "none", "random", "fixed", "quantile", "moving_quantile", "searcher", "population", "greedy", "oracle", "full"
]
LEARNED_GATES = ("positive",)


class OperatorSettings(Settings):
    """The searcher and the assessor: two residual networks over the state's planes (Eq. 3, 7)."""

    backbone: Literal["resnet18", "resnet34"] = Field(
        "resnet34", description="[P] ResNet34 for both; ResNet18 in Fig. 4a"
    )
    weights: str = Field(
        "imagenet",
        description="[P] ImageNet; 'none', or a file of the same backbone (first convolution and classifier unused)",
    )
    fusion: Literal["hidden", "linear", "planes"] = Field(
        "hidden", description="[R] where the action enters the assessor; 'linear' is a negative control"
    )
    hidden_units: int = Field(256, ge=1, description="[R] units of the assessor's hidden layer")
    action_gain: float = Field(
        1.0, gt=0, description="[R] factor on the centred action before the assessor's head, among 512 pooled features"
    )
    assessor_start: Literal["kaiming", "zero"] = Field(
        "kaiming",
        description="[P] Kaiming for the last layers; 'zero' starts the assessor's last layer at 0, and so q [R]",
    )
    searcher_bias: float = Field(
        0.0, description="[R] initial bias of the thresholds before the sigmoid; 0 starts at 0.5"
    )

    @model_validator(mode="after")
    def _gain_has_effect(self) -> OperatorSettings:
        if self.fusion == "planes" and self.action_gain != 1.0:
            raise ValueError("action_gain has no effect with the fusion 'planes'")
        return self


class ExplorationSettings(Settings):
    """How the operators are trained in one stage (Eq. 4-7)."""

    updates_per_stage: int | None = Field(
        None, ge=0, description="[R] updates of both operators per stage; none: one epoch over the training set"
    )
    batch_size: int = Field(8, ge=1, description="[R] transitions per update")
    rollout_batch_size: int = Field(8, ge=1, description="[R] episodes per actor and update")
    noise_std: float = Field(
        0.1, ge=0, description="[R] Gaussian noise on each threshold, decayed with the learning rate"
    )
    uniform_share: float = Field(
        0.0, ge=0, le=1, description="[R] share of actions replaced by uniform ones; 0.5 makes the assessor right"
    )
    replay: ReplaySettings = Field(ReplaySettings(), description="[R] the paper names no replay")
    kappa: float = Field(0.001, gt=0, le=1, description="[R] rate of the moving-average targets, per update")
    episode_steps: int = Field(1, ge=1, description="[R] label inferences per episode; one-step bootstrapping needs 1")
    augment: bool = Field(True, description="[R] flip and crop without rescaling, so that the window stays in pixels")
    searcher_optimiser: OptimiserSettings = Field(
        OptimiserSettings(learning_rate=1e-3, weight_decay=0.02, schedule="cosine"),
        description="[P] SGD 1e-3, 0.9, 0.02, cos",
    )
    assessor_optimiser: OptimiserSettings = Field(
        OptimiserSettings(learning_rate=1e-3, weight_decay=0.02, schedule="cosine"),
        description="[P] SGD 1e-3, 0.9, 0.02, cos",
    )


class PopulationSettings(Settings):
    """The search for a policy of a few parameters by the returns of whole rehearsed stages; all of it is reconstruction."""

    size: int = Field(8, ge=2, description="[R] policies that are drawn and played in one generation")
    elites: int = Field(3, ge=1, description="[R] of them, those that the distribution follows")
    generations: int = Field(2, ge=0, description="[R] in the first stage; 0 plays the policy of `start` as it is")
    later_generations: int = Field(
        1, ge=0, description="[R] in every later stage, which goes on from the distribution before"
    )
    rate: float = Field(0.7, gt=0, le=1, description="[R] how far mean and spread follow the elites")
    spread: float = Field(1.5, gt=0, description="[R] standard deviation at the start, in logits of a threshold")
    smallest_spread: float = Field(0.1, ge=0, description="[R] below which it does not fall")
    threshold: float = Field(0.8, gt=0, lt=1, description="[R] mean threshold at the start")
    windows: tuple[int | Literal["image"], ...] = Field(
        ("image",), min_length=1, description="[R] window sides that the policy chooses from, smallest first"
    )
    state_dependent: bool = Field(
        True,
        description="[R] thresholds depend on the image's confidence and labelled share; off: one for all images, that of an "
        "average image under `start`",
    )
    play: Literal["mean", "best"] = Field(
        "mean",
        description="[R] what infers a stage: the distribution's mean, or the best policy of its last generation",
    )
    images: int = Field(64, ge=4, description="[R] training images that a rehearsal holds the encoder's maps of")
    held_out: float = Field(0.25, gt=0, lt=1, description="[R] share of them that is only predicted")
    networks: Literal["fresh", "teacher"] = Field(
        "fresh",
        description="[R] what a rehearsal's two decoders start as: drawn anew, each its own, or both the teacher's",
    )
    updates: int = Field(100, ge=1, description="[R] decoder updates of each of the two networks in a rehearsal")
    start: str | None = Field(
        None, description="[R] a policy.json of another run, from whose mean policy the search starts"
    )

    @model_validator(mode="after")
    def _possible(self) -> PopulationSettings:
        if self.elites > self.size:
            raise ValueError(f"elites is {self.elites} but size is {self.size}: only what is drawn can be followed")
        if self.generations == self.later_generations == 0 and self.start is None:
            raise ValueError("generations and later_generations are 0 without a start: no policy would be searched for")
        for side in self.windows:
            if side != "image" and (side < 1 or side % 2 == 0):
                raise ValueError(f"windows must be odd numbers of pixels or 'image', not {side}")
        return self


class EILOptions(Settings):
    """The decision process of EIL, and every variant of its tables."""

    stages: int = Field(5, ge=0, description="[P] 5 stages: cumulative radius 21, 41, 61, 81, 101")
    policy: Policy = Field("searcher", description="who decides the thresholds; all but searcher are yardsticks")
    gate: Literal["none", "positive"] = Field(
        "positive", description="[P] Eq. 13: adopt where the assessor's value is above 0"
    )
    reward: Literal["paper", "summed_reliability", "held_out"] = Field(
        "paper",
        description="[P] Eq. 8-12; [R] 'summed_reliability': a sum over labels, 'held_out': prediction of strokes kept back, "
        "after virtual steps",
    )
    action: Literal["shared", "object_ground", "per_class", "mask"] = Field(
        "object_ground", description="[P] Table 4: action output dimension 1, 2 (best), C, binary mask"
    )
    action_semantics: Literal["class", "grow"] = Field(
        "class", description="[R] object and ground thresholds, or override and grow thresholds"
    )
    window: int | Literal["image"] | tuple[int | Literal["image"], ...] = Field(
        21,
        description="[P] side of the square window in pixels, one for all stages or one per stage; 'image': no window",
    )
    window_class_wise: bool = Field(True, description="[R] a class spreads from its own labels only")
    window_shape: Literal["square", "disc"] = Field("square", description="[R]")
    window_anchor: Literal["current", "scribbles"] = Field(
        "current", description="[R] from which map the window is measured"
    )
    otherwise: Literal["keep", "reinfer"] = Field("keep", description="[R] a pixel that is not adopted keeps its label")
    gamma: float = Field(0.9, ge=0, le=1, description="[P] Eq. 4")
    delta: float = Field(10.0, gt=0, description="[P] Eq. 9")
    distance: Literal["cosine", "l1", "l2", "inner"] = Field(
        "cosine", description="[P] 1 − cos; Fig. 4b has the others"
    )
    terminal_bootstrap: bool = Field(False, description="[R] bootstrap beyond the last stage too")
    virtual_steps: int = Field(
        1, ge=0, description="[R] segmenter steps on fast weights before the next state; 0: frozen"
    )
    virtual_scope: Literal["head", "decoder", "all"] = Field(
        "decoder", description="[R] which weights the virtual step moves"
    )
    virtual_learning_rate: float | None = Field(
        None, gt=0, description="[R] none: the segmenter's learning rate times its head multiplier"
    )
    virtual_clip_norm: float | None = Field(1.0, gt=0, description="[R] a large virtual step diverges")
    thresholds: float | tuple[float, ...] = Field(
        0.9, description="[R] of the fixed policy (fP): one, or one per action value"
    )
    quantile: float = Field(0.9, gt=0, lt=1, description="[P] p of qP and mqP, best at 0.9")
    quantile_reading: Literal["top", "bottom"] = Field(
        "top",
        description="[R] the threshold is the p-quantile ('top': adopts 1 − p) or the (1 − p)-quantile ('bottom': adopts p)",
    )
    quantile_momentum: float = Field(0.9, ge=0, lt=1, description="[R] of mqP, over stages")
    greedy_candidates: int = Field(
        32, ge=1, description="[R] threshold pairs that the greedy maximiser of the reward tries"
    )
    population: PopulationSettings = PopulationSettings()
    operators: OperatorSettings = OperatorSettings()
    exploration: ExplorationSettings = ExplorationSettings()

    @model_validator(mode="after")
    def _possible(self) -> EILOptions:
        for side in self.window if isinstance(self.window, tuple) else (self.window,):
            if side != "image" and (side < 1 or side % 2 == 0):
                raise ValueError(f"window must be an odd number of pixels or 'image', not {side}")
        if isinstance(self.window, tuple) and len(self.window) < self.stages:
            raise ValueError(f"window lists {len(self.window)} sides, but there are {self.stages} stages")
        values = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        if any(not 0 <= value <= 1 for value in values):
            raise ValueError(f"thresholds must lie in [0, 1], not {self.thresholds}")
        if self.action_semantics == "grow" and self.action != "object_ground":
            raise ValueError("action_semantics 'grow' has two thresholds, so action must be 'object_ground'")
        if self.action_semantics == "grow" and self.policy in ("quantile", "moving_quantile"):
            raise ValueError(
                f"action_semantics 'grow' has no thresholds per class, which the policy '{self.policy}' sets"
            )
        if self.policy == "population" and (
            self.action not in ("shared", "object_ground") or self.action_semantics == "grow"
        ):
            raise ValueError(
                "policy 'population' gives classes no thresholds of their own, so action must be 'shared' or 'object_ground' and "
                "action_semantics 'class'"
            )
        if self.policy != "population" and self.population != PopulationSettings():
            raise ValueError(f"population has no effect with the policy '{self.policy}'")
        if self.reward == "held_out" and self.virtual_steps == 0:
            raise ValueError("reward 'held_out' measures what virtual steps change, but virtual_steps is 0")
        if self.action == "mask" and self.policy not in ("searcher", "none", "full", "oracle"):
            raise ValueError(f"action 'mask' is decided per pixel, which the policy '{self.policy}' does not do")
        if self.action == "mask" and self.operators.fusion != "planes":
            raise ValueError("action 'mask' is a plane, so operators.fusion must be 'planes'")
        return self

    @property
    def explores(self) -> bool:
        """Whether operators are trained at all."""
        return self.policy == "searcher" or (self.policy == "random" and self.gate in LEARNED_GATES)

    @property
    def searches(self) -> bool:
        """Whether policies are searched for by rehearsed stages."""
        return self.policy == "population"

    @property
    def extends(self) -> bool:
        """Whether label maps change from stage to stage."""
        return self.policy not in ("none", "full")

    def window_of(self, stage: int) -> int | None:
        """Returns the window's side at a stage 1…T in pixels; None is the whole image."""
        side = self.window[stage - 1] if isinstance(self.window, tuple) else self.window
        return None if side == "image" else side

    def radius_of(self, stage: int) -> int | None:
        """Returns the side that the windows up to a stage reach together (21, 41, 61, …); None is the whole image."""
        sides = [self.window_of(number) for number in range(1, stage + 1)]
        reach = 0
        for side in sides:
            if side is None:
                return None
            reach = side if reach == 0 else reach + side - 1
        return reach

    def action_size(self, num_classes: int) -> int:
        """Returns the number of values of one action; a mask has one per feature cell and is not counted here."""
        return {"shared": 1, "object_ground": 2, "per_class": num_classes, "mask": 0}[self.action]


class EILSettings(MethodSettings):
    """Everything that one trained variant of EIL needs."""

    method: Literal["eil"] = "eil"
    eil: EILOptions = EILOptions()

    @property
    def refines(self) -> bool:
        """Every policy's stages train the segmenter on its label maps."""
        return True

    @property
    def infers_labels(self) -> bool:
        """Every policy but the two whose label maps stay as they are."""
        return self.eil.extends

    @model_validator(mode="after")
    def _scribbles_exist(self) -> EILSettings:
        if self.data.scribbles == "none" and self.eil.policy != "full":
            raise ValueError("data.scribbles is 'none', but EIL starts from scribbles: use 'given' or 'generate'")
        return self


class EILConfig(SegmentationConfig):
    """RLlib's configuration of EIL: `EILConfig().apply(EILSettings(…), run_dir=…).build_algo()`."""

    settings: EILSettings

    def __init__(self, algo_class: type | None = None) -> None:
        if algo_class is None:
            from raysseg.algorithms.eil.algorithm import EIL

            algo_class = EIL
        super().__init__(algo_class=algo_class)
        from raysseg.algorithms.eil.env_runner import EILEnvRunner

        self.env_runners(env_runner_cls=EILEnvRunner)

    def get_default_learner_class(self) -> type:
        """Returns EIL's learner."""
        from raysseg.algorithms.eil.learner import EILLearner

        return EILLearner

    def method_specs(self) -> dict[str, RLModuleSpec]:
        """Returns the operators' module where the variant trains them."""
        from raysseg.algorithms.eil.module import OPERATORS, OperatorsModule
        from raysseg.data.store import Store
        from raysseg.segmenters import feature_channels

        if not self.settings.eil.explores:
            return {}
        num_classes = Store.open(self.store_uri).info.num_classes
        return {
            OPERATORS: RLModuleSpec(
                module_class=OperatorsModule,
                **any_space(),
                model_config={
                    "eil": self.settings.eil.model_dump(),
                    "num_classes": num_classes,
                    "feature_channels": feature_channels(self.settings.segmenter, num_classes),
                    "seed": self.settings.seed,
                },
            )
        }
