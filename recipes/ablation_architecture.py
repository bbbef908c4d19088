"""The architecture: ncsn++, ddpm++ and ADM, a teacher of each, distilled with the same settings.

    deepspeed recipes/ablation_architecture.py
    deepspeed recipes/ablation_architecture.py --data cifar --variants ncsnpp ddpmpp --teachers \
ncsnpp=edm-cifar10-32x32-uncond-ve.pkl ddpmpp=edm-cifar10-32x32-uncond-vp.pkl --reference cifar10-32x32.npz \
--inception inception-2015-12-05.pt

On the digits the three networks have the same widths and 180 000 to 191 000 parameters. Leaves ablation.csv,
ablation.png and ablation.md in runs/ablation-architecture. The same command goes on where it was stopped. Measured:
docs/results.md.
"""

from __future__ import annotations

from ipfm.engine.experiments import Ablation, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

ABLATION = Ablation(
    file="ablation_architecture.py",
    about=__doc__ or "",
    name="architecture",
    title="Architecture of teacher, student and generator",
    variants=(
        Variant(label="ncsnpp", arch="ncsnpp"),
        Variant(label="ddpmpp", arch="ddpmpp"),
        Variant(label="adm", arch="adm"),
    ),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
