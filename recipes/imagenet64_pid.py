"""ImageNet, 64x64, class-conditional: physics informed distillation of an EDM teacher.

    deepspeed recipes/imagenet64_pid.py --teacher edm-imagenet-64x64-cond-adm.pkl --lpips vgg.pth --zero 2
    deepspeed recipes/imagenet64_pid.py --distance l2 --dry-run

Tee et al., Physics Informed Distillation: 250 levels, LPIPS of images resized to a side of 244 (224 in the settings
published beside the paper: --lpips-side 224), Rectified Adam at the constant learning rate 1e-4, batch 2048, average
0.99995, no dropout, clipped gradients (at norm 1, this project's choice) and fp16, which `--precision fp16` asks for.
The paper prints no length; published beside it are 400 000 steps of 2048.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ipfm.engine import PidConfig
from ipfm.engine.experiments import ema_kimg, origins, recipe_options, run_command
from ipfm.engine.objectives.pid import PAPER_SIDE, SCRIPT_SIDE
from ipfm.models import NetworkConfig
from ipfm.recipes import imagenet64_ipfm

BASE = PidConfig(
    batch=2048,
    kimg=819_200,
    lr=1e-4,
    ema_kimg=ema_kimg(0.99995, 2048),
    ema_rampup=1e6,
    distance="lpips",
    clip_grad=1.0,
    heun_steps=40,
    log_every=10,
)

ORIGINS = {
    **origins("paper", "batch", "lr", "points", "difference", "distance", "dropout", "ema_kimg"),
    **origins("paper", lpips_side=f"{PAPER_SIDE}; {SCRIPT_SIDE} in the script"),
    **origins("script", kimg="400 000 steps of 2048"),
    **origins("ours", precision="auto; the paper has fp16", clip_grad="1; the paper clips, its norm is not known here"),
    **origins("ours", "beta1", "eps", ema_rampup="none, so that every step has the paper's decay"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """Images are resized before VGG, where there is a VGG."""
    return {"lpips_side": PAPER_SIDE} if settings.get("distance") == "lpips" else {}


RECIPE = imagenet64_ipfm.RECIPE.with_options(
    "imagenet64_pid.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="Physics Informed Distillation (Tee et al.), D = inf there",
    variant=variant,
    origins=ORIGINS,
    formerly={"kimg": (200_000,), "lpips_side": (None,), "clip_grad": (None,)},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
