"""The engine against the plain PyTorch loop: the network and settings that are compared, and how."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipfm.engine.commands.bench.plain_loop import Plain
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.training.distiller import Distiller
from ipfm.kernels.adam import ema_entries
from ipfm.models import EDMPrecond, NetworkConfig, Precond

# Largest ||difference|| / ||parameter|| that passes for the same, in fp32 on a CPU.
LIMIT = 1e-5
# A large epsilon: with a small one Adam turns the rounding noise of near-zero gradients into whole steps.
BASE: Mapping[str, Any] = MappingProxyType(
    {
        "batch": 8, "max_steps": 20, "lr": 1e-3, "eps": 1e-2, "ema_kimg": 0.05, "ema": (0.1,), "alpha": 1.0, "seed": 3,
        "activation_checkpointing": "off",
    }
)  # fmt: skip
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1), dropout=0.0,
    label_dim=3, augment_dim=9, D=16.0,
)  # fmt: skip


def real_images() -> ImageDataset:
    """Images of noise with classes, for runs with real data: more than two batches, and mirrored at random."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (19, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(19) % 3, name="noise", classes=3, xflip=True)


class Difference(NamedTuple):
    """Largest ||difference|| / ||parameter|| over the parameters of a network."""

    student: float
    generator: float
    ema: float


def compared_teacher() -> Precond:
    """A small conditional NCSN++ with attention, a Fourier buffer and weights that matter everywhere; D = 16."""
    torch.manual_seed(0)
    net = EDMPrecond(NETWORK)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def trained_tensors(distiller: Distiller) -> dict[str, Tensor]:
    """Everything that is trained, whole, by "network/kind/name"; all processes call it."""
    return {
        f"{which}/{kind}/{name}": tensor.detach().float().clone()
        for which, network in distiller.networks.items()
        for kind in network.state_kinds
        for name, tensor in network.full(kind)
    }


def difference(plain: Plain, found: Mapping[str, Tensor]) -> Difference:
    """How far the engine's weights and average, as of `trained_tensors`, are from the plain loop's."""

    def largest(expected: Mapping[str, Tensor], prefix: str) -> float:
        return max(
            float((found[prefix + name] - tensor.detach()).norm() / tensor.detach().norm())
            for name, tensor in expected.items()
        )

    return Difference(
        largest(dict(plain.student.named_parameters()), "student/weight/"),
        largest(dict(plain.generator.named_parameters()), "generator/weight/"),
        max(
            largest(kept, f"generator/{kind}/")
            for kind, kept in zip(ema_entries(1 + len(plain.others)), (plain.ema, *plain.others), strict=True)
        ),
    )
