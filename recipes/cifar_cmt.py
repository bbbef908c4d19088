"""CIFAR-10, 32x32: consistency mid-training of an EDM teacher, or of a PFGM++ one at any D.

    deepspeed recipes/cifar_cmt.py --teacher edm-cifar10-32x32-uncond-vp.pkl --lpips vgg.pth
    deepspeed recipes/cifar_cmt.py --teacher edm-cifar10-32x32-uncond-vp.pkl --distance l2 --sigmas 80 0.821
    deepspeed recipes/cifar_cmt.py --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 --distance l2

The settings of sony/cmt: 16 levels even in ln sigma from 80 to 0.002, a multistep solver of order 3, LPIPS, Rectified
Adam at 2e-4 falling to 0, batch 128 (8 trajectories of 16 points), dropout 0.2, average 0.999, 38.4 million images.
There trajectories begin at noisy images; here at the prior, so that no data are needed, and at finite D at its prior.
Its published figures are those of a second stage on real images: cifar_ect.py --init. The level 0.821 of a second step
is that of consistency models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ipfm.engine.experiments import ema_kimg, origins, recipe_options, run_command
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

BASE = CmtConfig(
    batch=128,
    kimg=38_400,
    lr=2e-4,
    dropout=0.2,
    ema_kimg=ema_kimg(0.999, 128),
    ema_rampup=1e6,
    distance="lpips",
    heun_steps=18,
    log_every=50,
)

ORIGINS = {
    **origins(
        "script", "batch", "kimg", "lr", "lr_schedule", "lr_end", "points", "order", "distance", "dropout", "ema_kimg"
    ),
    **origins("ours", "beta1", "eps", ema_rampup="none, so that every step has the script's decay"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """The same for every network."""
    return {}


RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_cmt.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Consistency Mid-Training (sony/cmt), D = inf there",
    preset="cifar10-ddpmpp",
    variant=variant,
    origins=ORIGINS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
