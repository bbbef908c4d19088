"""Teachers of any size, grey or colour, with classes or without: physics informed distillation.

    deepspeed recipes/distill_pid.py --teacher edm-ffhq-64x64-uncond-vp.pkl --data ffhq-64x64.zip
    deepspeed recipes/distill_pid.py --teacher network-snapshot-010000.pkl --lpips vgg.pth

As `distill_ipfm.py`, with the settings of cifar_pid.py (29 to 47 pixels a side) and imagenet64_pid.py (48 and more).
The distance is the paper's, LPIPS, where --lpips names its weights or --distance lpips is given, and else l2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine import PidConfig
from ipfm.engine.experiments import TRAJECTORY_BY_SIZE, Facts, Origin, OwnDistillationOptions, options_for, run_command
from ipfm.recipes import cifar_pid, distill_ipfm, imagenet64_pid


def adapted(facts: Facts, given: Collection[str]) -> Mapping[str, tuple[Any, Origin]]:
    """The distance that needs no file, unless one is given."""
    if {"lpips", "distance", "lpips_side"} & set(given):
        return {}
    return {"distance": ("l2", Origin("ours", "the paper has lpips, which --lpips FILE gives"))}


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
    table=TRAJECTORY_BY_SIZE,
    adapted=adapted,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
