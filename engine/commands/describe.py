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
    said = [] if steps is None else [counted(steps, "step")]
    for name, words in (
        ("batch", "batch {}"),
        ("lr", "lr {:g}"),
        ("ema_kimg", "EMA half-life {} kimg"),
        ("ema", "EMA of relative width {}"),
        ("precision", "{}"),
        ("seed", "seed {}"),
    ):
        value = settings.get(name)
        if name in ("ema_kimg", "ema"):
            several = value if isinstance(value, (list, tuple)) else [value]
            value = ", ".join(f"{one:g}" for one in several if isinstance(one, (int, float)) and one) or None
        if value is not None:
            said.append(words.format(value))
    return ", ".join(said)


def computed(settings: Mapping[str, Any]) -> str:
    """Whether a training was compiled, captured in CUDA graphs and deterministic, as far as `settings` say so."""
    graphs, said = settings.get("cuda_graphs"), []
    if graphs is not None:
        said.append({"on": "with CUDA graphs", "off": "without CUDA graphs"}.get(graphs, f"CUDA graphs {graphs}"))
    if settings.get("compile"):
        said.append("compiled")
    if settings.get("deterministic") is not None:
        said.append("deterministic algorithms" if settings["deterministic"] else "fastest algorithms")
    return ", ".join(said)


def measured(found: Mapping[str, Any]) -> str | None:
    """What the run that kept a network measured of it: "KID 0.0021, FID 3.21 over 50,000 images"."""
    from ipfm.engine.evaluation.metrics.measures import DISTANCE, measures_of
    from ipfm.engine.runtime.wording import significant
    from ipfm.engine.training.snapshots import asked_of, values_of

    values, name = values_of(found), str(found.get("metric", DISTANCE))
    known = [one for one in measures_of(asked_of(found)) if one.key in values]
    images = f" over {found['images']:,} images" if isinstance(found.get("images"), int) else ""
    text = ", ".join(f"{one.called(name)} {significant(values[one.key])}" for one in known)
    return f"{text}{images}" if text else None
