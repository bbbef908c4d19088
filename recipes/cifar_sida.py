"""CIFAR-10, 32x32: SiDA, with a discriminator from the student's encoder.

    deepspeed recipes/cifar_sida.py --teacher edm-cifar10-32x32-uncond-vp.pkl --real-data cifar-10-python.tar.gz
    deepspeed recipes/cifar_sida.py --teacher edm-cifar10-32x32-cond-vp.pkl --real-data cifar10.zip
    deepspeed recipes/cifar_sida.py --dry-run

SiD's loss at alpha 1, and a discriminator without parameters of its own (arXiv 2410.14919): the student's encoder
learns to tell the generator's images from real ones, and the generator to deceive it, by factors of 1 in the
student's loss and 2e-4 in the generator's; for 100 000 images the student alone is trained, for as many more the
generator without the discriminator. Everything else is `cifar_sid.py`. The length is the script's, 300 million
images; released are generators after 217.9 and, with classes, 293.2.

SiD²A differs in the generator's first weights alone, those of SiD, and in its length, 100 million images:

    --init runs/SID/generator --kimg 100000
"""

from __future__ import annotations

import math
from dataclasses import replace

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, origins, recipe_options, run_command
from ipfm.recipes import cifar_ipfm, cifar_sid


def with_discriminator(base: DistillConfig, *, kimg: float) -> DistillConfig:
    """SiD's settings with those of SiDA's paper and script that differ."""
    return replace(
        base,
        alpha=1.0,
        generator_beta1=0.0,
        kimg=kimg,
        tf32=False,
        discriminator="encoder",
        discriminator_weights=(1.0, 2e-4),
        discriminator_kimg=(100.0, 200.0),
    )


ORIGINS = {
    **origins("script", "alpha", "batch", "lr", "generator_beta1", "student_beta1", "student_updates", "dropout"),
    **origins("script", "augment", "ema_kimg", "ema_rampup", "kimg", "discriminator", "discriminator_kimg"),
    **origins("script", discriminator_weights="lsd 1; 2 lsg_gan / lsg of 0.01 and 100", eps="1e-8, with fp16 1e-6"),
    **origins("SiD", "sigma_init", "noise", "tf32"),
    **origins("ours", precision="auto; SiDA has fp32 for CIFAR-10, else fp16"),
}
SETTINGS_OF = "SiDA (arXiv 2410.14919)"


def sida(file: str, about: str | None, sid: DistilRecipe, base: DistillConfig, *, kimg: float) -> DistilRecipe:
    """The recipe of SiDA beside that of SiD for the same images; `base`: SiD's settings there."""
    return sid.with_options(
        file,
        about,
        recipe_options(with_discriminator(base, kimg=kimg)),
        D=math.inf,
        settings_of=SETTINGS_OF,
        origins=ORIGINS,
    )


RECIPE = sida("cifar_sida.py", __doc__, cifar_sid.RECIPE, replace(cifar_ipfm.BASE, dropout=0.13), kimg=300_000)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
