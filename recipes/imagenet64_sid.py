"""ImageNet, 64x64, class-conditional: score identity distillation, the case D = inf with SiD's own settings.

    deepspeed recipes/imagenet64_sid.py --teacher edm-imagenet-64x64-cond-adm.pkl
    deepspeed recipes/imagenet64_sid.py --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is `imagenet64_ipfm.py`.
Batch 8192, learning rate 4e-6, alpha 1.2, dropout 0.1, no augmentation.
Epsilon 1e-6, there with fp16; no TF32. The length is SiD's, 1000 million images;
`--kimg 100000` is what it calls very competitive.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import recipe_options, run_command
from ipfm.recipes import cifar_sid, imagenet64_ipfm

RECIPE = imagenet64_ipfm.RECIPE.with_options(
    "imagenet64_sid.py",
    __doc__,
    recipe_options(replace(imagenet64_ipfm.BASE, kimg=1_000_000, tf32=False)),
    D=math.inf,
    settings_of="SiD (arXiv 2404.04057)",
    origins=cifar_sid.ORIGINS_64,
    formerly={"kimg": (200_000,), "eps": (1e-8,)},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
