"""The methods: what a user of RLlib imports."""

from raysseg.algorithms.cissnet import CiSSNetConfig, CiSSNetSettings
from raysseg.algorithms.cissnet.env import register as register_cissnet
from raysseg.algorithms.eil import EILConfig, EILSettings
from raysseg.algorithms.eil.env import register as register_eil
from raysseg.algorithms.ralis import RALISConfig, RALISSettings
from raysseg.algorithms.ralis.env import register as register_ralis

register_cissnet()
register_eil()
register_ralis()

__all__ = ["CiSSNetConfig", "CiSSNetSettings", "EILConfig", "EILSettings", "RALISConfig", "RALISSettings"]
