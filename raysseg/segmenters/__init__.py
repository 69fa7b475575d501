"""Segmentation networks behind one interface: image → features and logits."""

from raysseg.segmenters.building import build_segmenter, feature_channels
from raysseg.segmenters.context import PatternPropagation
from raysseg.segmenters.segmenter import (
    Segmenter,
    SegmenterDecoder,
    SegmenterOutput,
    evaluation_mode,
    upsample_logits,
)
from raysseg.segmenters.settings import SegmenterSettings
from raysseg.segmenters.teacher import make_teacher, update_teacher
from raysseg.segmenters.virtual import virtual_step
from raysseg.segmenters.weights import load_weights, save_segmenter

__all__ = [
    "PatternPropagation",
    "Segmenter",
    "SegmenterDecoder",
    "SegmenterOutput",
    "SegmenterSettings",
    "build_segmenter",
    "evaluation_mode",
    "feature_channels",
    "load_weights",
    "make_teacher",
    "save_segmenter",
    "update_teacher",
    "upsample_logits",
    "virtual_step",
]
