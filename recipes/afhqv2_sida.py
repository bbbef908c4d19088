"""AFHQv2, 64x64: SiDA, with a discriminator from the student's encoder.

    deepspeed recipes/afhqv2_sida.py --teacher edm-afhqv2-64x64-uncond-vp.pkl --real-data afhqv2-64x64.zip
    deepspeed recipes/afhqv2_sida.py --dry-run

SiD's loss at alpha 1, and a discriminator without parameters of its own (arXiv 2410.14919): the student's encoder
learns to tell the generator's images from real ones, and the generator to deceive it, by factors of 1 in the
student's loss and 2e-4 in the generator's; for 100 000 images the student alone is trained, for as many more the
generator without the discriminator. Everything else is `afhqv2_sid.py`. The length is the script's, 200 million
images; released is a generator after 127.5.

SiD²A differs in the generator's first weights alone, those of SiD, and in its length, 100 million images:

    --init runs/SID/generator --kimg 100000
"""

from __future__ import annotations

from ipfm.engine.experiments import run_command
from ipfm.recipes import afhqv2_ipfm, afhqv2_sid, cifar_sida

RECIPE = cifar_sida.sida("afhqv2_sida.py", __doc__, afhqv2_sid.RECIPE, afhqv2_ipfm.BASE, kimg=200_000)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
