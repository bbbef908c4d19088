"""Handwritten digits, 8x8: trains a small PFGM++ teacher on real data and distils it to one step, on any machine.

    deepspeed recipes/digits_ipfm.py
    python recipes/digits_ipfm.py --alpha 0.5 --out runs/half

The data are scikit-learn's bundled digits (1797 images). Everything is chosen so that two CPU cores need a few minutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ipfm.engine.commandline import parse, run_command, user_input
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data import ImageDataset, digits
from ipfm.engine.evaluation import Evaluation
from ipfm.engine.metrics import PixelFeatures, dataset_statistics
from ipfm.engine.networks import teacher_facts
from ipfm.engine.recipe import (
    RecipeOptions,
    check_images,
    describe,
    first_process,
    launched_processes,
    read_teacher,
    run_name,
)
from ipfm.engine.report import results_table
from ipfm.engine.resolve import resolve, resolve_precision, run_device
from ipfm.engine.run_folder import check_run_folder, open_run_folder
from ipfm.engine.teacher_training import TeacherTraining
from ipfm.engine.trio import Distiller
from ipfm.engine.world import World, start_world
from ipfm.models import Precond, presets

D = 128.0
BASE = RecipeOptions(
    batch=64,
    max_steps=300,
    lr=3e-4,
    ema_kimg=10.0,
    ema_rampup=0.2,
    alpha=1.0,
    eval_every=50,
    eval_images=2000,
    checkpoint_every=100,
    teacher_steps=900,
)


def teacher_config(options: RecipeOptions) -> TeacherConfig:
    """Settings of the teacher that is trained when none is given."""
    return TeacherConfig(
        D=D if options.D is None else options.D,
        batch=128,
        micro_batch=None if options.micro_batch is None else math.gcd(options.micro_batch, 128 // launched_processes()),
        max_steps=options.teacher_steps,
        lr=2e-3,
        lr_rampup_kimg=6.4,
        ema_kimg=10.0,
        zero=options.zero,
        precision=options.precision,
        tf32=options.tf32,
        memory_format=options.memory_format,
        compile=options.compile,
        noise=options.noise,
        seed=options.seed,
        log_every=options.log_every,
        checkpoint_every=250,
        heun_steps=options.heun_steps,
        resume=options.resume,
    )


def train_teacher(config: TeacherConfig, path: Path, data: ImageDataset, world: World) -> Precond:
    """The averaged teacher; trained in the run folder `path`, or read from there."""
    assert config.D is not None
    training = TeacherTraining(config, presets.get("digits", D=config.D), data, world=world)
    return training.run(path)


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these arguments."""
    with user_input():
        options = parse(RecipeOptions, argv, default=BASE, prog="digits_ipfm.py", description=__doc__ or "")
        config = options.distillation()
        config.split(launched_processes())
        teacher = read_teacher(options)
        network = presets.get("digits", D=options.D or D) if teacher is None else teacher.config
        path = options.out or run_name("digits", config, network.D)
        config = resolve(config, network, run_device())
        data = digits()
        check_images(network, data.shape, "the digits are")
        if options.reference is not None:
            raise ValueError("reference was given, but this recipe compares with the digits themselves")
        training = resolve_precision(teacher_config(options), run_device())
        training.split(launched_processes())
        record = check_run_folder(path, "distill", config, teacher_facts(teacher))
        if teacher is None and (path / "teacher").exists():
            check_run_folder(path / "teacher", "teacher", training, {})
    if options.dry_run:
        first_process(lambda: print(describe(config, network, path)))
        return

    world = start_world()
    world.barrier()
    with user_input():
        open_run_folder(path, record, write=world.first)
    config = replace(config, resume=True)  # the folder is this run's from here on
    if teacher is None:
        teacher = train_teacher(training, path / "teacher", data, world)
    features = PixelFeatures(data.shape)
    evaluation = Evaluation(features, dataset_statistics(data, features), images=options.eval_images)
    with user_input():
        # A folder whose generator came from a teacher that has been trained further since is refused here.
        check_run_folder(path, "distill", config, teacher_facts(teacher))
        distiller = Distiller(config, teacher, evaluation=evaluation, world=world)
    distiller.run(path)
    if world.first:
        print(f"\nFréchet distance in pixel space against all {len(data)} digits\n")
        print(results_table(distiller.rows))
        print(f"run folder: {path}   generator: {path / 'generator'}   curve: {path / 'convergence.png'}")


if __name__ == "__main__":
    run_command(__file__, main)
