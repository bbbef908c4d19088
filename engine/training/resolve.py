"""What a configuration leaves open, decided for a teacher and a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ipfm.engine.config import RunConfig
from ipfm.engine.data.augmentation import AUGMENT_DIM, SMALLEST_SIZE
from ipfm.engine.distributed.compilation import check_compiler
from ipfm.engine.distributed.precision import fp16_supported
from ipfm.engine.objectives.base import Distillation
from ipfm.models import NetworkConfig

C = TypeVar("C", bound=RunConfig)
K = TypeVar("K", bound=Distillation)


def resolve_D(D: float | None, network: NetworkConfig) -> float:
    """D of a run: as given, or the network's.

    Raises:
        ValueError: they contradict each other.
    """
    if D is not None and D != network.D:
        raise ValueError(f"D {D:g} was given, but the network was trained for D {network.D:g}: leave D out or match it")
    return network.D


def resolve_precision(config: C, device: torch.device) -> C:
    """The configuration with "auto" precision decided for `device`.

    bf16 where a GPU has it and the stage allows it (fp32 masters live in ZeRO's optimiser), fp32 elsewhere.

    Raises:
        ValueError: the device cannot do it.
    """
    precision = config.precision
    if precision == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if capable and config.zero != 0 else "fp32"
    if precision == "fp16" and not fp16_supported(device):
        raise ValueError(f"precision fp16 does not run on this {device.type}: give fp32 or bf16")
    if config.compile:
        check_compiler(device)
    return replace(config, precision=precision)


def resolve(config: K, network: NetworkConfig, device: torch.device) -> K:
    """The configuration of a distillation with nothing left open but what memory decides: D, precision, the teacher's
    storage, and what its own `resolved` decides.

    Raises:
        ValueError: D contradicts the teacher's, it takes no augmentation labels and images are to be augmented, or
            something else does not go with it.
    """
    check_augment(config.augment, network)
    config = replace(config, D=resolve_D(config.D, network)).completed(network)
    config = resolve_precision(config, device)
    if config.teacher_storage == "auto":
        config = replace(config, teacher_storage="fp32" if config.precision == "fp32" else "half")
    return config


def check_augment(probability: float, network: NetworkConfig) -> None:
    """ValueError where images are to be augmented for a network that cannot be told so: it would learn to make them."""
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


def allow_tf32(allowed: bool) -> None:
    """TF32 in fp32 convolutions and matrix products on GPUs that have it."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
