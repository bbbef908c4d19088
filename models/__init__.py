"""Networks of the EDM / PFGM++ family and their storage."""

from . import presets
from .config import NetworkConfig
from .precond import EDMPrecond
from .song_unet import SongUNet
from .store import load_model, load_teacher, read_config, save_model

__all__ = [
    "EDMPrecond",
    "NetworkConfig",
    "SongUNet",
    "load_model",
    "load_teacher",
    "presets",
    "read_config",
    "save_model",
]
