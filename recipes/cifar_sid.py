"""CIFAR-10, 32x32: score identity distillation, the case D = inf with SiD's own settings.

    deepspeed recipes/cifar_sid.py --teacher edm-cifar10-32x32-uncond-vp.pkl
    deepspeed recipes/cifar_sid.py --teacher edm-cifar10-32x32-cond-vp.pkl
    deepspeed recipes/cifar_sid.py --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is `cifar_ipfm.py`.
Batch 256, learning rate 1e-5, alpha 1.2, ddpm++ with dropout 0.13, augmentation 0.12.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import recipe_options, run_command
from ipfm.recipes import cifar_ipfm

RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_sid.py",
    __doc__,
    recipe_options(replace(cifar_ipfm.BASE, alpha=1.2, dropout=0.13)),
    preset="cifar10-ddpmpp",
    D=math.inf,
    settings_of="SiD (arXiv 2404.04057)",
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
