"""Networks of the EDM / PFGM++ family and their storage."""

from . import presets
from .build import build_network
from .config import NetworkConfig
from .dhariwal_unet import DhariwalUNet
from .precond import EDMPrecond, Precond
from .precond_baselines import VEPrecond, VPPrecond, iDDPMPrecond
from .song_unet import SongUNet
from .store import load_model, read_config, save_model
from .teacher import load_teacher

__all__ = [
    "DhariwalUNet",
    "EDMPrecond",
    "NetworkConfig",
    "Precond",
    "SongUNet",
    "VEPrecond",
    "VPPrecond",
    "build_network",
    "iDDPMPrecond",
    "load_model",
    "load_teacher",
    "presets",
    "read_config",
    "save_model",
]
