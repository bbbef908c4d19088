"""What --dry-run says: settings, memory plan and expected duration, without training anything."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.distributed.device import run_device
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.experiments.step_time import step_time
from ipfm.engine.memory import MemoryPlan, choose_layout, choose_training, device_budget
from ipfm.engine.memory.arithmetic import (
    SHARE,
    flops_in_words,
    forward_flops,
    gpu_seconds,
    passes_in_words,
    peak_in_words,
    step_forwards,
    training_forwards,
)
from ipfm.engine.memory.fits import LAYOUTS, gpu_precision, layout_table
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.runtime.launcher import launched_processes
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.engine.runtime.wording import at_least_thousandths, counted, duration, size, three_digits
from ipfm.engine.training.checkpoint import checkpoints_in, step_of
from ipfm.engine.training.disk import missing_room
from ipfm.engine.training.resolve import resolve_precision
from ipfm.engine.training.run_folder import SET_ASIDE
from ipfm.engine.training.set_aside import newest_step
from ipfm.models import NetworkConfig

# Seconds before the first line of progress, where stderr is a file.
PAUSE = 3.0


def describe(
    config: Distillation,
    network: NetworkConfig,
    path: Path,
    notes: tuple[str, ...] = (),
    *,
    given: Distillation | None = None,
    teaching: TeacherConfig | None = None,
    first: int = 0,
    images: int | None = None,
) -> str:
    """What a run with this resolved configuration would do.

    That is settings, memory plan and expected duration on this machine, and how it would be laid out on GPUs. Runs some
    steps to estimate the duration; stderr says how far all this is, where it takes long.

    Args:
        config: settings with nothing left open but what memory decides.
        network: the teacher's architecture.
        path: the run folder.
        notes: lines to add.
        given: the settings as the user gave them, whose open ones the GPUs' layouts decide; default: `config`.
        teaching: settings of the teacher's training, where the run has one.
        first: the step that a continued training begins with.
        images: drawn for each evaluation; None where there is none.

    What the run at `path` has done already is left out of the durations.
    """
    ranks = launched_processes()
    done = steps_done(config, path)
    config.split(ranks)  # a batch that cannot be shared is bad input; too little memory is not
    trained = trained_config(network, config.dropout)
    parts: list[str] = []
    with ProgressBar("dry run", 2 + LAYOUTS, unit=" part", pause=PAUSE) as progress:
        try:
            layout = choose_layout(config, trained, ranks=ranks, budget=device_budget(run_device()))
        except ValueError as error:
            parts = [*_settings(config, path, D=network.D), f"memory: {error}"]
            progress.advance(2)
        else:
            progress.advance()
            plan = layout.plan
            cost = _forwards(config, trained, phased=plan.phased, checkpointed=plan.activation_checkpointing)
            parts = [
                *_settings(
                    replace(config, micro_batch=plan.micro_batch),
                    path,
                    D=network.D,
                    zero=plan.parts.stage,
                    backward=plan.backward,
                    activation_checkpointing="on" if plan.activation_checkpointing else "off",
                ),
                *_network(network, plan.parameters),
                *_memory(plan),
                *_passes(config, trained, plan, cost),
                *_expected_duration(config, trained, plan, cost, max(first, done), images),
                *([teacher_duration(teaching, network, path / "teacher")] if teaching is not None else []),
            ]
            progress.advance()
        given = given or config
        parts += [
            *_on_gpus(Run(given, trained), max(first, done)),
            *_student_first(config, max(first, done)),
            *_going_on(config, path, done),
            *_going_back(config, path),
            *_room(Run(config, trained), path),
            layout_table(given, trained, zero=given.zero, done=progress.advance),
            *notes,
        ]
    return "\n".join(parts)


def describe_training(
    config: TeacherConfig,
    network: NetworkConfig,
    path: Path,
    notes: tuple[str, ...] = (),
    *,
    first: int = 0,
    images: int | None = None,
) -> str:
    """What training a teacher with this resolved configuration would do: settings, network, expected duration.

    Runs some steps to estimate the duration; stderr says how far this is, where it takes long. A training that is
    continued begins with the step `first`; `images` are drawn for each evaluation, None where there is none.
    """
    done = steps_done(config, path)
    first = max(first, done)
    with ProgressBar("dry run", 3, unit=" part", pause=PAUSE) as progress:
        plan = choose_training(
            resolve_precision(config, run_device()),
            network,
            ranks=launched_processes(),
            budget=device_budget(run_device()),
        )
        checkpointed = plan.activation_checkpointing
        progress.advance()
        forwards = training_forwards(network, checkpointed=checkpointed)
        expected = _expected_duration(config, network, plan, forwards, first, images)
        progress.advance()
        on_gpus = _on_gpus(Run(config, network), first)
        progress.advance()
    parts = [
        *_settings(
            replace(config, micro_batch=plan.micro_batch),
            path,
            zero=plan.parts.stage,
            activation_checkpointing="on" if checkpointed else "off",
        ),
        *_network(network, plan.parameters),
        *_memory(plan),
        *expected,
        *on_gpus,
        *_going_on(config, path, done),
        *_going_back(config, path),
        *_room(Run(config, network), path),
        *notes,
    ]
    return "\n".join(parts)


def _forwards(config: Distillation, trained: NetworkConfig, *, phased: bool, checkpointed: bool) -> float:
    passes = step_forwards(config.objective(trained), trained, phased=phased, checkpointed=checkpointed)
    return passes + config.further_flops(trained) / forward_flops(trained)


def _passes(config: Distillation, trained: NetworkConfig, plan: MemoryPlan, forwards: float) -> list[str]:
    """What a step computes of an image, pass by pass."""
    whole = f"{forwards:.3g} forward passes of the teacher's network"
    words = passes_in_words(config.objective(trained), phased=plan.phased)
    again = ", with what activation checkpointing computes again" if plan.activation_checkpointing else ""
    return [
        f"passes of an image in a step: {words}: {whole}{again}" if words else f"an image in a step: {whole}{again}"
    ]


def _settings(config: RunConfig, path: Path, **resolved: object) -> list[str]:
    ranks = launched_processes()
    local, micro = config.split(ranks)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings |= {"out": path, "max_steps": config.total_steps, **resolved}
    settings["micro_batch"] = f"{micro} x {local // micro} on each of {counted(ranks, 'process')}"
    lines = [f"  {name:<20} {_shown(value)}" for name, value in settings.items() if name not in ("kimg", "noise")]
    return ["configuration", *lines]


def _memory(plan: MemoryPlan) -> list[str]:
    return [
        "memory of one process (prediction; workspaces of convolutions not included)",
        *(f"  {line}" for line in str(plan).splitlines()),
    ]


def _network(network: NetworkConfig, parameters: int) -> list[str]:
    side = network.img_resolution
    labels = f", {network.label_dim} classes" if network.label_dim else ""
    return [
        "network",
        f"  {network.model_type}, {network.img_channels}x{side}x{side}{labels}, {parameters:,} parameters",
    ]


def _expected_duration(
    config: Distillation | TeacherConfig,
    network: NetworkConfig,
    plan: MemoryPlan,
    forwards: float,
    first: int = 0,
    images: int | None = None,
) -> list[str]:
    """Lines on the steps that are left from `first` on, and on the evaluations.

    Args:
        config: settings.
        network: architecture as it is trained.
        plan: how the run is laid out.
        forwards: forward passes, or as much arithmetic, of one image in one step.
        first: the step that the run begins with.
        images: drawn for each evaluation; None where there is none.
    """
    steps = config.total_steps - first
    device = run_device()
    config = replace(resolve_precision(config, device), zero=plan.parts.stage)
    form = config.laid_out(
        D=network.D,
        stage=plan.parts.stage,
        micro_batch=plan.micro_batch,
        phased=plan.phased,
        checkpointed=plan.activation_checkpointing,
    )
    step = step_time(form, network, forwards, device)
    lines = [
        f"expected duration on this {device.type.upper()}: "
        f"{duration(step.seconds * Run(config, network).steps_from(first))} for "
        f"{counted(f'{steps:,}', 'step')} ({three_digits(step.seconds)} s a step, {step.how()}; evaluations and "
        "checkpoints come on top)"
    ]
    if isinstance(config, Distillation) and step.pass_seconds and not step.forward_of:
        local = config.batch // launched_processes()
        lines.append(
            f"by its passes a step takes {three_digits(forwards * step.pass_seconds * local)} s: {forwards:.3g} times "
            f"{three_digits(step.pass_seconds * local)} s, which a forward pass of {counted(local, 'image')} took"
        )
    if images is not None and step.pass_seconds:
        run = Run(config, network)
        seconds = run.evaluation_passes(images) * step.pass_seconds / launched_processes()
        lines.append(
            f"evaluations on top of it: {duration(seconds)} for {run.evaluation_words(images)}; features left out"
        )
    return lines


def teacher_duration(config: TeacherConfig, network: NetworkConfig, path: Path) -> str:
    """A line for a run that trains its teacher, in the folder `path`: what that takes on this machine."""
    plan = choose_training(config, network, ranks=launched_processes(), budget=device_budget(run_device()))
    forwards = training_forwards(network, checkpointed=plan.activation_checkpointing)
    (expected,) = _expected_duration(config, network, plan, forwards, steps_done(config, path))
    return f"training of the teacher, before it: {expected}"


def _on_gpus(run: Run, first: int) -> list[str]:
    """What a step computes, and GPU hours by arithmetic alone."""
    config, flops = run.config, run.step_flops()
    precision = gpu_precision(config)
    steps = run.steps_from(first)
    hours = gpu_seconds(flops * steps, precision, config.tf32)
    shown = ", ".join(f"{name} {at_least_thousandths(seconds / 3600)}" for name, seconds in hours.items())
    return [
        f"arithmetic: {flops_in_words(flops)} a step, {flops_in_words(flops * steps)} in all; "
        f"GPU hours at {SHARE:.0%} of the {peak_in_words(precision, config.tf32)} peak (an assumption): {shown}"
        + (f"; {run.remark}" if run.remark else "")
    ]


def steps_done(config: RunConfig, path: Path) -> int:
    """The step at which the run at `path` goes on: that of its newest checkpoint, or the one that was asked for."""
    newest = max((step_of(checkpoint) for checkpoint in checkpoints_in(path / "checkpoints")), default=0)
    return min(newest if config.from_step is None else config.from_step, newest, config.total_steps)


def _student_first(config: Distillation, first: int) -> list[str]:
    """What the first steps are, where they are not whole ones; the durations count them so."""
    alone = config.first_whole_step
    if first >= alone:
        return []
    return [f"in the first {counted(f'{alone:,}', 'step')} the student alone is trained: less is computed in them"]


def _going_on(config: RunConfig, path: Path, done: int) -> list[str]:
    if not done:
        return []
    return [f"{path} goes on at step {done:,} of {config.total_steps:,}: the durations are those of what is left"]


def _going_back(config: RunConfig, path: Path) -> list[str]:
    """What --from-step puts aside of the run at `path`."""
    newest = newest_step(path, "teacher" if isinstance(config, TeacherConfig) else "distill")
    if config.from_step is None or newest <= config.from_step:
        return []
    return [f"steps {config.from_step} to {newest} are put aside first, as a run of their own in {path / SET_ASIDE}"]


def _room(run: Run, path: Path) -> list[str]:
    """What the run takes of the disk at `path`."""
    host = f", and of host memory {size(run.checkpoint)} while one is written" if run.config.async_checkpoints else ""
    lacking = missing_room(run.disk, path)
    return [f"disk: {run.disk.in_words()}{host}", *([] if lacking is None else [f"warning: {lacking}"])]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value)
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
