"""What --dry-run says: settings, memory plan and expected duration, without training anything."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from pathlib import Path

import torch

from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.distributed.world import run_device
from ipfm.engine.memory import MemoryPlan, choose_layout, choose_training, device_budget
from ipfm.engine.memory.fits import layout_table
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.runtime.launcher import launched_processes
from ipfm.engine.runtime.wording import counted, duration
from ipfm.engine.training.resolve import resolve_precision
from ipfm.models import NetworkConfig, build_network

# Forward passes, or as much arithmetic, of a teacher's update: a backward pass is twice a forward pass.
TRAINING_FORWARDS = 3


def describe(
    config: Distillation,
    network: NetworkConfig,
    path: Path,
    notes: tuple[str, ...] = (),
    *,
    given: Distillation | None = None,
) -> str:
    """What a run with this resolved configuration would do.

    That is settings, memory plan and expected duration on this machine, and how it would be laid out on GPUs. Runs a
    few forward passes of the network to estimate the duration.

    Args:
        config: settings with nothing left open but what memory decides.
        network: the teacher's architecture.
        path: the run folder.
        notes: lines to add.
        given: the settings as the user gave them, whose open ones the GPUs' layouts decide; default: `config`.
    """
    ranks = launched_processes()
    config.split(ranks)  # a batch that cannot be shared is bad input; too little memory is not
    trained = trained_config(network, config.dropout)
    parts: list[str] = []
    try:
        layout = choose_layout(config, trained, ranks=ranks, budget=device_budget(run_device()))
    except ValueError as error:
        parts = [*_settings(config, path, D=network.D), f"memory: {error}"]
    else:
        plan = layout.plan
        objective = config.objective(trained)
        cost = objective.forwards(phased=plan.backward == "phased", checkpointed=plan.activation_checkpointing)
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
            _expected_duration(config, network, cost),
        ]
    given = given or config
    parts += [layout_table(given, trained, zero=given.zero), *notes]
    return "\n".join(parts)


def describe_training(config: TeacherConfig, network: NetworkConfig, path: Path, notes: tuple[str, ...] = ()) -> str:
    """What training a teacher with this resolved configuration would do: settings, network, expected duration.

    Runs a few forward passes of the network to estimate the duration.
    """
    plan = choose_training(
        resolve_precision(config, run_device()),
        network,
        ranks=launched_processes(),
        budget=device_budget(run_device()),
    )
    checkpointed = plan.activation_checkpointing
    parts = [
        *_settings(
            replace(config, micro_batch=plan.micro_batch),
            path,
            zero=plan.parts.stage,
            activation_checkpointing="on" if checkpointed else "off",
        ),
        *_network(network, plan.parameters),
        *_memory(plan),
        _expected_duration(config, network, TRAINING_FORWARDS + checkpointed),
        *notes,
    ]
    return "\n".join(parts)


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


def _expected_duration(config: RunConfig, network: NetworkConfig, forwards: int) -> str:
    """`forwards`: forward passes, or as much arithmetic, of one image in one step."""
    device = run_device()
    local, _ = config.split(launched_processes())
    seconds = seconds_per_image(network, device, config.precision == "bf16") * local * forwards * config.total_steps
    return (
        f"expected duration on this {device.type.upper()}: {duration(seconds)} for {config.total_steps:,} steps "
        f"({seconds / config.total_steps:.3g} s a step)"
    )


def teacher_duration(config: TeacherConfig, network: NetworkConfig) -> str:
    """A line for the notes of `describe`: what the training of the run's teacher takes on this machine."""
    return f"training of the teacher, before it: {_expected_duration(config, network, TRAINING_FORWARDS)}"


def seconds_per_image(network: NetworkConfig, device: torch.device, bf16: bool) -> float:
    """Time of one forward pass per image, measured: the best of a few passes over a small batch."""
    net = build_network(network).to(device).eval()
    net.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    batch = max(
        1, min(64, 65_536 // (network.img_channels * network.img_resolution**2)) // (1 if device.type == "cuda" else 8)
    )
    x = torch.randn(batch, *network.image_shape, device=device)
    sigma = torch.ones(batch, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            _wait(device)
            start = time.perf_counter()
            net(x, sigma)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return best / batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value)
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
