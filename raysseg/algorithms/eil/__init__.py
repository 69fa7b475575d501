"""EIL: exploratory inference learning for scribble-supervised segmentation (Zhou et al., AAAI 2023)."""

from raysseg.algorithms.eil.config import EILConfig, EILOptions, EILSettings

__all__ = ["EILConfig", "EILOptions", "EILSettings"]
