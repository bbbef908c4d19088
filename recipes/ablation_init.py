"""First weights and width: generator from the teacher, random, random at half the width; student from random weights.

    deepspeed recipes/ablation_init.py
    python recipes/ablation_init.py --variants teacher half-width --max-steps 1000 --out runs/half
    deepspeed recipes/ablation_init.py --data cifar --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

teacher: generator and student start from the teacher. random, half-width: the generator alone starts from random
weights, at full or half width. random-student: the student alone does. Leaves ablation.csv, ablation.png and
ablation.md in runs/ablation-init. The same command goes on where it was stopped. Measured: docs/results.md.
"""

from __future__ import annotations

from ipfm.engine.experiments import Ablation, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

ABLATION = Ablation(
    file="ablation_init.py",
    about=__doc__ or "",
    name="init",
    title="First weights and width",
    variants=(
        Variant(label="teacher", settings={"init": "teacher"}),
        Variant(label="random", settings={"init": "random"}),
        Variant(label="half-width", settings={"init": "random", "width": 0.5}),
        Variant(label="random-student", settings={"init": "teacher", "student_init": "random"}),
    ),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
