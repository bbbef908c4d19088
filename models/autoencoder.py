"""The autoencoder between pictures and the latents that networks of EDM2's kind make, from a folder of `diffusers`.

    encoded   (B, 8, h, w)   mean and standard deviation of the posterior of a picture, as data sets store them
    latents   (B, 4, h, w)   (mean + std·n)·SCALE + BIAS, n ~ N(0, 1): about mean 0 and deviation 0.5 [EDM2, section 4]
    pictures  (B, 3, H, W)   8 h by 8 w pixels, for the published autoencoder

The published one is stabilityai/sd-vae-ft-mse: `AutoencoderKL` with four channels. `diffusers` is imported where one is
opened and nowhere else; nothing is fetched from a network, and no code from a file is run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.models.checkpoints.pickle_values import shown
from ipfm.models.checkpoints.recognise import missing, user_path, what_of_ours
from ipfm.models.checkpoints.state_dicts import StateDict, open_state_dict
from ipfm.models.full_float32 import full_float32

LATENT_CHANNELS = 4
"""Channels of latents, and of no picture: 1 grey, 3 RGB."""
ENCODED_CHANNELS = 2 * LATENT_CHANNELS
# Mean and deviation of each channel of the raw latents of ImageNet, by which latents come to mean 0 and deviation 0.5.
_RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
_RAW_STD = (4.17, 4.62, 3.71, 3.28)
SCALE = 0.5 / torch.tensor(_RAW_STD)[:, None, None]
BIAS = -torch.tensor(_RAW_MEAN)[:, None, None] * SCALE
# Pictures at a time, in either direction.
AT_ONCE = 8

CLASS = "AutoencoderKL"
WEIGHTS = tuple(
    f"diffusion_pytorch_model{kind}.{suffix}" for kind in ("", ".fp16") for suffix in ("safetensors", "bin")
)
_SCALING = 0.18215
"""What the configurations of Stable Diffusion's first autoencoders say of their latents; it is not used here."""
INSTALL = "pip install 'ipfm[latents]'"
WANTED = f"the folder of an {CLASS} of diffusers, such as sd-vae-ft-mse's: config.json and {WEIGHTS[0]} (or .bin)"
SHOWS = "--vae VAE_FOLDER makes pictures of them"
"""For messages about latents that are not decoded."""
# What attention layers were called before diffusers 0.17, and since.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_latent(shape: tuple[int, int, int]) -> bool:
    """Whether images (C, H, W) = `shape` are latents of an autoencoder, and no pictures."""
    return shape[0] == LATENT_CHANNELS


