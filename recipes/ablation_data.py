"""What the ablations are made on: digits and clothes with small networks, CIFAR-10 with teachers that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import (
    AblationOptions,
    Arch,
    ByOptions,
    DistillationOptions,
    TrainAndDistil,
    as_ablation,
    fashion,
    recipe_options,
)
from ipfm.models import NetworkConfig, presets
from ipfm.recipes import cifar_ipfm, digits_ipfm, fashion_ipfm


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


def fashion_network(arch: Arch, D: float, channels: int = fashion_ipfm.CHANNELS) -> NetworkConfig:
    """A network of this family for clothes of 28x28, as in the Fashion-MNIST recipe."""
    if arch == "adm":
        return replace(fashion_ipfm.small_network("ddpmpp", D, channels), model_type="DhariwalUNet")
    return fashion_ipfm.small_network(arch, D, channels)


def as_fashion(options: AblationOptions) -> fashion.FashionOptions:
    """The options of the Fashion-MNIST recipe that name its data and what samples are compared by."""
    return replace(
        fashion_ipfm.BASE,
        data=options.images,
        classifier=options.classifier,
        skip_unreadable=options.skip_unreadable,
        strict=options.strict,
    )


def fashion_ablation(
    base: DistillationOptions, *, channels: int = fashion_ipfm.CHANNELS, **changes: Any
) -> TrainAndDistil[AblationOptions]:
    """Data and teachers of the Fashion-MNIST recipe, distilled by these settings, with these changed."""
    options = as_ablation(base, **{"data": "fashion", "max_bad_steps": 10, **changes})
    return replace(
        fashion_ipfm.RECIPE.with_options("", "", options),
        network=lambda o, D: fashion_network(o.arch, D, channels),
        by_options=ByOptions(
            data=lambda o: fashion.training_images(as_fashion(o)),
            features=lambda o, data, folder, world: fashion.compared_by(as_fashion(o), data, folder, world),
            compared=lambda o: fashion.how_compared(as_fashion(o)),
        ),
    )


# Those of the Fashion-MNIST recipe with fewer steps, so that all of its ablations that judge a claim take two cores
# less than ten hours.
CLOTHES = recipe_options(
    replace(fashion_ipfm.BASE.distillation(), max_steps=600, eval_every=60),
    eval_images=2000,
    teacher_steps=5000,
)
FASHION = fashion_ablation(CLOTHES)

# Those of the CIFAR-10 recipe, the same for every variant; the length is this project's choice.
CIFAR = replace(
    cifar_ipfm.RECIPE,
    base=as_ablation(cifar_ipfm.RECIPE.base, data="cifar", kimg=10_000, eval_every=2000, max_bad_steps=50),
)
