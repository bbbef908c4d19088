"""FFHQ, 64x64 (or other unconditional photographs of that size): trains a PFGM++ teacher at any D, or an EDM one.

    deepspeed recipes/ffhq_teacher.py --data ffhq-64x64.zip --D 128
    deepspeed recipes/ffhq_teacher.py --data afhqv2-64x64.zip --D inf --dropout 0.25

Settings: those of EDM (arXiv 2206.00364), which PFGM++ (arXiv 2302.04265) keeps: batch 256, learning rate 2e-4 after
10 million images of linear growth, Adam (0.9, 0.999), dropout 0.05 (AFHQv2: 0.25), augmentation 0.15, 200 million
images. Without --D the teacher is one of D = 128.
"""

from __future__ import annotations

from ipfm.engine.experiments import TeacherOptions, TeacherRecipe, run_command

BASE = TeacherOptions(
    batch=256,
    kimg=200_000,
    lr=2e-4,
    lr_rampup_kimg=10_000,
    ema_kimg=500,
    dropout=0.05,
    augment=0.15,
    arch="ddpmpp",
    heun_steps=40,
    log_every=50,
)

DATA = """\
FFHQ, as its authors publish it (README of the repository NVlabs/ffhq-dataset: the 1024x1024 images or the 128x128
thumbnails), resized to 64x64: ipfm dataset FOLDER ffhq-64x64.zip --resolution 64"""

RECIPE = TeacherRecipe(
    file="ffhq_teacher.py",
    about=__doc__ or "",
    name="ffhq",
    title="FFHQ-64",
    shape=(3, 64, 64),
    presets={
        "ddpmpp": "ffhq64-ddpmpp",
        "ncsnpp": "ffhq64-ncsnpp",
        "adm": "imagenet64-adm-uncond",
        "edm2": "edm2-img64-s-uncond",
    },
    D=128.0,
    base=BASE,
    data=DATA,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
