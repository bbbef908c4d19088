"""D by alpha: D = 128 and inf, alpha = 0.5 and 1, a teacher for each D. Further: D2048, alpha 1.2 and 1.5.

    python recipes/ablation_D_alpha.py --data fashion
    python recipes/ablation_D_alpha.py --data fashion --variants D128-alpha0.5 D128-alpha1 D128-alpha1.2 D128-alpha1.5
    deepspeed recipes/ablation_D_alpha.py --data cifar --variants D128-alpha1 Dinf-alpha1 --teachers \
D128-alpha1=training-state-d128.pt Dinf-alpha1=edm-cifar10-32x32-uncond-ve.pkl --reference cifar10-32x32.npz \
--inception inception-2015-12-05.pt

Claims of arXiv 2509.22454 that are judged, each where its two variants are run: at both D, alpha = 1 ends lower than
1/2 (table 1), by the last distances; at both alpha, D = 128 converges faster than inf early on (figure 2), by the way
to the teacher that is left, ln(distance / its teacher's) / ln(first distance / its teacher's), on average over the
first half of the images. Confirmed where the 95 % t interval of the
difference, by seed, lies below 0, refuted where it lies above.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-D-alpha. The same command goes on where it was
stopped, and another choice of --variants adds to what is there.
"""

from __future__ import annotations

import math

from ipfm.engine.experiments import Ablation, Claim, EndsLower, FasterEarly, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION


def variants(Ds: tuple[float, ...], alphas: tuple[float, ...]) -> tuple[Variant, ...]:
    """Every D with every alpha."""
    return tuple(Variant(label=f"D{D:g}-alpha{a:g}", D=D, settings={"alpha": a}) for D in Ds for a in alphas)


ABLATION = Ablation(
    file="ablation_D_alpha.py",
    about=__doc__ or "",
    name="D-alpha",
    title="Auxiliary dimensions D by regularisation alpha",
    variants=variants((128.0, math.inf), (0.5, 1.0)),
    further=(*variants((128.0, math.inf), (1.2, 1.5)), *variants((2048.0,), (0.5, 1.0, 1.2, 1.5))),
    claims=(
        *(
            Claim(
                text=f"alpha = 1 ends lower than alpha = 1/2, at D = {D}",
                source="arXiv 2509.22454, table 1",
                criterion=EndsLower(lower=f"D{D}-alpha1", higher=f"D{D}-alpha0.5"),
            )
            for D in ("128", "inf")
        ),
        *(
            Claim(
                text=f"D = 128 converges faster than D = inf early on, at alpha = {alpha}",
                source="arXiv 2509.22454, abstract, figure 2",
                criterion=FasterEarly(faster=f"D128-alpha{alpha}", slower=f"Dinf-alpha{alpha}"),
            )
            for alpha in ("0.5", "1")
        ),
    ),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
