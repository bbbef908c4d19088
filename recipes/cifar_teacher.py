"""CIFAR-10, 32x32: trains a PFGM++ teacher at any D, or an EDM one at D = inf.

    deepspeed recipes/cifar_teacher.py --data cifar-10-python.tar.gz --D 2048
    deepspeed recipes/cifar_teacher.py --data cifar-10-python.tar.gz --D inf --arch ddpmpp --conditional
    deepspeed recipes/cifar_teacher.py --data cifar-10-python.tar.gz --continue-from training-state-050176.pt

Settings: those of EDM (arXiv 2206.00364), which PFGM++ (arXiv 2302.04265) keeps: batch 512, learning rate 1e-3 after
10 million images of linear growth, Adam (0.9, 0.999), dropout 0.13, augmentation 0.12, 200 million images.
Without --D the teacher is one of D = 2048.
"""

from __future__ import annotations

from ipfm.engine.experiments import TeacherOptions, TeacherRecipe, run_command

BASE = TeacherOptions(
    batch=512,
    kimg=200_000,
    lr=1e-3,
    lr_rampup_kimg=10_000,
    ema_kimg=500,
    dropout=0.13,
    augment=0.12,
    arch="ncsnpp",
    heun_steps=18,
    log_every=50,
)

DATA = """\
CIFAR-10, as its authors publish it: cifar-10-python.tar.gz or cifar-10-binary.tar.gz ("The CIFAR-10 dataset", Alex
Krizhevsky's page at the University of Toronto), used as it is; or a zip made of it: ipfm dataset ARCHIVE cifar10.zip"""

RECIPE = TeacherRecipe(
    file="cifar_teacher.py",
    about=__doc__ or "",
    name="cifar",
    title="CIFAR-10",
    shape=(3, 32, 32),
    presets={
        "ddpmpp": "cifar10-ddpmpp",
        "ncsnpp": "cifar10-ncsnpp",
        "adm": "imagenet64-adm-uncond",
        "edm2": "edm2-img64-xs-uncond",
    },
    D=2048.0,
    base=BASE,
    data=DATA,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
