"""Images of one's own, of any size: trains a PFGM++ teacher at any D, or an EDM one at D = inf.

    deepspeed recipes/train_teacher.py --data my-images.zip
    deepspeed recipes/train_teacher.py --data my-images.zip --conditional --D inf --arch adm
    deepspeed recipes/train_teacher.py --data my-images.zip --preset ffhq64-ddpmpp --dry-run

Square images, grey or colour, of 8 to 1024 pixels a side that can be halved to at most 32; `ipfm dataset` makes them of
pictures of any size. Shape and classes come from the data, and the settings from their size and number by a rule, which
a run and --dry-run print: EDM's for CIFAR-10 (29 to 47 pixels), FFHQ, AFHQv2 or, with classes and --arch adm, ImageNet
(48 to 95); others are this project's. Without a GPU it is a small run, see --scale. Without --D the teacher is one of
D = 2048 with CIFAR-10's settings, else of D = 128.
"""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine.experiments import OwnTeacherOptions, OwnTeacherRecipe, run_command
from ipfm.recipes import cifar_teacher, ffhq_teacher

DATA = """\
A folder or zip of square images, all of one size: ipfm dataset FOLDER my-images.zip --resolution 64 --crop center
makes one of pictures of any size, with the names of their folders as classes."""

RECIPE = OwnTeacherRecipe(
    file="train_teacher.py",
    about=__doc__ or "",
    name="images",
    title="the network",
    shape=(3, 32, 32),
    presets=cifar_teacher.RECIPE.presets,
    D=128.0,
    base=OwnTeacherOptions(arch="ddpmpp", features="auto"),
    data=DATA,
    rows={
        "cifar": cifar_teacher.BASE,
        "ffhq": ffhq_teacher.BASE,
        "afhqv2": replace(ffhq_teacher.BASE, dropout=0.25),
    },
    published={"cifar": cifar_teacher.RECIPE.D},
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
