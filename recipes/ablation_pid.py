"""Physics informed distillation: D = inf and 128, first and central differences, N = 35, 120, 250 levels.

    deepspeed recipes/ablation_pid.py
    python recipes/ablation_pid.py --variants Dinf-first-N80 Dinf-first-N200 Dinf-first-N500 --out runs/further-levels
    python recipes/ablation_pid.py --variants Dinf-first-N35 Dinf-first-N250 --seeds 0 --out runs/levels
    deepspeed recipes/ablation_pid.py --data cifar --variants Dinf-first-N35 Dinf-first-N120 Dinf-first-N250 \
--teacher edm-cifar10-32x32-uncond-vp.pkl --reference cifar10-32x32.npz --inception inception-2015-12-05.pt

Finite D is this project's extension. The paper has N = 35, 80, 120, 200, 250, 500 and 1000: 80, 200, 500 and 1000 are
further variants, run when they are named. The distance is L2; with `--distance lpips --lpips vgg.pth --lpips-side 244`
LPIPS, as the paper has it. Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-pid. The same command
goes on where it was stopped. Measured: docs/results.md.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine.experiments import Ablation, Variant, as_ablation, run_command
from ipfm.recipes import cifar_pid, digits_pid
from ipfm.recipes.ablation_data import digits_ablation, fashion_ablation


def variants(*levels: int) -> tuple[Variant, ...]:
    """Both D, both differences, at these numbers of levels."""
    return tuple(
        Variant(label=f"D{D:g}-{difference}-N{points}", D=D, settings={"difference": difference, "points": points})
        for D in (math.inf, 128.0)
        for difference in ("first", "central")
        for points in levels
    )


ABLATION = Ablation(
    file="ablation_pid.py",
    about=__doc__ or "",
    name="pid",
    title="Physics informed distillation",
    variants=variants(35, 120, 250),
    further=variants(80, 200, 500, 1000),
    digits=digits_ablation(digits_pid.RECIPE, teacher_steps=600, seeds=(0, 1)),
    fashion=fashion_ablation(digits_pid.RECIPE.base, max_steps=1000, eval_every=100, teacher_steps=9000, seeds=(0, 1)),
    cifar=replace(
        cifar_pid.RECIPE,
        base=as_ablation(
            cifar_pid.RECIPE.base, data="cifar", kimg=20_000, eval_every=2000, distance="l2", max_bad_steps=50
        ),
    ),
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
