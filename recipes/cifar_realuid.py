"""CIFAR-10, 32x32: distils with real images in the student's loss too, by RealUID's term for IPFM and SiD.

    deepspeed recipes/cifar_realuid.py --teacher edm-cifar10-32x32-uncond-vp.pkl --real-data cifar-10-python.tar.gz
    deepspeed recipes/cifar_realuid.py --teacher edm-cifar10-32x32-cond-vp.pkl --real-data cifar10.zip
    deepspeed recipes/cifar_realuid.py --dry-run

arXiv 2509.22459 has a smaller network of flow matching, so that its figures are none of this recipe's: FID 2.23, with
classes 2.02, of the first stage, 1.98 and 1.87 of the finetuned one. Batch 256, learning rate 3e-5, five updates of the
student for each of the generator, gradients clipped at a norm of 1, no dropout, real images mirrored at random, the
pure objective, a student that begins with random weights, 500 000 updates of both together. Its learning rate grows
over 500 updates, which is left out here. The second stage is its weights, a student of the teacher's weights and a
third of the learning rate, on the generator of the first:

    --continue-from runs/FIRST/generator --student-init teacher --real-weights 0.92 0.86 --lr 1e-5 --kimg 4267
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ipfm.engine.experiments import ema_kimg, origins, recipe_options, run_command
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

BASE = replace(
    cifar_ipfm.BASE,
    alpha=0.5,
    lr=3e-5,
    augment=0.0,
    clip_grad=1.0,
    student_updates=5,
    student_init="random",
    kimg=21_333,
    ema_kimg=ema_kimg(0.999, 256),
    ema_rampup=1e6,
    real_weights=(0.92, 0.94),
    real_xflip=True,
)
ORIGINS = {
    **origins("paper", "alpha", "batch", "dropout", "clip_grad", "student_updates", "init", "student_init"),
    **origins("paper", "generator_beta1", "student_beta1", "real_xflip", lr="3e-5, after 500 updates of growth"),
    **origins("paper", real_weights="0.92 0.94; with classes 0.98 0.96", ema_kimg="a decay of 0.999"),
    **origins("paper", kimg="500 000 updates, five of six of them the student's"),
    **origins("ours", augment="none: images are mirrored", sigma_init="IPFM's", noise="IPFM's; flow matching there"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """The weights of class-conditional networks."""
    return {"real_weights": (0.98, 0.96)} if network.label_dim else {}


RECIPE = cifar_ipfm.RECIPE.with_options(
    "cifar_realuid.py",
    __doc__,
    recipe_options(BASE),
    D=math.inf,
    settings_of="RealUID (arXiv 2509.22459), whose network is a smaller one of flow matching",
    variant=variant,
    origins=ORIGINS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
