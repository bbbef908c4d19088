"""AFHQv2, 64x64: score identity distillation, the case D = inf with SiD's own settings.

    deepspeed recipes/afhqv2_sid.py --teacher edm-afhqv2-64x64-uncond-vp.pkl
    deepspeed recipes/afhqv2_sid.py --dry-run

The loss of SiD (arXiv 2404.04057, eq. 23) is half of IPFM's at the same alpha; everything else is `afhqv2_ipfm.py`.
Batch 512, learning rate 5e-6, alpha 1.0, dropout 0.05, augmentation 0.15.
"""

from __future__ import annotations

import math

from ipfm.engine.experiments import recipe_options, run_command
from ipfm.recipes import afhqv2_ipfm

RECIPE = afhqv2_ipfm.RECIPE.with_options(
    "afhqv2_sid.py",
    __doc__,
    recipe_options(afhqv2_ipfm.BASE),
    D=math.inf,
    settings_of="SiD (arXiv 2404.04057)",
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
