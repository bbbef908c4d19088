"""The methods side by side: IPFM and what may be added to it, DMD, CMT, PID; at D = 128 and inf.

    python recipes/ablation_methods.py
    python recipes/ablation_methods.py --variants D128-ipfm D128-real --seeds 0 1 2 3 4 --out runs/real
    python recipes/ablation_methods.py --data fashion --variants D128-ipfm D128-real D128-discriminator D128-both
    deepspeed recipes/ablation_methods.py --data cifar --variants D2048-ipfm D2048-dmd --teacher \
cifar10_ncsnpp_D_2048.pkl --reference cifar10-32x32.npz --inception inception-2015-12-05.pt

Every generator sees as many images, makes one in one evaluation, and has its method's own optimiser and average, as in
the recipe of the method. The table has what an iteration costs besides: forward passes of an image, a backward pass
counted as two, and the memory of a process, predicted. real is RealUID's term (--real-data names other images than the
teacher's own), discriminator SiDA's, both the two; second is a second stage with the first of them, after the
generator of ipfm: it has seen twice as many images; lora has a student of low-rank factors on the teacher's weights.
docs/objectives.md says what each needs, and which to take.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-methods. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import math

from ipfm.engine import PidConfig
from ipfm.engine.experiments import OWN, Ablation, Variant, run_command
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.engine.objectives.dmd import DmdConfig
from ipfm.recipes import digits_ipfm
from ipfm.recipes.ablation_data import CIFAR, CLOTHES, digits_ablation, fashion_ablation

# Of methods other than the data's recipe has: their optimiser and average, as in recipes of theirs for small images.
DMD = DmdConfig(lr=3e-4, ema_kimg=10.0, ema_rampup=0.2)
CMT = CmtConfig(lr=1e-3, ema_kimg=5.0, ema_rampup=0.2)
PID = PidConfig(lr=1e-3, ema_kimg=5.0, ema_rampup=0.2, points=120, difference="central")
# With a discriminator, which needs images itself, RealUID's term is asked for.
REALUID = {"real_weights": (0.92, 0.94)}
# Adam moves a product of factors less than it would the weights: ten times the learning rate of the digits' recipe.
LORA = {"student": "lora", "student_lr": 3e-3}


def variants(D: float) -> tuple[Variant, ...]:
    """Every method at this D."""
    name = f"D{D:g}"
    return (
        Variant(label=f"{name}-ipfm", D=D, settings={"real_data": None}),
        Variant(label=f"{name}-real", D=D, settings={"real_data": OWN}),
        Variant(label=f"{name}-discriminator", D=D, settings={"real_data": OWN, "discriminator": "encoder"}),
        Variant(label=f"{name}-both", D=D, settings={"real_data": OWN, "discriminator": "encoder", **REALUID}),
        Variant(label=f"{name}-second", D=D, after=f"{name}-ipfm", settings={"real_data": OWN}),
        Variant(label=f"{name}-lora", D=D, settings={"real_data": None, **LORA}),
        Variant(label=f"{name}-dmd", D=D, of=DMD),
        Variant(label=f"{name}-cmt", D=D, of=CMT),
        Variant(label=f"{name}-pid", D=D, of=PID),
    )


ABLATION = Ablation(
    file="ablation_methods.py",
    about=__doc__ or "",
    name="methods",
    title="Methods, as many images each",
    variants=variants(128.0) + variants(math.inf),
    further=(Variant(label="D2048-ipfm", D=2048.0, settings={"real_data": None}),),
    costs=True,
    digits=digits_ablation(digits_ipfm.RECIPE, max_steps=300, eval_every=50),
    fashion=fashion_ablation(CLOTHES, max_steps=300, eval_every=50),
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
