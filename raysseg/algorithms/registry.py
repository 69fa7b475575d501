"""The methods by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.results import load_predictor
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.core.config import SegmentationConfig
from raysseg.core.settings import MethodSettings
from raysseg.errors import InputError, nearest_name
from raysseg.segmenters import Segmenter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method's settings, its RLlib configuration, the settings that leave only pre-training, and those of its own that all
    variants of a seed share because pre-training depends on them.
    """

    settings: type[MethodSettings]
    config: type[SegmentationConfig]
    section: str
    pretraining: dict[str, object]
    shared: tuple[str, ...] = ()
    predictor: Callable[[Any, Path, Segmenter], nn.Module] | None = None
    """Makes of a finished variant's settings, folder and segmenter what predicts; None: the segmenter does."""


METHODS = {
    "eil": Method(settings=EILSettings, config=EILConfig, section="eil", pretraining={"policy": "none", "stages": 0}),
    "cissnet": Method(
        settings=CiSSNetSettings,
        config=CiSSNetConfig,
        section="cissnet",
        pretraining={"policy": "none"},
        predictor=load_predictor,
    ),
    "ralis": Method(
        settings=RALISSettings,
        config=RALISConfig,
        section="ralis",
        pretraining={"policy": "none"},
        shared=("sets", "start_share"),
    ),
}


def get_method(name: str) -> Method:
    """Returns a method by name. Raises `InputError` for an unknown one, with the nearest name."""
    if name not in METHODS:
        raise InputError(f"Unknown method '{name}'{nearest_name(name, METHODS)}")
    return METHODS[name]
