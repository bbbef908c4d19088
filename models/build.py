"""From a configuration to its network."""

from .config import NetworkConfig
from .precond import EDMPrecond, Precond
from .precond_baselines import VEPrecond, VPPrecond, iDDPMPrecond

_CLASSES: dict[str, type[Precond]] = {cls.PRECOND: cls for cls in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}


def build_network(config: NetworkConfig) -> Precond:
    """The network that `config` describes, with fresh weights from torch's global generator, in training mode."""
    return _CLASSES[config.precond](config)
