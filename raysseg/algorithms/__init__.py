"""The methods: what a user of RLlib imports."""

from raysseg.algorithms.eil import EILConfig, EILSettings
from raysseg.algorithms.eil.env import register

register()

__all__ = ["EILConfig", "EILSettings"]
