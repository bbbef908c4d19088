"""ImageNet, 64x64, class-conditional: physics informed distillation of an EDM teacher.

    deepspeed recipes/imagenet64_pid.py --teacher edm-imagenet-64x64-cond-adm.pkl --lpips vgg.pth --zero 2
    deepspeed recipes/imagenet64_pid.py --distance l2 --dry-run

Settings: Tee et al., Physics Informed Distillation: 250 levels, LPIPS, Rectified Adam at the constant learning rate
1e-4, batch 2048, average 0.99995, no dropout. The length, 200 000 thousand images, is this project's choice.
"""

from __future__ import annotations

import math

from ipfm.engine import PidConfig
from ipfm.engine.experiments import ema_kimg, recipe_options, run_command
from ipfm.recipes import imagenet64_ipfm

BASE = PidConfig(
    batch=2048,
    kimg=200_000,
    lr=1e-4,
    ema_kimg=ema_kimg(0.99995, 2048),
    ema_rampup=1e6,
    distance="lpips",
    heun_steps=40,
    log_every=10,
)

RECIPE = imagenet64_ipfm.RECIPE.with_options(
    "imagenet64_pid.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Physics Informed Distillation (Tee et al.), D = inf there",
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
