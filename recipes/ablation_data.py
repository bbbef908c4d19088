"""What the ablations are made on: digits with small networks, CIFAR-10 with teachers that are given."""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine.ablation import AblationOptions, Arch, as_ablation
from ipfm.engine.local_recipe import LocalRecipe
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


# Those of the digits recipe but for the number of steps and evaluations.
DIGITS: LocalRecipe[AblationOptions] = replace(
    digits_ipfm.RECIPE.with_options(
        "",
        "",
        as_ablation(
            digits_ipfm.RECIPE.base,
            max_steps=150,
            eval_every=25,
            eval_images=2000,
            checkpoint_every=100,
            teacher_steps=600,
            max_bad_steps=10,
        ),
    ),
    network=lambda options, D: digits_network(options.arch, D),
)

# Those of the CIFAR-10 recipe, the same for every variant; the length is this project's choice.
CIFAR = replace(
    cifar_ipfm.RECIPE,
    base=as_ablation(cifar_ipfm.BASE, data="cifar", kimg=10_000, eval_every=2000, max_bad_steps=50),
)
