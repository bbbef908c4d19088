"""Teachers of any size, grey or colour, with classes or without: consistency tuning on real images.

    deepspeed recipes/distill_ect.py --teacher runs/my-images-64-teacher-ddpmpp-D128/model --data my.zip --real-data own
    deepspeed recipes/distill_ect.py --teacher T --real-data my.zip --init runs/CMT --out runs/CMT-ECT

As `distill_ipfm.py`, with the settings of cifar_ect.py from 29 pixels a side on. The generator learns to give one image
along each path of noise that begins at a real one: no student, and no evaluation of the teacher but with --pairs euler
or heun. --init goes on from a consistency mid-training, distill_cmt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ipfm.engine.experiments import Facts, Origin, OwnDistillationOptions, RowName, options_for, run_command
from ipfm.engine.objectives.ect import EctConfig
from ipfm.recipes import cifar_ect, distill_ipfm


def adapted(facts: Facts, given: Mapping[str, Any]) -> Mapping[str, tuple[Any, Origin]]:
    """What a second stage has otherwise, at every size; its length is the row's."""
    if not isinstance(given.get("init"), Path):
        return {}
    names = [name for name in cifar_ect.SECOND_STAGE if name != "kimg"]
    return {name: (cifar_ect.SECOND_STAGE[name], Origin("script", "after a mid-training, sony/cmt")) for name in names}


_TABLE: Mapping[RowName, Mapping[str, Any]] = MappingProxyType(
    {
        "small": {
            "batch": 64, "kimg": 38.4, "lr": 3e-4, "q_kimg": 4.8, "ema_kimg": 5.0, "ema_rampup": 0.2,
            "eval_every": 100, "checkpoint_every": 200, "eval_images": 1000, "heun_steps": 9,
        },
        "to-28": {"batch": 128, "kimg": 10_000.0, "lr": 1e-4, "q_kimg": 1250.0, "ema_kimg": 100.0, "log_every": 50},
    }
)  # fmt: skip

RECIPE = replace(
    distill_ipfm.RECIPE,
    file="distill_ect.py",
    about=__doc__ or "",
    preset=cifar_ect.RECIPE.preset,
    D=cifar_ect.RECIPE.D,
    base=options_for(EctConfig, OwnDistillationOptions)(features="auto"),
    rows=dict.fromkeys(("cifar", "ffhq", "afhqv2", "imagenet", "from-96"), cifar_ect.RECIPE),
    edm2={},
    table=_TABLE,
    adapted=adapted,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
