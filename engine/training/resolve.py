"""What settings leave open, decided: by the network and the device first, then by memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ipfm.engine.config import Resolved, RunConfig, TeacherConfig
from ipfm.engine.data.augmentation import AUGMENT_DIM, SMALLEST_SIZE
from ipfm.engine.distributed.compilation import check_compiler
from ipfm.engine.distributed.pieces import CAPTURES
from ipfm.engine.distributed.precision import DTYPES, bf16_supported, fp16_supported
from ipfm.engine.distributed.world import World
from ipfm.engine.memory import MemoryPlan, choose_layout, choose_training, device_budget
from ipfm.engine.noise_levels import check_trainable
from ipfm.engine.objectives.base import Distillation, check_factors
from ipfm.engine.objectives.captured import check_graphs
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.models import NetworkConfig, build_network
from ipfm.models.attention import xformers_obstacle

C = TypeVar("C", bound=RunConfig)
K = TypeVar("K", bound=Distillation)


def resolve(config: K, network: NetworkConfig, world: World) -> Resolved[K]:
    """A distillation's settings with nothing left open: completed, and laid out in the memory of these processes.

    Args:
        config: settings as given, or as `complete` made them.
        network: the teacher's architecture, as it is stored.
        world: the run's processes.

    Returns:
        As given where that leaves nothing open; else the cheapest layout that the device holds.

    Raises:
        ValueError: what `complete` raises; the batch does not divide among the processes, or memory does not suffice.
    """
    config = complete(config, network, world.device)
    if given := _as_given(config, network, world, config.backward):
        return given
    trained = trained_config(network, config.dropout)
    layout = choose_layout(config, trained, ranks=world.size, budget=device_budget(world.device))
    _check_planned(config, network, layout.plan, world)
    return _as_planned(config, layout.plan, network.D)


def resolve_training(config: TeacherConfig, network: NetworkConfig, world: World) -> Resolved[TeacherConfig]:
    """The same for a teacher's training, where `network` is what is trained, but for the dropout of its settings.

    Raises:
        ValueError: what `complete_training` raises; the batch does not divide among the processes, or memory does not
            suffice.
    """
    config = complete_training(config, network, world.device)
    trained = replace(network, dropout=config.dropout)
    if given := _as_given(config, trained, world, "joint"):
        return given
    plan = choose_training(config, trained, ranks=world.size, budget=device_budget(world.device))
    _check_planned(config, trained, plan, world)
    return _as_planned(config, plan, network.D)


def _as_given(config: C, network: NetworkConfig, world: World, backward: str) -> Resolved[C] | None:
    """The settings laid out as they are, None where that leaves something open; checked as far as they are given."""
    _, micro = config.split(world.size)
    stage, checkpointing = config.zero, config.activation_checkpointing
    check_graphs(config, network, ranks=world.size, stage=stage, **_given_form(config))
    if config.micro_batch is None or stage is None or "auto" in (backward, checkpointing):
        return None
    phased, checkpointed = backward == "phased", checkpointing == "on"
    return config.laid_out(D=network.D, stage=stage, micro_batch=micro, phased=phased, checkpointed=checkpointed)


def _given_form(config: RunConfig) -> dict[str, bool]:
    """The form of the step as far as it was asked for."""
    phased = isinstance(config, Distillation) and config.backward == "phased"
    return {"phased": phased, "checkpointed": config.activation_checkpointing == "on"}


def _check_planned(config: RunConfig, network: NetworkConfig, plan: MemoryPlan, world: World) -> None:
    """Check that the steps can be captured as they are laid out, where that was asked for."""
    stage, checkpointed = plan.parts.stage, plan.activation_checkpointing
    check_graphs(config, network, ranks=world.size, stage=stage, phased=plan.phased, checkpointed=checkpointed)


def _as_planned(config: C, plan: MemoryPlan, D: float) -> Resolved[C]:
    """The settings laid out as a plan says, with its ZeRO stage among them."""
    return replace(config, zero=plan.parts.stage).laid_out(
        D=D,
        stage=plan.parts.stage,
        micro_batch=plan.micro_batch,
        phased=plan.phased,
        checkpointed=plan.activation_checkpointing,
    )


def complete(config: K, network: NetworkConfig, device: torch.device) -> K:
    """A distillation's settings with what needs no process group decided.

    That is D, guidance, precision, the teacher's storage, and what its own `completed` decides. What memory decides
    stays open, see `resolve`.

    Args:
        config: settings as given.
        network: the teacher's architecture, as it is stored.
        device: where it will run.

    Raises:
        ValueError: D or guidance contradicts the teacher's, it takes no augmentation labels and images are to be
            augmented, factors are asked for that the objective does not train, or something else does not go with it or
            the device.
    """
    check_augment(config.augment, network)
    config.check_network(network)
    guidance = resolve_guidance(config.guidance, network)
    config = replace(config, D=resolve_D(config.D, network), guidance=guidance).completed(network)
    if config.low_rank_roles:
        check_factors(config.objective(trained_config(network, config.dropout)), config.low_rank_roles)
    config = resolve_precision(config, device)
    check_attention(config, network, device)
    return resolve_graphs(replace(config, teacher_storage=config.decided_storage), network, device)


def complete_training(config: TeacherConfig, network: NetworkConfig, device: torch.device) -> TeacherConfig:
    """The same for a teacher's training: D, precision and CUDA graphs.

    Raises:
        ValueError: D contradicts the network's, its preconditioning is none that is trained here, it takes no
            augmentation labels and images are to be augmented, or the device cannot do the precision.
    """
    check_trainable(network)
    D = resolve_D(config.D, network)
    check_augment(config.augment, network)
    config = resolve_precision(replace(config, D=D), device)
    check_attention(config, network, device)
    return resolve_graphs(config, replace(network, dropout=config.dropout), device)


def resolve_D(D: float | None, network: NetworkConfig) -> float:
    """D of a run: as given, or the network's.

    Raises:
        ValueError: they contradict each other.
    """
    if D is not None and D != network.D:
        raise ValueError(f"D {D:g} was given, but the network was trained for D {network.D:g}: leave D out or match it")
    return network.D


def resolve_guidance(guidance: float | None, network: NetworkConfig) -> float | None:
    """How far a distillation's teacher is driven from its guide: as its network has it; None without one.

    Raises:
        ValueError: another factor was given, or one for a network that is not guided.
    """
    own = None if network.guide is None else network.guide.weight
    # A factor of 1 is the teacher alone.
    if guidance is not None and guidance != (1.0 if own is None else own):
        has = "is not guided: guided(teacher, guide, guidance) makes one that is" if own is None else f"has {own:g}"
        raise ValueError(f"guidance {guidance:g} was given, but the teacher {has}")
    return own


def resolve_precision(config: C, device: torch.device) -> C:
    """The configuration with "auto" precision decided for `device`.

    bf16 where a GPU has it without emulation, fp32 elsewhere, and where stage 0 was asked for.

    Raises:
        ValueError: the device cannot do it.
    """
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if config.zero != 0 and bf16_supported(device) else "fp32"
    if precision == "fp16" and not fp16_supported(device):
        raise ValueError(f"precision fp16 does not run on this {device.type}: give fp32 or bf16")
    if config.compile:
        check_compiler(device)
    return replace(config, precision=precision)


def check_attention(config: RunConfig, network: NetworkConfig, device: torch.device) -> None:
    """Check that what is asked for attention can serve the network on `device`.

    Raises:
        ValueError: xformers cannot, with the reason.
    """
    if config.attention_backend != "xformers":
        return
    with torch.device("meta"):
        blocks = list(build_network(network).model.blocks)
    for width in sorted({block.out_channels // block.num_heads for block in blocks if block.num_heads}):
        if reason := xformers_obstacle(device, DTYPES[config.decided_precision], width):
            raise ValueError(f"attention-backend xformers cannot run here: {reason}: give auto or sdpa")


def resolve_graphs(config: C, network: NetworkConfig, device: torch.device) -> C:
    """The configuration with CUDA graphs switched off where there is no GPU.

    Raises:
        ValueError: they were asked for, and cannot be had.
    """
    if device.type not in CAPTURES:
        if config.cuda_graphs == "on":
            raise ValueError(f"cuda-graphs on needs a GPU, and this is a {device.type}: give auto or off")
        return replace(config, cuda_graphs="off")
    check_graphs(config, network, ranks=1, stage=config.zero, **_given_form(config))
    return config


def check_augment(probability: float, network: NetworkConfig) -> None:
    """Check that images are augmented only for a network that is told so: another would learn to make augmented ones.

    Raises:
        ValueError: it takes no augmentation labels, or its images are too small.
    """
    if probability > 0 and network.augment_dim != AUGMENT_DIM:
        raise ValueError(
            f"augment {probability:g} needs a network with {AUGMENT_DIM} augmentation labels, "
            f"this one has {network.augment_dim}: give --augment 0"
        )
    if probability > 0 and network.img_resolution < SMALLEST_SIZE:
        raise ValueError(
            f"augment {probability:g} needs images of at least {SMALLEST_SIZE}x{SMALLEST_SIZE}, "
            f"this network's have side {network.img_resolution}: give --augment 0"
        )
