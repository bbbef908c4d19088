"""FFHQ, 64x64: distils a PFGM++ or EDM teacher, for every D and alpha of the paper.

    deepspeed recipes/ffhq_ipfm.py --teacher edm-ffhq-64x64-uncond-vp.pkl --steps 2
    deepspeed recipes/ffhq_ipfm.py --D 128 --dry-run

arXiv 2509.22454 has results for D = 128 and inf, alpha = 0.5 (printed there as 0.0) and 1.0, and 1 and 2 steps, with
ddpm++ teachers. Batch 512, learning rate 1e-5, Adam with beta1 = 0 (student) and 0.9 (generator), dropout 0.05 and
augmentation 0.15 in the student's step are SiD's for FFHQ-64 (arXiv 2404.04057), as is epsilon 1e-6, there with fp16.
The length is the paper's budget of "30k generator samples" a run, read as 30 000 thousand images.
"""

from __future__ import annotations

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, origins, recipe_options, run_command
from ipfm.recipes import cifar_ipfm

BASE = DistillConfig(
    batch=512,
    kimg=30_000,
    lr=1e-5,
    generator_beta1=0.9,
    ema_kimg=500,
    alpha=1.0,
    dropout=0.05,
    augment=0.15,
    eps=1e-6,
    heun_steps=40,
    log_every=50,
)

TEACHERS = """\
  PFGM++, D = 128, inf   training-state-*.pt, ddpm++                                     README of Newbeeer/pfgmpp
  EDM, D = inf           edm-ffhq-64x64-uncond-vp.pkl (ddpm++), -ve.pkl (ncsn++)         README of NVlabs/edm
To train one: deepspeed recipes/ffhq_teacher.py --data ffhq-64x64.zip --D 128"""

ORIGINS = {
    **origins(
        "paper", "alpha", "sigma_init", "noise", "init", "student_init", "student_updates", kimg=cifar_ipfm.BUDGET
    ),
    **origins("SiD", "batch", "lr", "generator_beta1", "student_beta1", "dropout", "augment", "ema_kimg", "ema_rampup"),
    **origins("SiD", eps="1e-6 goes with fp16 there"),
    **origins("ours", "gradient", sigmas="those of several steps are not printed"),
}

RECIPE = DistilRecipe(
    file="ffhq_ipfm.py",
    about=__doc__ or "",
    dataset="ffhq64",
    title="FFHQ-64",
    shape=(3, 64, 64),
    preset="ffhq64-ddpmpp",
    D=128.0,
    base=recipe_options(BASE),
    origins=ORIGINS,
    formerly={"kimg": (100_000,), "eps": (1e-8,)},
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
