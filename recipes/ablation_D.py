"""The number of auxiliary dimensions: D = 8, 128, 2048, inf, a teacher for each, distilled with the same settings.

    deepspeed recipes/ablation_D.py
    python recipes/ablation_D.py --variants D128 Dinf --seeds 0 1 2 3 4
    python recipes/ablation_D.py --data fashion --variants D128 Dinf
    deepspeed recipes/ablation_D.py --data cifar --variants D128 D2048 Dinf --teachers D128=a.pt D2048=b.pt Dinf=c.pkl \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

The claim that is judged: D = 128 converges faster than D = inf early on (figure 2 of arXiv 2509.22454). Confirmed where
at D = 128 less of the way to the teacher is left, ln(distance / its teacher's) / ln(first distance / its teacher's), on
average over the first half of the images: the 95 % interval of the difference, by seed, lies below 0.

Leaves ablation.csv, ablation.png (Frechet distance over images, mean and range of the seeds) and ablation.md (a table,
and the verdict) in runs/ablation-D. The same command goes on where it was stopped. Measured: docs/results.md.
"""

from __future__ import annotations

import math

from ipfm.engine.experiments import Ablation, Claim, FasterEarly, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

ABLATION = Ablation(
    file="ablation_D.py",
    about=__doc__ or "",
    name="D",
    title="Auxiliary dimensions D of teacher and generator",
    variants=tuple(Variant(label=f"D{D:g}", D=D) for D in (8.0, 128.0, 2048.0, math.inf)),
    claims=(
        Claim(
            text="D = 128 converges faster than D = inf early on",
            source="arXiv 2509.22454, abstract, figure 2",
            criterion=FasterEarly(faster="D128", slower="Dinf"),
        ),
    ),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
