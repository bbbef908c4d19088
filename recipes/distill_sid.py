"""Teachers of any size, grey or colour, with classes or without: score identity distillation with SiD's settings.

    deepspeed recipes/distill_sid.py --teacher edm-afhqv2-64x64-uncond-vp.pkl --data afhqv2-64x64.zip
    deepspeed recipes/distill_sid.py --teacher network-snapshot-010000.pkl --dry-run

As `distill_ipfm.py`, with the settings of cifar_sid.py, ffhq_sid.py, afhqv2_sid.py, imagenet64_sid.py and, for EDM2's
networks with classes, imagenet64_edm2_sid.py and imagenet512_edm2_sid.py. SiD's alpha of 1.2 is 1.0 here for ncsn++,
with which arXiv 2509.22454 saw it diverge (appendix B). SiD is the case D = inf; at another D of the teacher's it is
IPFM with these settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import STUDENT_BY_SIZE, Facts, Origin, OwnDistillationOptions, options_for, run_command
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.recipes import (
    afhqv2_sid,
    cifar_sid,
    distill_ipfm,
    ffhq_sid,
    imagenet64_edm2_sid,
    imagenet64_sid,
    imagenet512_edm2_sid,
)


def adapted(facts: Facts, given: Mapping[str, Any]) -> Mapping[str, tuple[Any, Origin]]:
    """The alpha that does not diverge with ncsn++."""
    ours = Origin("ours", "SiD's 1.2 diverged with ncsn++ in arXiv 2509.22454, appendix B")
    return {"alpha": (1.0, ours)} if facts.family == "ncsn++" and not facts.small else {}


RECIPE = replace(
    distill_ipfm.RECIPE,
    file="distill_sid.py",
    about=__doc__ or "",
    preset=cifar_sid.RECIPE.preset,
    D=cifar_sid.RECIPE.D,
    base=options_for(DistillConfig, OwnDistillationOptions)(features="auto", tf32=False),
    rows={
        "cifar": cifar_sid.RECIPE,
        "ffhq": ffhq_sid.RECIPE,
        "afhqv2": afhqv2_sid.RECIPE,
        "imagenet": imagenet64_sid.RECIPE,
        "from-96": afhqv2_sid.RECIPE,
    },
    table=STUDENT_BY_SIZE,
    edm2={"pixels": imagenet64_edm2_sid.RECIPE, "latents": imagenet512_edm2_sid.RECIPE},
    adapted=adapted,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
