"""AFHQv2, 64x64: distils an EDM or PFGM++ teacher. Settings carried over from SiD; not published for this method.

    deepspeed recipes/afhqv2_ipfm.py --teacher edm-afhqv2-64x64-uncond-vp.pkl
    deepspeed recipes/afhqv2_ipfm.py --dry-run

Batch 512, learning rate 5e-6, Adam with beta1 = 0, alpha 1.0, dropout 0.05 and augmentation 0.15 in the student's step
are SiD's for AFHQv2-64 (arXiv 2404.04057), as is epsilon 1e-6, there with fp16. The length is the budget of arXiv
2509.22454, 30 000 thousand images.
"""

from __future__ import annotations

import math

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, origins, recipe_options, run_command
from ipfm.recipes import cifar_ipfm

BASE = DistillConfig(
    batch=512,
    kimg=30_000,
    lr=5e-6,
    ema_kimg=500,
    alpha=1.0,
    dropout=0.05,
    augment=0.15,
    eps=1e-6,
    heun_steps=40,
    log_every=50,
)

TEACHERS = """\
  EDM, D = inf           edm-afhqv2-64x64-uncond-vp.pkl (ddpm++), -ve.pkl (ncsn++)       README of NVlabs/edm
To train one at another D: deepspeed recipes/ffhq_teacher.py --data afhqv2-64x64.zip --D 128 --dropout 0.25"""

ORIGINS = {
    **origins("paper", "sigma_init", "noise", "init", "student_init", "student_updates", kimg=cifar_ipfm.BUDGET),
    **origins("SiD", "batch", "lr", "generator_beta1", "student_beta1", "dropout", "augment", "ema_kimg", "ema_rampup"),
    **origins("SiD", "alpha", eps="1e-6 goes with fp16 there"),
    **origins("ours", "gradient", sigmas="those of several steps are not printed"),
}

RECIPE = DistilRecipe(
    file="afhqv2_ipfm.py",
    about=__doc__ or "",
    dataset="afhqv2-64",
    title="AFHQv2-64",
    shape=(3, 64, 64),
    preset="afhqv2-64-ddpmpp",
    D=math.inf,
    base=recipe_options(BASE),
    origins=ORIGINS,
    formerly={"kimg": (100_000,), "eps": (1e-8,)},
    settings_from="AFHQv2-64: these settings are carried over from SiD (arXiv 2404.04057); no result of this method is "
    "published for this data set",
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
