"""CIFAR-10, 32x32, unconditional: distils a PFGM++ or EDM teacher with the published settings.

    deepspeed recipes/cifar_ipfm.py --teacher models/cifar10-D2048 --D 2048
    deepspeed recipes/cifar_ipfm.py --D 128 --dry-run

Settings: arXiv 2509.22454, CIFAR-10 (ncsn++, batch 256, learning rate 1e-5, Adam with beta1 = 0, alpha 1.0; two
student updates per generator update at D = 2048, as in the authors' script). The paper does not print the length of its
runs: 100 000 thousand images here are this project's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ipfm.engine.commandline import parse, run_command, user_input
from ipfm.engine.networks import teacher_facts
from ipfm.engine.recipe import RecipeOptions, describe, first_process, launched_processes, read_teacher, run_name
from ipfm.engine.resolve import resolve, run_device
from ipfm.engine.run_folder import check_run_folder, open_run_folder
from ipfm.engine.trio import Distiller
from ipfm.engine.zero import start_world
from ipfm.models import presets

BASE = RecipeOptions(batch=256, kimg=100_000, lr=1e-5, ema_kimg=500, alpha=1.0, dropout=0.0, log_every=50)
PUBLISHED_D = (128.0, 2048.0, math.inf)
NO_TEACHER = (
    "give --teacher, a model folder (config.json and model.safetensors) of a 3x32x32 network; "
    "--dry-run works without one"
)


def variant(D: float) -> RecipeOptions:
    """The settings for this D."""
    return replace(BASE, student_updates=2) if D == 2048 else BASE


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these arguments."""
    with user_input():
        about = {"prog": "cifar_ipfm.py", "description": __doc__ or ""}
        options = parse(RecipeOptions, argv, default=BASE, **about)
        teacher = read_teacher(options)
        if teacher is None and not options.dry_run:
            raise ValueError(NO_TEACHER)
        D = teacher.D if teacher is not None else 2048.0 if options.D is None else options.D
        # What the user gave stands; the rest comes from the variant of this D.
        options = parse(RecipeOptions, argv, default=variant(D), **about)
        if options.teacher_steps is not None:
            raise ValueError("teacher-steps was given, but this recipe trains no teacher")
        network = presets.get("cifar10-ncsnpp", D=D) if teacher is None else teacher.config
        if (network.img_channels, network.img_resolution) != (3, 32):
            raise ValueError(
                f"the teacher makes images {network.img_channels}x{network.img_resolution}x{network.img_resolution}, "
                "CIFAR-10 is 3x32x32"
            )
        config = resolve(options.distillation(), network, run_device())
        config.split(launched_processes())
        path = options.out or run_name("cifar", config, network.D)
        record = check_run_folder(path, "distill", config, teacher_facts(teacher))
    if options.dry_run:
        notes = () if D in PUBLISHED_D else (f"no result is published for D = {D:g}",)
        first_process(lambda: print(describe(config, network, path, notes)))
        return

    assert teacher is not None
    world = start_world()
    world.barrier()
    with user_input():
        open_run_folder(path, record, write=world.first)
        distiller = Distiller(replace(config, resume=True), teacher, dataset="cifar10", world=world)
    distiller.run(path)
    if distiller.world.first:
        print(f"generator: {path / 'generator'}")


if __name__ == "__main__":
    run_command(__file__, main)
