"""What a network is called, and how it was made, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipfm.engine.runtime.wording import counted
from ipfm.models import NetworkConfig


def architecture(network: NetworkConfig) -> str:
    """The family, its widths and the preconditioning, where it is not EDM's."""
    widths = ", ".join(str(network.model_channels * factor) for factor in network.channel_mult)
    other = "" if network.precond == "EDMPrecond" else f", {network.precond}"
    blocks = f"{counted(network.num_blocks, 'block')} a level"
    return f"{network.family}, {widths} channels, {blocks}{other}"


def images(network: NetworkConfig) -> str:
    """Shape and classes: "3x32x32, 10 classes"."""
    side = network.img_resolution
    return f"{network.img_channels}x{side}x{side}, " + (
        f"{network.label_dim} classes" if network.label_dim else "unconditional"
    )


def training(settings: Mapping[str, Any], steps: object = None) -> str:
    """Length, batch, learning rate, arithmetic and seed of a training, as far as `settings` say them."""
    said = [] if steps is None else [f"{steps} steps"]
    for name, words in (
        ("batch", "batch {}"),
        ("lr", "lr {:g}"),
        ("ema_kimg", "EMA half-life {:g} kimg"),
        ("precision", "{}"),
        ("seed", "seed {}"),
    ):
        if settings.get(name) is not None:
            said.append(words.format(settings[name]))
    return ", ".join(said)
