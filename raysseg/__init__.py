"""raysseg: reinforcement learning for semantic segmentation from scarce labels, on Ray RLlib."""

__version__ = "0.1.0"
