"""The regularisation: alpha = 0.5, 0.75, 1, 1.2, 1.5 on one teacher; which runs diverge. Further: alpha0.

    deepspeed recipes/ablation_alpha.py
    python recipes/ablation_alpha.py --arch ddpmpp --out runs/ablation-alpha-ddpmpp
    python recipes/ablation_alpha.py --variants alpha0 alpha0.5 alpha1 alpha1.2 --out runs/ablation-alpha-0
    python recipes/ablation_alpha.py --data fashion
    deepspeed recipes/ablation_alpha.py --data cifar --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

alpha is SiD's: 0.5 is the pure objective of arXiv 2509.22454 (printed there as 0.0; 0 here adds what 1 takes away), 1
its recommendation; 1.0 and 1.2 are the values that SiD names. With 1.2 and ncsn++ teachers the paper saw runs diverge
at D = inf and at one finite D, and stay stable at another: `ablation_divergence.py`. On the digits the teacher is
ncsn++ unless --arch says otherwise, with --data fashion ddpm++.

The claim that is judged: alpha = 1 ends lower than alpha = 1/2. Confirmed where the 95 % interval of the difference of
the last distances, by seed, lies below 0.

--data cifar takes teachers and images of 3x32x32, CIFAR-10's or one's own. Leaves ablation.csv, ablation.png and
ablation.md in runs/ablation-alpha. The same command goes on where it was stopped. Measured: docs/results.md.
"""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine.experiments import Ablation, Claim, EndsLower, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

ABLATION = Ablation(
    file="ablation_alpha.py",
    about=__doc__ or "",
    name="alpha",
    title="Regularisation alpha",
    variants=tuple(Variant(label=f"alpha{a:g}", settings={"alpha": a}) for a in (0.5, 0.75, 1.0, 1.2, 1.5)),
    further=(Variant(label="alpha0", settings={"alpha": 0.0}),),
    claims=(
        Claim(
            text="alpha = 1 ends lower than alpha = 1/2",
            source="arXiv 2509.22454, table 1",
            criterion=EndsLower(lower="alpha1", higher="alpha0.5"),
        ),
    ),
    digits=replace(DIGITS, base=replace(DIGITS.base, arch="ncsnpp")),
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
