"""Weight and noise levels of the generator's loss, one varied at a time: what reviewers of arXiv 2509.22454 asked for.

    python recipes/ablation_weights.py
    python recipes/ablation_weights.py --D inf --out runs/ablation-weights-Dinf
    python recipes/ablation_weights.py --variants sid sigma score loguniform --data fashion
    deepspeed recipes/ablation_weights.py --data cifar --teacher cifar10_ncsnpp_D_2048.pkl --D 2048 \
--reference cifar10-32x32.npz --inception inception-2015-12-05.pt

sid is the method as it is: the weight 1 / mean|T - y|, the levels grid:0:0.8. sigma, edm, score and unsquared are other
weights, power0.5 and power1 the first one times a power of sigma; the rest are other laws of the levels, with the first
weight. docs/objectives.md, "What may vary", has the formulas. Weights have different sizes, which Adam does not see.

Leaves ablation.csv, ablation.png and ablation.md in runs/ablation-weights. The same command goes on where it was
stopped.
"""

from __future__ import annotations

from ipfm.engine.experiments import Ablation, Variant, run_command
from ipfm.recipes.ablation_data import CIFAR, DIGITS, FASHION

WEIGHTS = ("sid", "sigma", "edm", "score", "unsquared")
POWERS = (0.5, 1.0)
LEVELS = {
    "dmd2": "grid:0.02:0.98",
    "rising": "rising:0.8",
    "lognormal": "lognormal:-0.4:1",
    "loguniform": "loguniform:0.02:24.4",
    "log-t": "log-t:0:0.2:0.01",
}

# What every variant varies is in every one, so that none of it can be given.
AS_IT_IS = {"weight": "sid", "weight_power": 0.0, "levels_generator": None}

ABLATION = Ablation(
    file="ablation_weights.py",
    about=__doc__ or "",
    name="weights",
    title="Weight and noise levels of the generator's loss",
    variants=(
        *(Variant(label=name, settings={**AS_IT_IS, "weight": name}) for name in WEIGHTS),
        *(Variant(label=f"power{p:g}", settings={**AS_IT_IS, "weight_power": p}) for p in POWERS),
        *(Variant(label=name, settings={**AS_IT_IS, "levels_generator": law}) for name, law in LEVELS.items()),
    ),
    digits=DIGITS,
    fashion=FASHION,
    cifar=CIFAR,
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
