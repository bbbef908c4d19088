"""Where alpha = 1.2 diverges: ncsn++ and ddpm++, each at D = 128, 2048, inf, distilled with the same settings.

    deepspeed recipes/ablation_divergence.py
    python recipes/ablation_divergence.py --alpha 1 --out runs/ablation-divergence-1
    python recipes/ablation_divergence.py --data fashion
    deepspeed recipes/ablation_divergence.py --data cifar --variants ncsnpp-D128 ncsnpp-D2048 --teachers \
ncsnpp-D128=training-state-d128.pt ncsnpp-D2048=cifar10_ncsnpp_D_2048.pkl --reference cifar10-32x32.npz \
--inception inception-2015-12-05.pt

Appendix B of arXiv 2509.22454, where it was seen on CIFAR-10: with ncsn++ at D = inf and at one finite D the runs
diverged, at another they remained stable; with ddpm++ at D = inf they were stable and matched SiD. That is the claim
that is judged. A run has diverged where it stopped because its samples were not finite, or where its distance stays,
from some evaluation to the end, above 5 times its lowest; a variant has where most of its runs have.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-divergence. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import Ablation, Arch, Claim, Diverge, Variant, as_ablation, run_command
from ipfm.recipes.ablation_data import CIFAR, CLOTHES, DIGITS, fashion_ablation

ARCHITECTURES: tuple[Arch, ...] = ("ncsnpp", "ddpmpp")

ABLATION = Ablation(
    file="ablation_divergence.py",
    about=__doc__ or "",
    name="divergence",
    title="alpha = 1.2 by architecture and auxiliary dimensions D",
    variants=tuple(
        Variant(label=f"{arch}-D{D:g}", D=D, arch=arch) for arch in ARCHITECTURES for D in (128.0, 2048.0, math.inf)
    ),
    claims=(
        Claim(
            text="with alpha = 1.2 ncsn++ diverges at D = inf and at one finite D, and ddpm++ does not at D = inf",
            source="arXiv 2509.22454, appendix B",
            criterion=Diverge(
                diverging=("ncsnpp-Dinf",), one_of=("ncsnpp-D128", "ncsnpp-D2048"), stable=("ddpmpp-Dinf",)
            ),
        ),
    ),
    digits=replace(DIGITS, base=as_ablation(DIGITS.base, alpha=1.2)),
    # Eighteen runs and six teachers: networks of half the recipe's width. The learning rate stays, as in SiD: to fall
    # to 0 would end what the claim is about.
    fashion=fashion_ablation(
        CLOTHES,
        channels=8,
        alpha=1.2,
        max_steps=800,
        eval_every=80,
        teacher_steps=2000,
        lr_schedule="constant",
    ),
    cifar=replace(CIFAR, base=as_ablation(CIFAR.base, alpha=1.2)),
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
