"""Handwritten digits, 8x8: trains a small PFGM++ teacher on real data and distils it to one step, on any machine.

    deepspeed recipes/digits_ipfm.py
    python recipes/digits_ipfm.py --alpha 0.5 --out runs/half

The data are scikit-learn's bundled digits (1797 images). Everything is chosen so that two CPU cores need a few minutes.
"""

from __future__ import annotations

from ipfm.engine import DistillConfig, TeacherConfig
from ipfm.engine.data.dataset import digits
from ipfm.engine.evaluation.metrics import PixelFeatures
from ipfm.engine.experiments import TrainAndDistil, recipe_options, run_command
from ipfm.models import presets

RECIPE = TrainAndDistil(
    file="digits_ipfm.py",
    about=__doc__ or "",
    name=lambda _: "digits",
    title="digits",
    data=digits,
    network=lambda _, D: presets.get("digits", D=D),
    features=PixelFeatures,
    compared="in pixel space",
    D=128.0,
    base=recipe_options(
        DistillConfig(
            batch=64,
            max_steps=300,
            lr=3e-4,
            ema_kimg=10.0,
            ema_rampup=0.2,
            alpha=1.0,
            eval_every=50,
            checkpoint_every=100,
        ),
        eval_images=2000,
        teacher_steps=900,
    ),
    training=TeacherConfig(batch=128, lr=2e-3, lr_rampup_kimg=6.4, ema_kimg=10.0, checkpoint_every=250),
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
