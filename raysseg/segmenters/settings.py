"""What a segmenter is built from; names that do not exist and options that would have no effect are refused here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raysseg.configuration import Settings
from raysseg.errors import nearest_name

WIDTH_OPTIONS = {
    "DeepLabV3": "decoder_channels",
    "DeepLabV3Plus": "decoder_channels",
    "DPT": "decoder_fusion_channels",
    "FPN": "decoder_segmentation_channels",
    "MAnet": "decoder_channels",
    "PAN": "decoder_channels",
    "PSPNet": "psp_out_channels",
    "Segformer": "decoder_segmentation_channels",
    "Unet": "decoder_channels",
    "UnetPlusPlus": "decoder_channels",
    "UPerNet": "decoder_channels",
}
"""The option of segmentation_models_pytorch that `decoder_channels` sets, per architecture that has one."""

PYRAMID_ARCHITECTURES = frozenset({"MAnet", "Unet", "UnetPlusPlus"})
"""Architectures whose decoder halves its width at every level: `decoder_channels` is the width of the first."""

DILATED_ARCHITECTURES = frozenset({"DeepLabV3", "DeepLabV3Plus", "PAN", "PSPNet"})
"""Architectures that keep the last encoder maps at `output_stride` by dilation."""


def _architecture_names() -> list[str]:
    import segmentation_models_pytorch as smp

    return [architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()]


def _is_timm_encoder(name: str) -> bool:
    import timm

    return name.startswith("tu-") and timm.is_model(name.removeprefix("tu-"))


class SegmenterSettings(Settings):
    """A segmentation network: any architecture and encoder of segmentation_models_pytorch, by name."""

    architecture: str = Field(
        "DeepLabV3Plus", description="Class name of a segmentation_models_pytorch architecture. DeepLabV3Plus [P]"
    )
    encoder: str = Field(
        "resnet101",
        description="Encoder name of segmentation_models_pytorch, or 'tu-' and the name of a timm model. resnet101 [P]",
    )
    weights: str = Field(
        "imagenet",
        description="'imagenet' (downloaded) [P], 'none' (random), or the path of a .safetensors, .pth or .pt file "
        "that holds the encoder's weights or a whole segmenter",
    )
    encoder_depth: int = Field(5, ge=3, le=5, description="Stages of the encoder, each halves the resolution. 5 [P]")
    output_stride: Literal[8, 16, 32] | None = Field(
        None,
        description="Stride of the last encoder map in pixels, for DeepLabV3, DeepLabV3Plus, PSPNet (8, 16) and PAN (16, "
        "32); null is 16 for these [R], and for PSPNet what encoder_depth gives. The others have no such option",
    )
    decoder_channels: int | None = Field(
        None,
        ge=8,
        description="Width of the decoder, for Unet-like ones that of its first level; null is the architecture's own, "
        "256 for DeepLabV3Plus [R]. Linknet has no such option",
    )
    feature_tap: Literal["decoder", "encoder", "encoder_low"] = Field(
        "decoder",
        description="What the features F are: the input of the last classifier, the last encoder map, or the encoder "
        "map of stride 4; the latter two are resampled to the logits' resolution. decoder [R]",
    )
    context: Literal["none", "pattern_propagation"] = Field(
        "none",
        description="Context module before the decoder uses the last map (after the ASPP where there is one): none, or "
        "a reconstruction of the paper's CPP module [R]",
    )
    dropout: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Probability of every dropout layer of the decoder, or of one before the classifier where the "
        "decoder has none; null keeps the architecture's own (0.5 in the ASPP of DeepLabV3Plus [R])",
    )

    @field_validator("architecture")
    @classmethod
    def _known_architecture(cls, value: str) -> str:
        names = _architecture_names()
        if value not in names:
            raise ValueError(f"unknown architecture '{value}'{nearest_name(value, names)}")
        return value

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, value: str) -> str:
        import segmentation_models_pytorch as smp
        import timm

        if _is_timm_encoder(value):
            return value
        names: list[str] = smp.encoders.get_encoder_names()
        if value not in names or value.startswith("timm-"):
            hint = nearest_name(value, [*names, *(f"tu-{model}" for model in timm.list_models())])
            if not hint.startswith("; did you mean"):
                hint = f"; known are {', '.join(names[:6])}, … and 'tu-' with the name of any timm model"
            raise ValueError(f"unknown encoder '{value}'{hint.rstrip('?')}")
        return value

    @model_validator(mode="after")
    def _options_have_effect(self) -> SegmenterSettings:
        if self.output_stride is not None and self.architecture not in DILATED_ARCHITECTURES:
            raise ValueError(
                f"output_stride has no effect on {self.architecture}; it is for "
                f"{', '.join(sorted(DILATED_ARCHITECTURES))}"
            )
        if self.output_stride is not None and self.output_stride not in _strides(self.architecture):
            raise ValueError(
                f"output_stride {self.output_stride} does not exist for {self.architecture}, "
                f"expected one of {', '.join(map(str, _strides(self.architecture)))}"
            )
        if self.decoder_channels is not None and self.architecture not in WIDTH_OPTIONS:
            raise ValueError(f"decoder_channels has no effect on {self.architecture}; leave it null")
        if self.architecture == "DPT" and not self.encoder.startswith("tu-"):
            raise ValueError(f"DPT takes a timm vision transformer as encoder ('tu-vit_…'), not '{self.encoder}'")
        if self.architecture == "DPT" and self.encoder_depth != 4:
            raise ValueError(f"DPT takes encoder_depth 4, not {self.encoder_depth}")
        if self.architecture == "DPT" and self.feature_tap == "encoder_low":
            raise ValueError("feature_tap 'encoder_low' does not exist for DPT, whose encoder has no map of stride 4")
        return self

    @property
    def effective_output_stride(self) -> int | None:
        """Stride in pixels that the architecture is asked for; None where it takes no such option."""
        if self.architecture not in DILATED_ARCHITECTURES:
            return None
        return self.output_stride or (None if self.architecture == "PSPNet" else 16)


def _strides(architecture: str) -> tuple[int, ...]:
    return (16, 32) if architecture == "PAN" else (8, 16)
