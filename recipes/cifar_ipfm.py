"""CIFAR-10, 32x32: distils a PFGM++ or EDM teacher with the published settings, for every D and alpha of the paper.

    deepspeed recipes/cifar_ipfm.py --teacher cifar10_ncsnpp_D_2048.pkl --D 2048
    deepspeed recipes/cifar_ipfm.py --teacher edm-cifar10-32x32-uncond-ve.pkl --alpha 0.5 --steps 4
    deepspeed recipes/cifar_ipfm.py --D 128 --dry-run

Settings: arXiv 2509.22454, CIFAR-10, unconditional (ncsn++, batch 256, learning rate 1e-5, Adam with beta1 = 0, no
dropout, augmentation 0.12 in the student's step, alpha 1.0; two student updates per generator update at D = 2048, as in
the authors' script). Table 1 has D = 128, 2048, inf, alpha = 0.5 (printed there as 0.0) and 1.0, and 1, 2, 4 steps. The
paper does not print the length of its runs: 100 000 thousand images here are this project's choice.
"""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, recipe_options, run_command

BASE = DistillConfig(
    batch=256,
    kimg=100_000,
    lr=1e-5,
    ema_kimg=500,
    alpha=1.0,
    dropout=0.0,
    augment=0.12,
    heun_steps=18,
    log_every=50,
)

TEACHERS = """\
  PFGM++, D = 128, 2048, inf   training-state-*.pt, ncsn++       README of the repository Newbeeer/pfgmpp
  PFGM++, converted            cifar10_ncsnpp_D_2048.pkl, ...    README of daniil-shlenskii/pfgmpp-idmd
  EDM, D = inf                 edm-cifar10-32x32-uncond-ve.pkl (ncsn++), -vp.pkl (ddpm++)    README of NVlabs/edm
To train one: deepspeed recipes/cifar_teacher.py --data cifar-10-python.tar.gz --D 2048"""


def variant(base: DistillConfig, D: float) -> DistillConfig:
    """The settings for this D."""
    return replace(base, student_updates=2) if D == 2048 else base


RECIPE = DistilRecipe(
    file="cifar_ipfm.py",
    about=__doc__ or "",
    dataset="cifar10",
    title="CIFAR-10",
    shape=(3, 32, 32),
    preset="cifar10-ncsnpp",
    D=2048.0,
    base=recipe_options(BASE),
    variant=variant,
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
