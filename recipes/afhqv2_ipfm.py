"""AFHQv2, 64x64: distils an EDM or PFGM++ teacher. Settings carried over from SiD; not published for this method.

    deepspeed recipes/afhqv2_ipfm.py --teacher edm-afhqv2-64x64-uncond-vp.pkl
    deepspeed recipes/afhqv2_ipfm.py --dry-run

Batch 512, learning rate 5e-6, Adam with beta1 = 0, alpha 1.0, dropout 0.05 and augmentation 0.15 in the student's step
are SiD's for AFHQv2-64 (arXiv 2404.04057). The length, 100 000 thousand images, is this project's choice.
"""

from __future__ import annotations

import math

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, recipe_options, run_command

BASE = DistillConfig(
    batch=512,
    kimg=100_000,
    lr=5e-6,
    ema_kimg=500,
    alpha=1.0,
    dropout=0.05,
    augment=0.15,
    heun_steps=40,
    log_every=50,
)

TEACHERS = """\
  EDM, D = inf           edm-afhqv2-64x64-uncond-vp.pkl (ddpm++), -ve.pkl (ncsn++)       README of NVlabs/edm
To train one at another D: deepspeed recipes/ffhq_teacher.py --data afhqv2-64x64.zip --D 128 --dropout 0.25"""

RECIPE = DistilRecipe(
    file="afhqv2_ipfm.py",
    about=__doc__ or "",
    dataset="afhqv2-64",
    title="AFHQv2-64",
    shape=(3, 64, 64),
    preset="afhqv2-64-ddpmpp",
    D=math.inf,
    base=recipe_options(BASE),
    settings_from="AFHQv2-64: these settings are carried over from SiD (arXiv 2404.04057); no result of this method is "
    "published for this data set",
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
