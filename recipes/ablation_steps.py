"""Few steps: generators of K = 1, 2, 4 network evaluations from one teacher, and their levels.

    deepspeed recipes/ablation_steps.py
    python recipes/ablation_steps.py --variants K1 K4 --out runs/four
    python recipes/ablation_steps.py --data fashion --variants K2 K4
    deepspeed recipes/ablation_steps.py --data cifar --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

K2 and K4 have the default levels (2.5, 1.25 and 2.5, 1.875, 1.25, 0.625), K2-low and K4-low lower ones (2.5, 0.8 and
2.5, 1.2, 0.6, 0.3); K4-last passes the gradient through a last evaluation drawn at random. All are trained on as many
images; the table has their network evaluations and images a second.

The claims that are judged: K = 2 and K = 4 reach their teacher. Confirmed where the mean distance of the last
generators, of three sets of samples for each seed, exceeds that of the teacher's three sets by no more than these are
apart; refuted where every set of every generator lies above all of the teacher's.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-steps. The same command goes on where it was
stopped. Measured: docs/results.md.
"""

from __future__ import annotations

from ipfm.engine.experiments import Ablation, Claim, ReachesTeacher, Variant, run_command
from ipfm.recipes import digits_ipfm
from ipfm.recipes.ablation_data import CIFAR, CLOTHES, digits_ablation, fashion_ablation

ABLATION = Ablation(
    file="ablation_steps.py",
    about=__doc__ or "",
    name="steps",
    title="Network evaluations of the generator",
    variants=(
        Variant(label="K1", settings={"steps": 1}),
        Variant(label="K2", settings={"steps": 2}),
        Variant(label="K4", settings={"steps": 4}),
        Variant(label="K2-low", settings={"steps": 2, "sigmas": (2.5, 0.8)}),
        Variant(label="K4-low", settings={"steps": 4, "sigmas": (2.5, 1.2, 0.6, 0.3)}),
        Variant(label="K4-last", settings={"steps": 4, "gradient": "last"}),
    ),
    claims=tuple(
        Claim(
            text=f"a generator of K = {K} evaluations reaches its teacher",
            source="arXiv 2509.22454, table 1",
            criterion=ReachesTeacher(label=f"K{K}"),
        )
        for K in (2, 4)
    ),
    # At the learning rate of the digits recipe, 3e-4, four evaluations are unstable.
    digits=digits_ablation(digits_ipfm.RECIPE, lr=1.5e-4, max_steps=600, eval_every=100),
    # Half the recipe's learning rate, as on the digits.
    fashion=fashion_ablation(CLOTHES, lr=2.5e-4),
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
