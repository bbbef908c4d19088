"""ImageNet, 64x64, class-conditional: distils an EDM teacher. Settings carried over from SiD; not published for this
method.

    deepspeed recipes/imagenet64_ipfm.py --teacher edm-imagenet-64x64-cond-adm.pkl --micro-batch 32 --zero 2
    deepspeed recipes/imagenet64_ipfm.py --dry-run

Batch 8192, learning rate 4e-6, Adam with beta1 = 0, alpha 1.2, dropout 0.1, no augmentation and an average with a
half-life of 2 million images are SiD's for ImageNet-64 (arXiv 2404.04057), as is epsilon 1e-6, there with fp16. The
length is the budget of arXiv 2509.22454, 30 000 thousand images.
"""

from __future__ import annotations

import math

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, origins, recipe_options, run_command
from ipfm.recipes import cifar_ipfm

BASE = DistillConfig(
    batch=8192,
    kimg=30_000,
    lr=4e-6,
    ema_kimg=2000,
    alpha=1.2,
    dropout=0.1,
    augment=0.0,
    eps=1e-6,
    heun_steps=40,
    log_every=10,
)

TEACHERS = """\
  EDM, D = inf           edm-imagenet-64x64-cond-adm.pkl (ADM, 1000 classes)             README of NVlabs/edm
This project has no recipe that trains such a teacher."""

ORIGINS = {
    **origins("paper", "sigma_init", "noise", "init", "student_init", "student_updates", kimg=cifar_ipfm.BUDGET),
    **origins("SiD", "batch", "lr", "generator_beta1", "student_beta1", "dropout", "augment", "ema_kimg", "ema_rampup"),
    **origins("SiD", "alpha", eps="1e-6 goes with fp16 there"),
    **origins("ours", "gradient", sigmas="those of several steps are not printed"),
}

RECIPE = DistilRecipe(
    file="imagenet64_ipfm.py",
    about=__doc__ or "",
    dataset="imagenet-64",
    title="ImageNet-64",
    shape=(3, 64, 64),
    preset="imagenet64-adm",
    D=math.inf,
    base=recipe_options(BASE),
    origins=ORIGINS,
    formerly={"kimg": (200_000,), "eps": (1e-8,)},
    settings_from="ImageNet-64: these settings are carried over from SiD (arXiv 2404.04057); no result of this method "
    "is published for this data set",
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
