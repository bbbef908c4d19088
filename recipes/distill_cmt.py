"""Teachers of any size, grey or colour, with classes or without: consistency mid-training.

    deepspeed recipes/distill_cmt.py --teacher runs/my-images-64-teacher-ddpmpp-D128/model --data my-images.zip
    deepspeed recipes/distill_cmt.py --teacher network-snapshot-010000.pkl --sigmas 80 0.821

As `distill_ipfm.py`, with the settings of cifar_cmt.py from 29 pixels a side on. The generator learns where the
teacher's ODE leads the points of trajectories from the prior: no data, no student, and one evaluation of the teacher
for each image of the batch. The distance is LPIPS, where --lpips names its weights or --distance lpips is given, and
else a pseudo-Huber loss of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ipfm.engine.experiments import Facts, Origin, OwnDistillationOptions, RowName, options_for, run_command
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.recipes import cifar_cmt, distill_ipfm


def adapted(facts: Facts, given: Mapping[str, Any]) -> Mapping[str, tuple[Any, Origin]]:
    """The distance that needs no file, unless one is given."""
    if {"lpips", "lpips_side"} & given.keys() or given.get("distance", "l2") != "l2":
        return {}
    return {"distance": ("l2", Origin("ours", "sony/cmt has lpips, which --lpips FILE gives"))}


_TABLE: Mapping[RowName, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {
            "batch": 64, "kimg": 38.4, "lr": 1e-3, "ema_kimg": 5.0, "ema_rampup": 0.2, "eval_every": 100,
            "checkpoint_every": 200, "eval_images": 1000, "heun_steps": 9,
        },
        "to-28": {"batch": 128, "kimg": 10_000.0, "lr": 2e-4, "ema_kimg": 100.0, "log_every": 50},
    }
)  # fmt: skip

RECIPE = replace(
    distill_ipfm.RECIPE,
    file="distill_cmt.py",
    about=__doc__ or "",
    preset=cifar_cmt.RECIPE.preset,
    D=cifar_cmt.RECIPE.D,
    base=options_for(CmtConfig, OwnDistillationOptions)(features="auto", distance="lpips"),
    rows=dict.fromkeys(("cifar", "ffhq", "afhqv2", "imagenet", "from-96"), cifar_cmt.RECIPE),
    table=_TABLE,
    edm2={},
    adapted=adapted,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
