"""CIFAR-10, 32x32: physics informed distillation of an EDM teacher, or of a PFGM++ one at any D.

    deepspeed recipes/cifar_pid.py --teacher edm-cifar10-32x32-uncond-vp.pkl --lpips vgg.pth
    deepspeed recipes/cifar_pid.py --teacher edm-cifar10-32x32-uncond-vp.pkl --distance l2
    deepspeed recipes/cifar_pid.py --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 --width 0.5 --lpips vgg.pth

Tee et al., Physics Informed Distillation: 250 levels, LPIPS of images resized to a side of 244 (224 in the settings
published beside the paper: --lpips-side 224), Rectified Adam at the constant learning rate 2e-4, batch 512, average
0.99995, no dropout. The paper prints no length; published beside it are 800 000 steps of 512. Its text has an ncsn++
teacher, its counts of parameters and its script ddpm++ (uncond-vp). `--difference central` is how this project reads
the paper's second order, for which no stencil is printed; `--width 0.5` its smaller student. Finite D is this project's
extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ipfm.engine import PidConfig
from ipfm.engine.experiments import ema_kimg, origins, recipe_options, run_command
from ipfm.engine.objectives.pid import PAPER_SIDE, SCRIPT_SIDE
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

BASE = PidConfig(
    batch=512,
    kimg=409_600,
    lr=2e-4,
    ema_kimg=ema_kimg(0.99995, 512),
    ema_rampup=1e6,
    distance="lpips",
    heun_steps=18,
    log_every=50,
)

ORIGINS = {
    **origins("paper", "batch", "lr", "points", "difference", "distance", "dropout", "ema_kimg"),
    **origins("paper", lpips_side=f"{PAPER_SIDE}; {SCRIPT_SIDE} in the script"),
    **origins("script", kimg="800 000 steps of 512"),
    **origins("ours", "beta1", "eps", ema_rampup="none, so that every step has the paper's decay"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """Images are resized before VGG, where there is a VGG."""
    return {"lpips_side": PAPER_SIDE} if settings.get("distance") == "lpips" else {}


RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_pid.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Physics Informed Distillation (Tee et al.), D = inf there",
    preset="cifar10-ddpmpp",
    variant=variant,
    origins=ORIGINS,
    formerly={"kimg": (200_000,), "lpips_side": (None,)},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
