"""Settings that every method shares: how the segmenter is trained, how the engine is laid out, how results are
measured.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raysseg.configuration import Settings
from raysseg.data.augmentation import AugmentationSettings
from raysseg.data.photometric import PhotometricSettings
from raysseg.data.settings import DataSettings
from raysseg.segmenters.settings import SegmenterSettings


class OptimiserSettings(Settings):
    """One optimiser with its learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="[P] EIL trains everything with SGD")
    learning_rate: float = Field(1e-4, gt=0, description="[P] 1e-4 for the segmenter")
    momentum: float = Field(0.9, ge=0, lt=1, description="[P] 0.9; used by sgd")
    weight_decay: float = Field(5e-4, ge=0, description="[P] 5e-4 for the segmenter")
    schedule: Literal["poly", "cosine", "constant"] = Field("poly", description="[P] poly for the segmenter")
    poly_power: float = Field(0.9, gt=0, description="[R] 0.9, the usual power")
    clip_norm: float | None = Field(None, gt=0, description="[R] largest gradient norm; none in the paper")


class SelfTrainingSettings(Settings):
    """How refining learns from the teacher where a label map says nothing; with `weight` 0 it does not."""

    weight: float = Field(0.0, ge=0, description="[R] of the loss of pixels without a label; 0: they teach nothing")
    confidence: float = Field(
        0.0, ge=0, le=1, description="[R] pixels whose largest probability of the teacher is below do not count"
    )
    pixels: Literal["unlabelled", "inferred"] = Field(
        "unlabelled",
        description="[R] what learns from the teacher: pixels without a label; or those whose label was inferred, in place of it "
        "(soft labels)",
    )
    classes: Literal["all", "labelled"] = Field(
        "all",
        description="[R] what the teacher may speak of: all classes, or those of the image's label map (Eq. 2, window: the image)",
    )
    class_balanced: bool = Field(
        False, description="[R] weigh classes as the labels' loss does, by training.class_balance_power"
    )
    student_view: PhotometricSettings = Field(
        PhotometricSettings(), description="[R] how the crops that the student sees differ from the teacher's"
    )

    @model_validator(mode="after")
    def _weight_first(self) -> SelfTrainingSettings:
        for name in ("confidence", "pixels", "classes", "class_balanced", "student_view"):
            if self.weight == 0 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set but weight is 0, where it has no effect")
        return self


