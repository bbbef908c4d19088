"""CIFAR-10, 32x32: score identity distillation, the case D = inf with SiD's own settings.

    deepspeed recipes/cifar_sid.py --teacher edm-cifar10-32x32-uncond-vp.pkl
    deepspeed recipes/cifar_sid.py --teacher edm-cifar10-32x32-cond-vp.pkl
    deepspeed recipes/cifar_sid.py --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is `cifar_ipfm.py`.
Batch 256, learning rate 1e-5, alpha 1.2, ddpm++ with dropout 0.13, augmentation 0.12.
No TF32. The length is SiD's, 500 million images, 800 for conditional networks;
`--kimg 100000` is what it calls very competitive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import origins, recipe_options, run_command
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

# Of every recipe of SiD's.
ORIGINS = {
    **origins("SiD", "alpha", "batch", "lr", "generator_beta1", "student_beta1", "student_updates", "sigma_init"),
    **origins("SiD", "noise", "dropout", "augment", "ema_kimg", "ema_rampup", "eps", "tf32"),
    **origins("SiD", kimg="800 Mimg for conditional networks of CIFAR-10; 100 Mimg are called very competitive"),
    **origins("ours", precision="auto; SiD has fp32"),
}
# Of those of 64x64 images.
ORIGINS_64 = {
    **ORIGINS,
    **origins("SiD", kimg="100 Mimg are called very competitive", eps="1e-6, there with fp16"),
    **origins("ours", precision="auto; SiD has fp16, which --precision fp16 asks for"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """SiD's longer run of conditional networks."""
    return {"kimg": 800_000} if network.label_dim and settings.get("max_steps") is None else {}


RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_sid.py",
    __doc__,
    recipe_options(replace(cifar_ipfm.BASE, alpha=1.2, dropout=0.13, kimg=500_000, tf32=False)),
    preset="cifar10-ddpmpp",
    D=math.inf,
    settings_of="SiD (arXiv 2404.04057)",
    variant=variant,
    origins=ORIGINS,
    formerly={"kimg": (100_000,)},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
