"""RALIS: reinforced active learning of image segmentation (Casanova et al., ICLR 2020)."""

from raysseg.algorithms.ralis.config import RALISConfig, RALISOptions, RALISSettings

__all__ = ["RALISConfig", "RALISOptions", "RALISSettings"]
