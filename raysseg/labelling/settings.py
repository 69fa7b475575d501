"""What a labelling run is made of: the classes, the grid, who ranks regions, and how the segmenter learns between rounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raysseg.algorithms.ralis.config import RegionOptions
from raysseg.configuration import Settings
from raysseg.core.settings import OptimiserSettings
from raysseg.data.augmentation import AugmentationSettings
from raysseg.functional.constants import MAX_CLASSES
from raysseg.segmenters.settings import SegmenterSettings

Policy = Literal["uniform", "entropy", "margin", "bald", "coreset", "query"]


class RoundTraining(Settings):
    """How the segmenter is trained on all answers so far, from its starting weights, before a round is ranked."""

    updates: int = Field(200, ge=1, description="updates before every round that has answers")
    batch_size: int = Field(8, ge=1, description="answered regions per update")
    optimiser: OptimiserSettings = Field(
        OptimiserSettings(name="adamw", learning_rate=3e-4, weight_decay=5e-4, clip_norm=5.0),
        description="AdamW 3e-4, poly",
    )
    head_multiplier: float = Field(4.0, gt=0, description="learning rate of new layers over the backbone's")
    augmentation: AugmentationSettings = Field(
        AugmentationSettings(scale=(1.0, 1.0), flip=0.5, rotation=0.0, crop=(256, 256)),
        description="flips; windows of 256 pixels around a region, which show what surrounds it",
    )


class LabellingSettings(Settings):
    """Everything that `raysseg label init` fixes for a run."""

    images: str = Field(description="folder of the images")
    classes: tuple[str, ...] = Field(description="names of the classes 0, 1, …")
    policy: Policy = Field("entropy", description="who ranks the regions")
    variant: str | None = Field(None, description="folder of the finished variant whose networks are used")
    regions: RegionOptions = RegionOptions()
    pool_size: int = Field(10, ge=1, description="candidates among which each region is chosen")
    dropout_passes: int = Field(20, ge=2, description="passes with dropout of the policy 'bald'")
    dropout: float = Field(0.5, gt=0, lt=1, description="before the classifier for the policy 'bald', in training too")
    segmenter: SegmenterSettings = Field(
        SegmenterSettings(encoder="resnet34"), description="the segmenter, where no variant gives it"
    )
    training: RoundTraining = RoundTraining()
    inference_batch_size: int = Field(8, ge=1, description="images per batch when no gradient is needed")
    seed: int = Field(0, ge=0)

    @field_validator("classes")
    @classmethod
    def _names(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if not 2 <= len(classes) <= MAX_CLASSES:
            raise ValueError(f"the names of 2 to {MAX_CLASSES} classes are expected")
        twice = next((name for name in classes if classes.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the class '{twice}' is named twice")
        if any(not name or name != name.strip() for name in classes):
            raise ValueError("the name of a class is empty, or begins or ends with a space")
        return classes

    @model_validator(mode="after")
    def _possible(self) -> LabellingSettings:
        if self.policy == "query" and self.variant is None:
            raise ValueError("the policy 'query' needs a variant with a trained query network")
        if self.variant is not None and "segmenter" in self.model_fields_set:
            raise ValueError("segmenter has no effect with a variant, whose own segmenter is used")
        for key in ("dropout_passes", "dropout"):
            if self.policy != "bald" and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with the policy '{self.policy}'; it is for 'bald'")
        return self
