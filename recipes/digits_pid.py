"""Handwritten digits, 8x8: trains a small teacher on real data and distils it by physics informed distillation.

    deepspeed recipes/digits_pid.py
    deepspeed recipes/digits_pid.py --D inf --difference central --points 120

Data, teacher and table are those of `digits_ipfm.py`. Two CPU cores need a few minutes.
"""

from __future__ import annotations

from ipfm.engine import PidConfig
from ipfm.engine.experiments import recipe_options, run_command
from ipfm.recipes import digits_ipfm

RECIPE = digits_ipfm.RECIPE.with_options(
    "digits_pid.py",
    __doc__,
    recipe_options(
        PidConfig(
            batch=64,
            max_steps=600,
            lr=1e-3,
            points=35,
            ema_kimg=5.0,
            ema_rampup=0.2,
            eval_every=100,
            checkpoint_every=200,
        ),
        eval_images=2000,
        teacher_steps=900,
    ),
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
