"""A distillation small enough to be made many times: settings, teacher, run; and noise of one dimension."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import equivalence
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.equivalence import NETWORK, trained_tensors
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.losses import Noisy, add_noise
from ipfm.models import NetworkConfig, Precond, build_network

ALONE = World(0, 1, torch.device("cpu"))
BASE: dict[str, Any] = {**equivalence.BASE, "max_steps": 2, "zero": 0, "micro_batch": 8, "backward": "joint"}


def log_kernel(squared: Tensor, D: float, sigma: float) -> Tensor:
    """The logarithm of p_r(x | y) of one dimension, of |x - y|^2, without its constant."""
    if math.isinf(D):
        return -squared / (2 * sigma**2)
    return -(1 + D) / 2 * torch.log1p(squared / (sigma**2 * D))


def tiny_teacher(D: float = 16.0) -> Precond:
    torch.manual_seed(0)
    net = build_network(replace(NETWORK, model_channels=4, channel_mult=(1,), attn_resolutions=(), D=D))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def run(config: DistillConfig, teacher: Precond, real: ImageDataset | None, steps: int = 2) -> dict[str, Tensor]:
    """Everything that is trained, and the losses, after some steps."""
    made = Distiller(config, teacher, real=real, world=ALONE)
    losses = [made.iteration(step) for step in range(steps)]
    found = {f"loss {step} {name}": value for step, loss in enumerate(losses) for name, value in loss.sums.items()}
    assert not any(bool(value) for loss in losses for value in loss.bad.values())
    return {**trained_tensors(made), **found}


def four_pixels(seed: int) -> Precond:
    """A network without classes of images of 4 x 4 pixels, away from its first weights."""
    torch.manual_seed(seed)
    net = build_network(
        NetworkConfig(
            img_resolution=4, img_channels=2, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
            dropout=0.0, D=16.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def at_six_levels(net: Precond) -> tuple[Tensor, Noisy]:
    """y (6, C, H, W) float64 for it and its perturbation, at levels of a wide range."""
    y = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / 2
    sigma = torch.tensor([0.05, 0.3, 1.0, 2.0, 4.0, 20.0], dtype=torch.float64)
    return y, add_noise(y, sigma, 16.0, net, seed=0, stream=0, step=0, sample_index=torch.arange(6))