def latents_of(encoded: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior: (mean + std·noise)·SCALE + BIAS.

    Args:
        encoded: (B, 8, h, w) float32, mean first.
        noise: (B, 4, h, w) float32, standard normal.

    Returns:
        (B, 4, h, w) float32.
    """
    mean, std = encoded.chunk(2, dim=1)
    return (mean + std * noise) * SCALE.to(mean.device) + BIAS.to(mean.device)


class Autoencoder:
    """An open autoencoder, frozen, in float32. Made by `load_autoencoder`.

    Attributes:
        path: the folder that it was loaded from.
        file: its weights there.
        factor: pixels a side of a picture for each of a latent.
        remarks: what is to be known of it, a line each.
    """

    def __init__(self, net: Any, file: Path, device: torch.device) -> None:
        self._net, self.path, self.file, self._device = net.to(device), file.parent, file, device
        self.factor = 1 << (len(net.config.block_out_channels) - 1)
        self.remarks = _remarks(self.path, net.config.get("scaling_factor", _SCALING))

    def shape_of_pictures(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(3, H, W) of what latents (4, h, w) = `shape` become.

        Raises:
            ValueError: `shape` is that of no latents.
        """
        if not is_latent(shape):
            raise ValueError(
                f"vae was given, but the images are {'x'.join(map(str, shape))}, not latents of {LATENT_CHANNELS} "
                "channels: leave it out"
            )
        return 3, self.factor * shape[1], self.factor * shape[2]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior of pictures.

        Args:
            pixels: (B, 3, H, W) uint8, H and W multiples of `factor`. The network gets them as values of [0, 1].

        Returns:
            (B, 8, H/factor, W/factor) float32 on the CPU.
        """
        found = []
        with full_float32():
            for some in pixels.split(AT_ONCE):
                posterior = self._net.encode(some.to(self._device).float() / 255).latent_dist
                found.append(torch.cat([posterior.mean, posterior.std], 1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, in the 256 levels of a pixel.

        Args:
            latents: (B, 4, h, w) of any floating dtype, on any device.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], on the device of `latents`: v/127.5 - 1 of the levels v, which are the
            network's output of [0, 1], clamped, times 255, truncated. A latent that is not finite gives NaN.
        """
        pictures = []
        scale, bias = SCALE.to(self._device), BIAS.to(self._device)
        with full_float32():
            for some in latents.split(AT_ONCE):
                raw = (some.to(self._device, torch.float32) - bias) / scale
                decoded = self._net.decode(raw).sample
                finite = (raw.isfinite().flatten(1).all(1) & decoded.isfinite().flatten(1).all(1))[:, None, None, None]
                levels = (decoded.clamp(0, 1) * 255).floor()
                pictures.append(torch.where(finite, levels / 127.5 - 1, torch.nan).to(latents.device))
        return torch.cat(pictures) if pictures else latents.new_zeros(0, *self.shape_of_pictures(_shape(latents)))


def load_autoencoder(folder: Path | str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in a local folder, as `diffusers` stores it, with attention layers of old or new names.

    Args:
        folder: with config.json and the weights, .safetensors or .bin; a pipeline's, whose folder vae is taken; or one
            of the hub's cache with a single snapshot.
        device: where it computes.

    Raises:
        ValueError: it holds none, one of other channels, or `diffusers` is not installed; one line.
    """
    place = _place(user_path(folder))
    config = _config(place)
    file = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if file is None:
        raise ValueError(f"{place} lacks the weights, {WEIGHTS[0]} or .bin beside its config.json: fetch them too")
    net = _built(place, config)
    _fill(net, open_state_dict(file))
    return Autoencoder(net.eval().requires_grad_(False), file, torch.device(device))


def _remarks(place: Path, scaling: object) -> tuple[str, ...]:
    """That it is of other latents than EDM2's, where its configuration says so."""
    if scaling == _SCALING:
        return ()
    return (
        f"{place} has scaling_factor {shown(scaling)}, sd-vae-ft-mse {_SCALING}: EDM2's latents are of that, and "
        "another autoencoder, such as SDXL's, makes no pictures of them",
    )


def _shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _place(folder: Path) -> Path:
    """The folder itself, or that within it which holds the autoencoder."""
    if not folder.exists():
        raise ValueError(f"{missing(folder)}: a VAE is {WANTED}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: a VAE is {WANTED}")
    if what := what_of_ours(folder):
        raise ValueError(f"{folder} is no VAE: {what} of ipfm; a VAE is {WANTED}")
    snapshots = folder / "snapshots"
    found = sorted(place for place in snapshots.iterdir() if place.is_dir()) if snapshots.is_dir() else []
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} snapshots: give one of them, such as {found[0]}")
    for place in (folder, *found):
        for inside in (place, place / "vae"):
            if (inside / "config.json").is_file():
                return inside
    raise ValueError(f"{folder} has no config.json: a VAE is {WANTED}")


def _config(place: Path) -> dict[str, Any]:
    path = place / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != CLASS:
        said = f"a {shown(kind)}" if isinstance(kind, str) else "nothing of diffusers"
        raise ValueError(f"{place} is no VAE that can be used: its config.json is of {said}; a VAE is {WANTED}")
    wanted = {"latent_channels": LATENT_CHANNELS, "in_channels": 3, "out_channels": 3}
    for name, value in wanted.items():
        found = config.get(name, value)
        if found != value:
            raise ValueError(
                f"{place} has {name} {shown(found)}; a VAE here makes {LATENT_CHANNELS} channels of latents from "
                "pictures of 3, as sd-vae-ft-mse does"
            )
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not 0 < len(widths) < 9 or not all(type(width) is int for width in widths):
        raise ValueError(f"{place / 'config.json'}: block_out_channels must be a list of widths, got {shown(widths)}")
    return config


def _built(place: Path, config: Mapping[str, Any]) -> Any:
    """The network of this configuration."""
    with _quiet():
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            lacks = "" if getattr(error, "name", None) == "diffusers" else f" ({' '.join(str(error).split())[:160]})"
            raise ValueError(f"a VAE needs diffusers, which cannot be imported{lacks}: {INSTALL}") from None
        try:
            return AutoencoderKL.from_config(dict(config))
        except Exception as error:  # whatever its constructor makes of foreign values
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"{place / 'config.json'} describes no {CLASS}: {said}") from None


def _fill(net: Any, stored: StateDict) -> None:
    """Load the weights, whatever their attention layers are called and of 2-d weights or 1×1 convolutions."""
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    found = {}
    for name, shape in stored.shapes.items():
        new = _new_name(name)
        if new not in wanted:
            raise ValueError(f"{stored.where} has the unknown {shown(name)}: it is not of the config.json beside it")
        own = tuple(wanted[new])
        if shape != own and not (".attentions." in new and shape[:2] == own[:2] and set(shape[2:] + own[2:]) <= {1}):
            raise ValueError(f"{stored.where}: {name} has shape {shape}, its config.json wants {own}")
        found[new] = (name, own)
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(f"{stored.where} lacks {shown(lacking[0])}: it is not of the config.json beside it")
    net.load_state_dict({new: stored.load(name).reshape(own) for new, (name, own) in found.items()})


def _new_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    stem, _, last = name.rpartition(".")
    above, _, layer = stem.rpartition(".")
    return f"{above}.{_OLD_NAMES[layer]}.{last}" if layer in _OLD_NAMES else name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers and xformers, which it imports, say of packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in ("xformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
