"""CIFAR-10, 32x32: physics informed distillation of an EDM teacher, or of a PFGM++ one at any D.

    deepspeed recipes/cifar_pid.py --teacher edm-cifar10-32x32-uncond-ve.pkl --lpips vgg.pth
    deepspeed recipes/cifar_pid.py --teacher edm-cifar10-32x32-uncond-ve.pkl --distance l2
    deepspeed recipes/cifar_pid.py --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 --width 0.5 --lpips vgg.pth

Settings: Tee et al., Physics Informed Distillation: 250 levels, LPIPS, Rectified Adam at the constant learning rate
2e-4, batch 512, average 0.99995, no dropout. `--difference central` is the paper's second-order variant, `--width 0.5`
its smaller student. Finite D is this project's extension. The length, 200 000 thousand images, is this project's
choice.
"""

from __future__ import annotations

import math

from ipfm.engine import PidConfig
from ipfm.engine.experiments import ema_kimg, recipe_options, run_command
from ipfm.recipes import cifar_ipfm

BASE = PidConfig(
    batch=512,
    kimg=200_000,
    lr=2e-4,
    ema_kimg=ema_kimg(0.99995, 512),
    ema_rampup=1e6,
    distance="lpips",
    heun_steps=18,
    log_every=50,
)

RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_pid.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Physics Informed Distillation (Tee et al.), D = inf there",
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
