"""CiSS-Net: context learned by an actor-critic over one action per position."""

from raysseg.algorithms.cissnet.config import CiSSNetConfig, CiSSNetOptions, CiSSNetSettings

__all__ = ["CiSSNetConfig", "CiSSNetOptions", "CiSSNetSettings"]
