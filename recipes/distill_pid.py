"""Teachers of any size, grey or colour, with classes or without: physics informed distillation.

    deepspeed recipes/distill_pid.py --teacher edm-ffhq-64x64-uncond-vp.pkl --data ffhq-64x64.zip
    deepspeed recipes/distill_pid.py --teacher network-snapshot-010000.pkl --lpips vgg.pth

As `distill_ipfm.py`, with the settings of cifar_pid.py (29 to 47 pixels a side) and imagenet64_pid.py (48 and more).
The distance is the paper's, LPIPS, where --lpips names its weights or --distance lpips is given, and else l2 with
gradients clipped to a norm of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine import PidConfig
from ipfm.engine.experiments import TRAJECTORY_BY_SIZE, Facts, Origin, OwnDistillationOptions, options_for, run_command
from ipfm.recipes import cifar_pid, distill_ipfm, imagenet64_pid


def adapted(facts: Facts, given: Mapping[str, Any]) -> Mapping[str, tuple[Any, Origin]]:
    """The distance that needs no file, unless one is given; and with it first steps that images of any size bear."""
    if {"lpips", "lpips_side"} & given.keys() or given.get("distance", "l2") != "l2":
        return {}
    # Rectified Adam's first steps are those of gradient descent, and l2 is a sum over all pixels.
    clip = Origin("ours", "l2 grows with the number of pixels, and the first steps diverged without")
    distance = Origin("ours", "the paper has lpips, which --lpips FILE gives")
    return {"distance": ("l2", distance), "clip_grad": (1.0, clip)}


RECIPE = replace(
    distill_ipfm.RECIPE,
    file="distill_pid.py",
    about=__doc__ or "",
    preset=cifar_pid.RECIPE.preset,
    D=cifar_pid.RECIPE.D,
    base=options_for(PidConfig, OwnDistillationOptions)(features="auto", distance="lpips"),
    rows={
        "cifar": cifar_pid.RECIPE,
        **dict.fromkeys(("ffhq", "afhqv2", "imagenet", "from-96"), imagenet64_pid.RECIPE),
    },
    edm2={},
    table=TRAJECTORY_BY_SIZE,
    adapted=adapted,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
