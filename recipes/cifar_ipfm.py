"""CIFAR-10, 32x32: distils a PFGM++ or EDM teacher with the published settings, for every D and alpha of the paper.

    deepspeed recipes/cifar_ipfm.py --teacher cifar10_ncsnpp_D_2048.pkl --D 2048
    deepspeed recipes/cifar_ipfm.py --teacher edm-cifar10-32x32-uncond-ve.pkl --alpha 0.5 --steps 4
    deepspeed recipes/cifar_ipfm.py --D 128 --dry-run

arXiv 2509.22454, CIFAR-10, unconditional, ncsn++. Table 1 has D = 128, 2048, inf, alpha = 0.5 (printed there as 0.0)
and 1.0, and 1, 2, 4 steps. The paper prints the noise levels' law, the weight, sigma_init and the first weights, one
update of the student for each of the generator, and a budget of "30k generator samples" a run, which is read as 30 000
thousand images here. Batch 256, learning rate 1e-5, Adam with beta1 = 0, no dropout and augmentation 0.12 in the
student's step are those of the script that its authors published for D = 2048 and alpha = 0.5 (there with two student
updates, as here at these values and one step). The noise levels of 2 and 4 steps are this project's: the paper prints
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipfm.engine import DistillConfig
from ipfm.engine.experiments import DistilRecipe, origins, recipe_options, run_command
from ipfm.models import NetworkConfig

BASE = DistillConfig(
    batch=256,
    kimg=30_000,
    lr=1e-5,
    ema_kimg=500,
    alpha=1.0,
    dropout=0.0,
    augment=0.12,
    heun_steps=18,
    log_every=50,
)

TEACHERS = """\
  PFGM++, D = 128, 2048, inf   training-state-*.pt, ncsn++       README of the repository Newbeeer/pfgmpp
  PFGM++, converted            cifar10_ncsnpp_D_2048.pkl, ...    README of daniil-shlenskii/pfgmpp-idmd
  EDM, D = inf                 edm-cifar10-32x32-uncond-ve.pkl (ncsn++), -vp.pkl (ddpm++)    README of NVlabs/edm
To train one: deepspeed recipes/cifar_teacher.py --data cifar-10-python.tar.gz --D 2048"""


BUDGET = "a budget of 30k generator samples, read as 30 000 kimg"
ORIGINS = {
    **origins("paper", "alpha", "sigma_init", "noise", "init", "student_init", kimg=BUDGET),
    **origins("paper", student_updates="1; the script has 2 at D = 2048, alpha = 0.5, as here with one step"),
    **origins("script", "batch", "lr", "generator_beta1", "student_beta1", "augment", "ema_kimg", "ema_rampup", "eps"),
    **origins("script", dropout="0 at D = 2048, alpha = 0.5; taken for the others too, SiD has 0.13"),
    **origins("ours", "gradient", sigmas="those of several steps are not printed"),
}


def variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """Two student updates in the run without regularisation, as the authors' script has it."""
    alone = (network.D, settings.get("alpha"), settings.get("steps")) == (2048, 0.5, 1)
    return {"student_updates": 2} if alone else {}


RECIPE = DistilRecipe(
    file="cifar_ipfm.py",
    about=__doc__ or "",
    dataset="cifar10",
    title="CIFAR-10",
    shape=(3, 32, 32),
    preset="cifar10-ncsnpp",
    D=2048.0,
    base=recipe_options(BASE),
    variant=variant,
    origins=ORIGINS,
    formerly={"kimg": (100_000,), "student_updates": (2,)},
    teachers=TEACHERS,
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
