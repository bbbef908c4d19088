"""ImageNet, 512x512, as latents: score identity distillation of EDM2's teachers, the case D = inf with SiD's settings.

    deepspeed recipes/imagenet512_edm2_sid.py --teacher edm2-img512-xs-2147483-0.135.pkl --vae sd-vae-ft-mse
    deepspeed recipes/imagenet512_edm2_sid.py --size xxl --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is
`imagenet512_edm2_ipfm.py`. Epsilon 1e-6, there with fp16; no TF32. The length is SiD's, 200 million images, 100 for
size XXL. Published are its generators of the sizes to XL (`edm2_img512_xs_sid_alpha1-249360.pkl` and so on), which
`ipfm evaluate` measures, and no FID of them; SiDA's figures are of another method, which takes real latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import SizedDistillationOptions, origins, recipe_options, run_command
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_sid, imagenet512_edm2_ipfm

SHORTER_CHANNELS = 448  # of size XXL

ORIGINS = {
    **cifar_sid.ORIGINS,
    **imagenet512_edm2_ipfm.SID,
    **origins("SiD", kimg="200 Mimg, 100 for size XXL"),
    **origins("ours", precision="auto; SiD has fp16, which --precision fp16 asks for"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """The dropout of large networks, and the shorter run of the largest."""
    shorter = network.model_channels >= SHORTER_CHANNELS and settings.get("max_steps") is None
    return {**imagenet512_edm2_ipfm.variant(settings, network), **({"kimg": 100_000} if shorter else {})}


RECIPE = imagenet512_edm2_ipfm.RECIPE.with_options(
    "imagenet512_edm2_sid.py",
    __doc__,
    recipe_options(
        replace(imagenet512_edm2_ipfm.BASE, kimg=200_000, tf32=False),
        SizedDistillationOptions,
    ),
    D=math.inf,
    settings_of="SiD's script for EDM2's networks (arXiv 2404.04057); its generators are published, and no FID of them",
    variant=variant,
    origins=ORIGINS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
