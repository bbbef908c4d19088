"""Networks of the EDM / PFGM++ family and their storage."""

from ipfm.models import presets
from ipfm.models.config import NetworkConfig
from ipfm.models.dhariwal_unet import DhariwalUNet
from ipfm.models.edm2_unet import EDM2UNet
from ipfm.models.precond import (
    EDM2Precond,
    EDMPrecond,
    Precond,
    VEPrecond,
    VPPrecond,
    build_network,
    guided,
    iDDPMPrecond,
)
from ipfm.models.song_unet import SongUNet
from ipfm.models.store import load_model, read_config, save_model
from ipfm.models.teacher import load_teacher

__all__ = [
    "DhariwalUNet",
    "EDM2Precond",
    "EDM2UNet",
    "EDMPrecond",
    "NetworkConfig",
    "Precond",
    "SongUNet",
    "VEPrecond",
    "VPPrecond",
    "build_network",
    "guided",
    "iDDPMPrecond",
    "load_model",
    "load_teacher",
    "presets",
    "read_config",
    "save_model",
]
