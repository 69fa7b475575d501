"""The methods: what a user of RLlib imports."""

from raysseg.algorithms.eil import EILConfig, EILSettings

__all__ = ["EILConfig", "EILSettings"]
