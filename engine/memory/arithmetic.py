"""What a step computes, counted, and how long GPUs need for it: arithmetic, no measurement."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ipfm.engine.config import Precision
from ipfm.engine.objectives.base import TEACHER, Objective, Passes
from ipfm.engine.runtime.wording import three_digits
from ipfm.models import NetworkConfig, build_network

# An assumption: the share of a GPU's peak that a step of these networks reaches.
SHARE = 0.3
# Forward passes, or as much arithmetic, of a teacher's update: a backward pass is twice a forward pass.
TRAINING_FORWARDS = 3


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense arithmetic with sums in fp32."""

    name: str
    memory: float
    """GB."""
    half: float
    """TFLOP/s in bf16 and fp16."""
    tf32: float
    """TFLOP/s of fp32 numbers rounded to TF32."""
    single: float
    """TFLOP/s in fp32."""

    def peak(self, precision: Precision, tf32: bool) -> float:
        """FLOP/s of convolutions and matrix products."""
        return 1e12 * (self.half if precision != "fp32" else self.tf32 if tf32 else self.single)


# NVIDIA's data sheets: of A100, H100 and H200 the SXM form; of the RTX 4090 the white paper of its architecture, Ada.
GPUS = (
    Gpu("RTX 4090", 24, 165.2, 82.6, 82.6),
    Gpu("A100", 80, 312.0, 156.0, 19.5),
    Gpu("H100", 80, 989.4, 494.7, 66.9),
    Gpu("H200", 141, 989.4, 494.7, 66.9),
)


class _Counted(NamedTuple):
    """Operations of one image."""

    forward: int
    again: int
    """What activation checkpointing adds to a forward and backward pass."""


def forward_flops(network: NetworkConfig) -> int:
    """Floating-point operations of a forward pass of one image, without those of its guide.

    Those of convolutions and matrix products are counted, a multiplication and an addition each.
    """
    return _counted(network).forward


def recomputed_flops(network: NetworkConfig) -> int:
    """What activation checkpointing computes again of a forward pass of one image, counted as in `forward_flops`.

    The residual blocks, each up to its last layer: of that the backward pass needs what goes in and not what comes out.
    """
    return _counted(network).again


@functools.lru_cache(maxsize=64)
def _counted(network: NetworkConfig) -> _Counted:
    device = torch.device("meta")
    with device:
        net = build_network(network.unguided).eval()
    begun: dict[nn.Module, int] = {}
    last = again = 0

    def enter(module: nn.Module, _: object) -> None:
        begun[module] = counter.get_total_flops()

    def leave_layer(module: nn.Module, _: object, out: object) -> None:
        nonlocal last
        last = counter.get_total_flops() - begun[module]

    def leave_block(module: nn.Module, _: object, out: object) -> None:
        nonlocal again
        again += counter.get_total_flops() - begun[module] - last

    for block in net.model.blocks:
        assert isinstance(block, nn.Module)
        layers = [part for part in block.modules() if getattr(part, "weight", None) is not None]
        for module, leave in ((block, leave_block), *((layer, leave_layer) for layer in layers)):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, *network.image_shape, device=device), torch.empty(1, device=device))
    return _Counted(int(counter.get_total_flops()), again)


@functools.lru_cache(maxsize=64)
def encoder_flops(network: NetworkConfig) -> int:
    """Floating-point operations of a pass of one image through the encoder, counted as in `forward_flops`."""
    device = torch.device("meta")
    with device:
        net = build_network(network.unguided).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, *network.image_shape, device=device), torch.empty(1, device=device), logits="alone")
    return int(counter.get_total_flops())


def training_forwards(network: NetworkConfig, *, checkpointed: bool) -> float:
    """Forward passes, or as much arithmetic, of one image in a teacher's update."""
    return TRAINING_FORWARDS + (recomputed_flops(network) / forward_flops(network) if checkpointed else 0)


def step_forwards(objective: Objective, network: NetworkConfig, *, phased: bool, checkpointed: bool) -> float:
    """Forward passes of the teacher, or as much arithmetic, of one image in an iteration of a distillation.

    By the width of each network, with what checkpointing computes again, and with the teacher's guide, where the
    objective says its `passes`; elsewhere the guide is taken to be passed there and back once.

    Args:
        objective: what is distilled.
        network: the teacher's architecture, as it is trained.
        phased: one network's activations at a time.
        checkpointed: activations are computed again on the way back.
    """
    passes: Mapping[str, Passes] | None = None
    if (said := getattr(objective, "passes", None)) is not None:
        passes = said(phased=phased)
    if passes is None:
        guide = 2 * guide_flops(network) / forward_flops(network)
        return objective.forwards(phased=phased, checkpointed=checkpointed) + guide
    return _summed(passes, objective, network, checkpointed=checkpointed)


def share_at_first(objective: Objective, network: NetworkConfig) -> float:
    """What a step costs in which not every network is trained yet, by a whole one; 1 where nothing is known of it.

    Args:
        objective: what is distilled; its `passes_at_first`, if it has them, are those of such a step.
        network: the teacher's architecture, as it is trained.
    """
    if (said := getattr(objective, "passes_at_first", None)) is None:
        return 1.0
    whole = step_forwards(objective, network, phased=False, checkpointed=False)
    return _summed(said(), objective, network, checkpointed=False) / whole


def _summed(passes: Mapping[str, Passes], objective: Objective, network: NetworkConfig, *, checkpointed: bool) -> float:
    networks = [(role.name, role.network) for role in objective.roles] + [(TEACHER, network.unguided)]
    networks += [] if network.guide is None else [(TEACHER, network.guide.network)]
    total = 0.0
    for name, one in networks:
        of = passes.get(name, Passes(0, 0))
        total += of.whole * forward_flops(one)
        total += of.again * recomputed_flops(one) if checkpointed else 0
        if of.encoder:
            share = encoder_flops(one) / forward_flops(one)
            total += of.encoder * encoder_flops(one)
            total += of.encoder_again * share * recomputed_flops(one) if checkpointed else 0
    return total / forward_flops(network)


def passes_in_words(objective: Objective, *, phased: bool) -> str:
    """The passes of each network in an iteration; "" where the objective says only how many there are.

    Args:
        objective: what is distilled.
        phased: one network's activations at a time.
    """
    said = getattr(objective, "passes", None)
    return "" if said is None else "; ".join(f"{name} {of.in_words}" for name, of in said(phased=phased).items())


def guide_flops(network: NetworkConfig) -> int:
    """The same of the guide's; 0 of a network that is not guided."""
    return 0 if network.guide is None else forward_flops(network.guide.network)


def gpu_seconds(flops: float, precision: Precision, tf32: bool = True, share: float = SHARE) -> dict[str, float]:
    """Seconds that one GPU of each kind in `GPUS` needs for `flops`, at this share of its peak."""
    return {gpu.name: flops / (share * gpu.peak(precision, tf32)) for gpu in GPUS}


def peak_in_words(precision: Precision, tf32: bool) -> str:
    """The arithmetic whose peak counts: "bf16", "fp16", "TF32" or "fp32"."""
    return precision if precision != "fp32" else "TF32" if tf32 else "fp32"


def flops_in_words(flops: float) -> str:
    """For people: "3.14 TFLOP", "12.5 PFLOP"."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= unit:
            return f"{three_digits(flops / unit)} {name}"
    return f"{flops / 1e9:.3g} GFLOP"
