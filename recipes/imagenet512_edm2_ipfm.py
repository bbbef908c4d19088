"""ImageNet, 512x512, as latents: distils EDM2's teachers. Settings of SiD for these networks; not published for this
method.

    deepspeed recipes/imagenet512_edm2_ipfm.py --teacher edm2-img512-xs-2147483-0.135.pkl --vae sd-vae-ft-mse
    deepspeed recipes/imagenet512_edm2_ipfm.py --size xxl --dry-run

Batch 2048, learning rate 5e-5, Adam with beta1 = 0, alpha 1, losses weighed by the student's log-variance, ln sigma of
its step of mean -0.4 and deviation 1, dropout 0.1 from size M on, no augmentation and an average with a half-life of 2
million images are those of SiD's script for EDM2's networks, as is epsilon 1e-6, there with fp16. The length is the
budget of arXiv 2509.22454, 30 000 thousand images.

The training takes no data: --labels counts how often each class is drawn, as SiD counts those of the data; without it
all are alike. --vae makes pictures of the samples for grids and evaluations, --guide and --guidance guide the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ipfm.engine import DistillConfig, NoiseLevels
from ipfm.engine.experiments import (
    Size,
    SizedDistillationOptions,
    SizedDistilRecipe,
    origins,
    recipe_options,
    run_command,
)
from ipfm.models import NetworkConfig
from ipfm.recipes import cifar_ipfm

BASE = DistillConfig(
    batch=2048,
    kimg=30_000,
    lr=5e-5,
    ema_kimg=2000,
    alpha=1.0,
    logvar=True,
    noise=NoiseLevels(p_mean=-0.4, p_std=1.0),
    dropout=0.0,
    augment=0.0,
    eps=1e-6,
    heun_steps=32,
    log_every=10,
)

# The smallest FID without guidance of each size.
SIZES = {
    "xs": Size("edm2-img512-xs", "edm2-img512-xs-2147483-0.135.pkl"),
    "s": Size("edm2-img512-s", "edm2-img512-s-2147483-0.130.pkl"),
    "m": Size("edm2-img512-m", "edm2-img512-m-2147483-0.100.pkl"),
    "l": Size("edm2-img512-l", "edm2-img512-l-1879048-0.085.pkl"),
    "xl": Size("edm2-img512-xl", "edm2-img512-xl-1342177-0.085.pkl"),
    "xxl": Size("edm2-img512-xxl", "edm2-img512-xxl-0939524-0.070.pkl"),
}

TEACHERS = """\
They are EDM2's post-hoc averages of the smallest FID, which SiD distils too: README of NVlabs/edm2. DDO's
edm2-img512-l-ddo.pkl is one of size l. To train one:
deepspeed recipes/train_teacher.py --data LATENTS.zip --conditional --preset edm2-img512-s --vae VAE_FOLDER"""

# From size M on, as the teachers have it.
DROPOUT, DROPOUT_CHANNELS = 0.1, 256

# Of SiD's script for these networks.
SID = {
    **origins("SiD", "batch", "lr", "alpha", "generator_beta1", "student_beta1", "augment", "ema_kimg", "ema_rampup"),
    **origins("SiD", "sigma_init", "logvar", noise="p_mean -0.4, p_std 1, t_max 800", dropout="0.1 from size M on"),
    **origins("SiD", eps="1e-6, there with fp16 and a generator's loss that counts 100 times"),
    **origins("ours", class_counts="all classes alike; SiD's are as frequent as in the data, as --labels makes them"),
}
ORIGINS = {
    **SID,
    **origins("paper", "init", "student_init", "student_updates", kimg=cifar_ipfm.BUDGET),
    **origins("ours", "gradient", sigmas="those of several steps are not printed"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """The dropout of large networks."""
    return {"dropout": DROPOUT} if network.model_channels >= DROPOUT_CHANNELS else {}


RECIPE = SizedDistilRecipe(
    file="imagenet512_edm2_ipfm.py",
    about=__doc__ or "",
    dataset="imagenet-512",
    title="ImageNet-512",
    images="the latents of ImageNet-512 are",
    shape=(4, 64, 64),
    preset="edm2-img512-xs",
    sizes=SIZES,
    D=math.inf,
    base=recipe_options(BASE, SizedDistillationOptions),
    variant=variant,
    origins=ORIGINS,
    settings_from="ImageNet-512: these settings are carried over from SiD's for EDM2's networks; no result of this "
    "method is published for this data set",
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
