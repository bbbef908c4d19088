"""Clothes, 28x28: trains a teacher on Fashion-MNIST and distils it to one step, in about an hour on two CPU cores.

    deepspeed recipes/fashion_ipfm.py
    deepspeed recipes/fashion_ipfm.py --D inf --conditional
    python recipes/fashion_ipfm.py --teacher runs/fashion-ddpmpp16-D128-alpha1-K1/teacher --alpha 0.5 --seed 1

The data are Fashion-MNIST, 60 000 grey images of ten classes under the MIT licence, as Debian packages it (apt-get
install dataset-fashion-mnist), or with --data MNIST, KMNIST or any other set of such a size. Samples are compared by
the features of a small classifier of the ten classes, which the first run trains in about a minute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ipfm.engine import DistillConfig, TeacherConfig
from ipfm.engine.evaluation.metrics import PixelFeatures
from ipfm.engine.experiments import ByOptions, TrainAndDistil, fashion, options_for, run_command
from ipfm.models import NetworkConfig, presets

CHANNELS = 16
BASE = options_for(DistillConfig, fashion.FashionOptions)(
    batch=64,
    max_steps=2000,
    lr=5e-4,
    # At a constant rate the distances of a short run wander: docs/results.md.
    lr_schedule="linear",
    ema_kimg=10.0,
    ema_rampup=0.2,
    alpha=1.0,
    eval_every=250,
    eval_images=2000,
    checkpoint_every=250,
    teacher_steps=20_000,
)


def small_network(arch: Literal["ddpmpp", "ncsnpp"], D: float, channels: int = CHANNELS) -> NetworkConfig:
    """CIFAR-10's network, made small, at the sides 28, 14 and 7; 744 225 parameters with 16 channels and ddpm++."""
    return replace(
        presets.get(arch, D=D),
        img_resolution=28,
        img_channels=1,
        augment_dim=0,
        model_channels=channels,
        channel_mult=(1, 2, 4),
        num_blocks=1,
        attn_resolutions=(7,),
        dropout=0.0,
    )


def network(options: fashion.FashionOptions, D: float) -> NetworkConfig:
    """The teacher's network."""
    small = small_network(options.arch, D, options.channels or CHANNELS)
    return replace(small, label_dim=training_classes(options))


def training_classes(options: fashion.FashionOptions) -> int:
    """How many classes the teacher is told."""
    return (fashion.training_images(options).classes or 0) if options.conditional else 0


def name(options: fashion.FashionOptions) -> str:
    """How the run folder's name begins: what is distilled, as far as the options say it."""
    data = fashion.data_name(options.data)
    if options.teacher is not None:
        return data
    return f"{data}-{options.arch}{options.channels or CHANNELS}{'-cond' * options.conditional}"


RECIPE = TrainAndDistil(
    file="fashion_ipfm.py",
    about=__doc__ or "",
    name=name,
    title=fashion.TITLE,
    data=lambda: fashion.training_images(BASE),
    by_options=ByOptions(data=fashion.training_images, features=fashion.compared_by, compared=fashion.how_compared),
    network=network,
    features=PixelFeatures,
    compared="in pixel space",
    D=128.0,
    base=BASE,
    training=TeacherConfig(batch=64, lr=2e-3, lr_rampup_kimg=6.4, ema_kimg=20.0, checkpoint_every=1000),
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
