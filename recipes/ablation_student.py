"""The student: 1, 2, 3, 5 updates, its average in the generator's step, its noise levels; one varied at a time.

    python recipes/ablation_student.py
    python recipes/ablation_student.py --variants updates1 updates5 ema0.9 half --seeds 0 1 2 3 4
    python recipes/ablation_student.py --data fashion
    deepspeed recipes/ablation_student.py --data cifar --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

updates1 is the method as it is. Every variant has as many updates of the generator; with more of the student a step
takes longer, which the table's images/s say. ema is the decay, an update of the student, of the average that the
generator is trained by. half and generator are the student's levels: half of them, or all, by the generator's law.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-student. The same command goes on where it was
stopped.
"""

from __future__ import annotations

from ipfm.engine.experiments import Ablation, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

# What every variant varies is in every one, so that none of it can be given.
AS_IT_IS = {"student_updates": 1, "student_ema": None, "levels_student": None}

ABLATION = Ablation(
    file="ablation_student.py",
    about=__doc__ or "",
    name="student",
    title="Updates, average and noise levels of the student",
    variants=(
        *(Variant(label=f"updates{n}", settings={**AS_IT_IS, "student_updates": n}) for n in (1, 2, 3, 5)),
        *(Variant(label=f"ema{decay:g}", settings={**AS_IT_IS, "student_ema": decay}) for decay in (0.9, 0.99)),
        *(Variant(label=law, settings={**AS_IT_IS, "levels_student": law}) for law in ("half", "generator")),
    ),
    further=(Variant(label="ema0.999", settings={**AS_IT_IS, "student_ema": 0.999}),),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
