"""AFHQv2, 64x64: score identity distillation, the case D = inf with SiD's own settings.

    deepspeed recipes/afhqv2_sid.py --teacher edm-afhqv2-64x64-uncond-vp.pkl
    deepspeed recipes/afhqv2_sid.py --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is `afhqv2_ipfm.py`.
Batch 512, learning rate 5e-6, alpha 1.0, dropout 0.05, augmentation 0.15.
Epsilon 1e-6, there with fp16; no TF32. The length is SiD's, 500 million images;
`--kimg 100000` is what it calls very competitive.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import recipe_options, run_command
from ipfm.recipes import afhqv2_ipfm, cifar_sid

RECIPE = afhqv2_ipfm.RECIPE.with_options(
    "afhqv2_sid.py",
    __doc__,
    recipe_options(replace(afhqv2_ipfm.BASE, kimg=500_000, tf32=False)),
    D=math.inf,
    settings_of="SiD (arXiv 2404.04057)",
    origins=cifar_sid.ORIGINS_64,
    formerly={"kimg": (100_000,), "eps": (1e-8,)},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
