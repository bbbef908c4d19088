"""ImageNet, 64x64, class-conditional: distils EDM2's teachers. Settings of SiD for EDM2's networks of ImageNet-512; not
published for this method.

    deepspeed recipes/imagenet64_edm2_ipfm.py --teacher edm2-img64-s-1073741-0.075.pkl
    deepspeed recipes/imagenet64_edm2_ipfm.py --size xl --dry-run

As `imagenet512_edm2_ipfm.py`, but for the noise levels of the student's step: SiD's are those that its teachers were
trained with, and these ones' are EDM2's for pixels, ln sigma of mean -0.8 and deviation 1.6. The length is the budget
of arXiv 2509.22454, 30 000 thousand images.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine import NoiseLevels
from ipfm.engine.experiments import Size, SizedDistillationOptions, origins, recipe_options, run_command
from ipfm.recipes import imagenet512_edm2_ipfm

BASE = replace(imagenet512_edm2_ipfm.BASE, noise=NoiseLevels(p_mean=-0.8, p_std=1.6))

# The smallest FID without guidance of each size.
SIZES = {
    "s": Size("edm2-img64-s", "edm2-img64-s-1073741-0.075.pkl"),
    "m": Size("edm2-img64-m", "edm2-img64-m-2147483-0.060.pkl"),
    "l": Size("edm2-img64-l", "edm2-img64-l-1073741-0.040.pkl"),
    "xl": Size("edm2-img64-xl", "edm2-img64-xl-0671088-0.040.pkl"),
}

TEACHERS = """\
They are EDM2's post-hoc averages of the smallest FID: README of NVlabs/edm2. DDO's edm2-img64-s-ddo.pkl is one of size
s. To train one: deepspeed recipes/train_teacher.py --data imagenet-64x64.zip --conditional --preset edm2-img64-s"""

NOISE = origins(
    "EDM2", noise="p_mean -0.8, p_std 1.6: the teachers', as SiD takes those of its teachers; its t_max 800"
)

RECIPE = replace(
    imagenet512_edm2_ipfm.RECIPE,
    file="imagenet64_edm2_ipfm.py",
    about=__doc__ or "",
    dataset="imagenet-64",
    title="ImageNet-64",
    images="the images of ImageNet-64 are",
    shape=(3, 64, 64),
    preset="edm2-img64-s",
    sizes=SIZES,
    D=math.inf,
    base=recipe_options(BASE, SizedDistillationOptions),
    origins={**imagenet512_edm2_ipfm.ORIGINS, **NOISE},
    settings_from="ImageNet-64: these settings are carried over from SiD's for EDM2's networks of ImageNet-512; no "
    "result of this method is published for these networks",
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
