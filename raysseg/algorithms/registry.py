"""The methods by name."""

from __future__ import annotations

import dataclasses

from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.ralis.config import RALISConfig, RALISSettings
from raysseg.core.config import SegmentationConfig
from raysseg.core.settings import MethodSettings
from raysseg.errors import InputError, nearest_name


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


METHODS = {
    "eil": Method(settings=EILSettings, config=EILConfig, section="eil", pretraining={"policy": "none", "stages": 0}),
    "cissnet": Method(
        settings=CiSSNetSettings, config=CiSSNetConfig, section="cissnet", pretraining={"policy": "none"}
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
