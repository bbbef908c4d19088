"""Teachers of any size, grey or colour, with classes or without: denoiser matching, at D = inf the gradient of DMD2.

    deepspeed recipes/distill_dmd.py --teacher runs/my-images-64-teacher-ddpmpp-D128/model --data my-images.zip
    deepspeed recipes/distill_dmd.py --teacher edm-imagenet-64x64-cond-adm.pkl --sigma-init 80 --dry-run

As `distill_ipfm.py`, with its settings by the teacher's size, and DMD2's five updates of the student for each of the
generator. The generator's step does not pass back through teacher and student: it costs 5 passes for 7. At D = inf it
descends a divergence; at finite D it has the right zeros, and no theorem more (docs/objectives.md). DMD2's
discriminator is not part of it.
"""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine.experiments import run_command
from ipfm.engine.objectives.dmd import DmdConfig
from ipfm.recipes import distill_ipfm

_BY_SIZE = distill_ipfm.RECIPE.by(DmdConfig, __file__, __doc__)

# The rows of the rule have one update of the student.
RECIPE = replace(_BY_SIZE, left=_BY_SIZE.left | {"student_updates"})

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
