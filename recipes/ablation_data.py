"""What the ablations are made on: digits with small networks, CIFAR-10 with teachers that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import AblationOptions, Arch, TrainAndDistil, as_ablation
from ipfm.models import NetworkConfig, presets
from ipfm.recipes import cifar_ipfm, digits_ipfm


def digits_network(arch: Arch, D: float) -> NetworkConfig:
    """A network of this family for 8x8 digits: the preset's widths, 180 000 to 191 000 parameters."""
    network = presets.get("digits", D=D)
    if arch == "adm":
        return replace(network, model_type="DhariwalUNet")
    if arch == "ncsnpp":
        return replace(
            network,
            embedding_type="fourier",
            encoder_type="residual",
            channel_mult_noise=2,
            resample_filter=(1, 3, 3, 1),
        )
    return network


def digits_ablation(recipe: TrainAndDistil[Any], **changes: Any) -> TrainAndDistil[AblationOptions]:
    """The settings of a recipe of the digits, with these changed, on a network of the options' family."""
    options = as_ablation(recipe.base, **{"max_bad_steps": 10, **changes})
    return replace(recipe.with_options("", "", options), network=lambda o, D: digits_network(o.arch, D))


# Those of the digits recipe but for the number of steps and evaluations.
DIGITS = digits_ablation(
    digits_ipfm.RECIPE, max_steps=150, eval_every=25, eval_images=2000, checkpoint_every=100, teacher_steps=600
)

# Those of the CIFAR-10 recipe, the same for every variant; the length is this project's choice.
CIFAR = replace(
    cifar_ipfm.RECIPE,
    base=as_ablation(cifar_ipfm.RECIPE.base, data="cifar", kimg=10_000, eval_every=2000, max_bad_steps=50),
)