class TrainingSettings(Settings):
    """How the segmenter is trained on label maps (EIL Eq. 14)."""

    pretrain_epochs: int = Field(100, ge=0, description="[P] epochs on the scribbles alone")
    stage_epochs: int = Field(20, ge=0, description="[P] epochs on the label maps of one stage")
    batch_size: int = Field(8, ge=1, description="[R] images per segmenter update")
    optimiser: OptimiserSettings = Field(OptimiserSettings(), description="[P] SGD 1e-4, momentum 0.9, poly")
    head_multiplier: float = Field(10.0, gt=0, description="[R] learning rate of new layers over the backbone's")
    refine_learning_rate: float | None = Field(
        None,
        gt=0,
        description="[R] none: one schedule over pre-training and all stages; else stages restart at this value",
    )
    augmentation: AugmentationSettings = Field(
        AugmentationSettings(), description="[P] scale 0.5 to 2, flip 0.5, rotation 10 degrees, crop 512"
    )
    crop_place: Literal["anywhere", "labelled"] = Field(
        "anywhere",
        description="[P] anywhere; [R] 'labelled': a crop lies around a labelled pixel, drawn among all of its image's; a scale "
        "below 1 may leave that pixel out",
    )
    class_balance_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="[R] class weights are (share of the class)^-power, mean 1; 0 is the paper's plain loss",
    )
    inferred_weight: float | None = Field(
        None,
        ge=0,
        description="[P] none: Eq. 14, one mean over all labels; [R] else scribbles and inferred labels have a mean each, with "
        "class weights of their own, and this weighs the latter",
    )
    teacher_momentum: float = Field(0.9, ge=0, lt=1, description="[R] momentum of the moving average of segmenters")
    teacher_interval: Literal["epoch", "update"] = Field("epoch", description="[P] 'of previous epochs'")
    self_training: SelfTrainingSettings = Field(
        SelfTrainingSettings(), description="[R] what refining learns from the teacher; pre-training never does"
    )
    pretrained: str | None = Field(
        None, description="folder with online.safetensors and teacher.safetensors; replaces pre-training"
    )

    def tells_inferred_apart(self, version: int, *, self_training: bool) -> bool:
        """Whether inferred labels of a version are not learned as scribbles are."""
        soft = self_training and self.self_training.pixels == "inferred"
        return version > 0 and (soft or self.inferred_weight is not None)

    @model_validator(mode="after")
    def _one_use_of_inferred_labels(self) -> TrainingSettings:
        if self.inferred_weight is not None and self.self_training.pixels == "inferred":
            raise ValueError(
                "inferred_weight has no effect where self_training.pixels is 'inferred': the teacher speaks in place of the labels"
            )
        return self

    @model_validator(mode="after")
    def _classes_to_balance(self) -> TrainingSettings:
        if self.self_training.class_balanced and self.class_balance_power == 0:
            raise ValueError("self_training.class_balanced weighs classes by class_balance_power, which is 0")
        return self

    @model_validator(mode="after")
    def _a_crop_to_place(self) -> TrainingSettings:
        if self.crop_place == "labelled" and self.augmentation.crop is None:
            raise ValueError(
                "crop_place is 'labelled' but augmentation.crop is null: whole images have no crop to place"
            )
        return self


class ReplaySettings(Settings):
    """How transitions are kept and drawn."""

    capacity: int = Field(1024, ge=1, description="[R] transitions; EIL's paper names no replay")
    priority_exponent: float = Field(
        0.0, ge=0, le=1, description="[R] 0 draws uniformly; else in proportion to |temporal-difference error|^exponent"
    )
    importance_exponent: float = Field(
        0.4, ge=0, le=1, description="[R] how far importance weights undo the priorities; used where they are on"
    )
    shards: int = Field(0, ge=0, description="actors that hold the buffer between them; 0 keeps it in the driver")


