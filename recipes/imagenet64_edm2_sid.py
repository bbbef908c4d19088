"""ImageNet, 64x64, class-conditional: score identity distillation of EDM2's teachers, with SiD's settings for
ImageNet-512.

    deepspeed recipes/imagenet64_edm2_sid.py --teacher edm2-img64-s-1073741-0.075.pkl
    deepspeed recipes/imagenet64_edm2_sid.py --size xl --dry-run

As `imagenet512_edm2_sid.py`, but for the noise levels of the student's step, see `imagenet64_edm2_ipfm.py`. The length
is SiD's there, 200 million images. SiD has published neither settings nor results for these teachers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import SizedDistillationOptions, origins, recipe_options, run_command
from ipfm.recipes import imagenet64_edm2_ipfm, imagenet512_edm2_ipfm, imagenet512_edm2_sid

ORIGINS = {
    **imagenet512_edm2_sid.ORIGINS,
    **imagenet64_edm2_ipfm.NOISE,
    **origins("SiD", kimg="200 Mimg, those of ImageNet-512"),
}

RECIPE = imagenet64_edm2_ipfm.RECIPE.with_options(
    "imagenet64_edm2_sid.py",
    __doc__,
    recipe_options(
        replace(imagenet64_edm2_ipfm.BASE, kimg=200_000, tf32=False),
        SizedDistillationOptions,
    ),
    D=math.inf,
    settings_of="SiD for EDM2's networks of ImageNet-512, carried over; it has published none for these",
    variant=imagenet512_edm2_ipfm.variant,
    origins=ORIGINS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
