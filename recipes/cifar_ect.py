"""CIFAR-10, 32x32: consistency tuning of an EDM teacher on real images, or of a PFGM++ one at any D.

    deepspeed recipes/cifar_ect.py --teacher edm-cifar10-32x32-uncond-vp.pkl --real-data cifar-10-python.tar.gz
    deepspeed recipes/cifar_ect.py --teacher T --real-data cifar10.zip --sigmas 80 0.821
    deepspeed recipes/cifar_ect.py --teacher T --real-data cifar10.zip --init runs/CMT --out runs/CMT-ECT

The settings of locuslab/ect: q = 2, a stage of 3.2 million images, Rectified Adam at 1e-4, batch 128, dropout 0.2,
average 0.9999, 400 000 steps; FID 3.60 with one step, 2.11 with two (80 0.821). With --init, the second stage of a
consistency mid-training (cifar_cmt.py), sony/cmt's: q = 4096 throughout, the rate falling to 0, 12.8 million images;
FID 2.74, and 1.97 with two (80 0.7757). --pairs euler or heun asks the teacher's ODE for the second point of a pair:
consistency distillation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipfm.engine.experiments import ema_kimg, origins, recipe_options, run_command
from ipfm.engine.objectives.ect import EctConfig
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

BASE = EctConfig(
    batch=128,
    kimg=51_200,
    lr=1e-4,
    dropout=0.2,
    ema_kimg=ema_kimg(0.9999, 128),
    ema_rampup=1e6,
    heun_steps=18,
    log_every=50,
)

ORIGINS = {
    **origins(
        "script", "batch", "kimg", "lr", "dropout", "ema_kimg", "q", "q_kimg", "t_mean", "t_std", "pairs", "huber"
    ),
    **origins("ours", "beta1", "eps", ema_rampup="none, so that every step has the script's decay"),
}
# What follows a consistency mid-training.
SECOND_STAGE: Mapping[str, Any] = {"q": 4096.0, "q_kimg": 0.0, "lr_schedule": "linear", "kimg": 12_800}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """What a second stage has otherwise."""
    return SECOND_STAGE if isinstance(settings.get("init"), Path) else {}


RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_ect.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Easy Consistency Tuning (locuslab/ect), D = inf there",
    preset="cifar10-ddpmpp",
    variant=variant,
    origins=ORIGINS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