class EngineSettings(Settings):
    """How the work is laid out over Ray actors, learners and devices."""

    mode: Literal["synchronous", "asynchronous"] = Field(
        "synchronous", description="asynchronous: actors sample ahead while the learner updates; needs remote actors"
    )
    num_env_runners: int = Field(0, ge=0, description="remote actors; 0 runs everything in this process")
    num_cpus_per_env_runner: float = Field(1.0, ge=0)
    num_gpus_per_env_runner: float = Field(0.0, ge=0, description="a fraction shares one GPU between actors")
    num_learners: int = Field(
        0, ge=0, description="0: the learner lives in this process; n: remote learners that share every minibatch"
    )
    num_cpus_per_learner: float = Field(1.0, ge=0, description="of a remote learner")
    num_gpus_per_learner: float | Literal["auto"] = Field(
        "auto", description="auto: 1 where this machine has a GPU, else 0"
    )
    rollouts_ahead: int = Field(
        2, ge=1, description="asynchronous: rollouts per actor that are under way or not yet learned from"
    )
    rollouts_per_update: float = Field(
        1.0, gt=0, description="asynchronous: new rollouts that pay for one update of the method's networks"
    )
    max_policy_lag: int | None = Field(
        None, ge=0, description="policy versions after which a transition is dropped and counted; none keeps all"
    )
    broadcast_interval: int = Field(1, ge=1, description="updates between two weights that actors can pull")
    stall_seconds: float = Field(
        30.0, gt=0, description="after this long without an answer an actor's order goes to another one as well"
    )
    prefetch: int = Field(1, ge=0, description="minibatches made ready on the learner's device ahead of their update")
    gradient_accumulation: int = Field(
        1, ge=1, description="parts of a minibatch that are passed one after the other to save memory"
    )
    max_learner_restarts: int = Field(
        3, ge=0, description="times that a run goes on from its newest checkpoint after a learner died"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU, few of which have bf16"
    )
    cache_mib: int = Field(2048, ge=0, description="a split smaller than this stays decoded on the device")
    inference_batch_size: int = Field(8, ge=1, description="images per batch when no gradient is needed")
    updates_per_iteration: int = Field(20, ge=1, description="learner updates in one training iteration")
    checkpoint_interval: int = Field(
        10, ge=1, description="iterations between checkpoints; every phase end has one too"
    )
    checkpoints_kept: int = Field(2, ge=1)
    write_rollouts: bool = Field(False, description="also write every rollout to rollouts/*.parquet")
    torch_threads: int | None = Field(
        None, ge=1, description="threads of torch in every process; none leaves torch's own"
    )

    @model_validator(mode="after")
    def _possible(self) -> EngineSettings:
        if self.mode == "asynchronous" and self.num_env_runners == 0:
            raise ValueError(
                "mode is 'asynchronous' but num_env_runners is 0: sampling ahead needs at least one remote actor"
            )
        for name in ("rollouts_ahead", "rollouts_per_update", "broadcast_interval"):
            if self.mode == "synchronous" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)} but mode is 'synchronous', where it has no effect")
        if self.max_policy_lag is not None and self.max_policy_lag < self.broadcast_interval - 1:
            raise ValueError(
                f"max_policy_lag is {self.max_policy_lag} but broadcast_interval is {self.broadcast_interval}: the newest weights "
                f"are up to {self.broadcast_interval - 1} updates old, so that nothing played with them could be learned from"
            )
        return self


class EvaluationSettings(Settings):
    """How the segmenter is scored."""

    scales: tuple[float, ...] = Field((1.0,), min_length=1, description="[P] multi-scale at test; the scales are [R]")
    flip: bool = Field(False, description="[P] also the mirrored image at test")
    every_stage: bool = Field(True, description="score after every stage, or only after the last one")


class MethodSettings(Settings):
    """Everything one trained variant needs; a method adds its own section."""

    method: str
    recipe: str = "unnamed"
    variant: str = "default"
    seed: int = Field(0, ge=0)
    data: DataSettings
    segmenter: SegmenterSettings = SegmenterSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    engine: EngineSettings = EngineSettings()

    @property
    def refines(self) -> bool:
        """Whether the segmenter learns from incomplete label maps, which its teacher could speak beside."""
        return False

    @property
    def infers_labels(self) -> bool:
        """Whether label maps hold more than people drew."""
        return False

    @model_validator(mode="after")
    def _label_maps_that_training_speaks_of(self) -> MethodSettings:
        own = self.training.self_training
        for key, value, unset, possible, lacking in (
            ("self_training.weight", own.weight, 0.0, self.refines, "does not refine on label maps"),
            ("self_training.pixels", own.pixels, "unlabelled", self.infers_labels, "infers no labels"),
            ("inferred_weight", self.training.inferred_weight, None, self.infers_labels, "infers no labels"),
        ):
            if value != unset and not possible:
                written = value if isinstance(value, str) else f"{value:g}"
                expected = "null" if unset is None else unset
                raise ValueError(
                    f"training.{key} is {written}, but this variant of {self.method} {lacking}, so that it has no effect: expected "
                    f"{expected}"
                )
        return self

    @model_validator(mode="after")
    def _remote_learner_needs_actors(self) -> MethodSettings:
        if self.engine.num_learners > 0 and self.engine.num_env_runners == 0:
            raise ValueError(
                f"engine.num_learners is {self.engine.num_learners} but engine.num_env_runners is 0: "
                "a remote learner needs at least one remote actor"
            )
        return self
