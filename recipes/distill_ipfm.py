"""Teachers of any size, grey or colour, with classes or without: inverse Poisson flow matching at their own D.

    deepspeed recipes/distill_ipfm.py --teacher runs/my-images-64-teacher-ddpmpp-D128/model --data my-images.zip
    deepspeed recipes/distill_ipfm.py --teacher network-snapshot-010000.pkl --steps 2

Shape, classes, D and noise levels are the teacher's: a checkpoint of EDM or PFGM++, a model folder, or a training's run
folder. The other settings follow from its size by a rule, which a run and --dry-run print: those of cifar_ipfm.py (29
to 47 pixels a side), ffhq_ipfm.py, afhqv2_ipfm.py (fewer than 20 000 images in --data) or, with classes,
imagenet64_ipfm.py for ADM and imagenet64_edm2_ipfm.py or, of latents, imagenet512_edm2_ipfm.py for EDM2 (48 to 95),
afhqv2_ipfm.py again from 96 on; those up to 28 are this project's. Without a GPU it is a small run, see --scale.

--data has the images that samples are compared with. With --inception the distance is an FID, without one that of
blocks of pixels; the training itself takes no data.
"""

from __future__ import annotations

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import STUDENT_BY_SIZE, OwnDistillationOptions, OwnDistilRecipe, options_for, run_command
from ipfm.recipes import (
    afhqv2_ipfm,
    cifar_ipfm,
    ffhq_ipfm,
    imagenet64_edm2_ipfm,
    imagenet64_ipfm,
    imagenet512_edm2_ipfm,
)

TEACHERS = """\
Any teacher fits: --teacher with a checkpoint of EDM or PFGM++, a model folder, or a run folder of train_teacher.py.
To train one: deepspeed recipes/train_teacher.py --data my-images.zip"""

RECIPE = OwnDistilRecipe(
    file="distill_ipfm.py",
    about=__doc__ or "",
    dataset="",
    title="the teacher",
    shape=cifar_ipfm.RECIPE.shape,
    preset=cifar_ipfm.RECIPE.preset,
    D=128.0,
    base=options_for(DistillConfig, OwnDistillationOptions)(features="auto"),
    teachers=TEACHERS,
    rows={
        "cifar": cifar_ipfm.RECIPE,
        "ffhq": ffhq_ipfm.RECIPE,
        "afhqv2": afhqv2_ipfm.RECIPE,
        "imagenet": imagenet64_ipfm.RECIPE,
        "from-96": afhqv2_ipfm.RECIPE,
    },
    table=STUDENT_BY_SIZE,
    edm2={"pixels": imagenet64_edm2_ipfm.RECIPE, "latents": imagenet512_edm2_ipfm.RECIPE},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
