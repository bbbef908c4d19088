"""What a step computes, counted, and the time of GPUs by their data sheets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from counted import counted_flops
from on_a_gpu import put_together_as_on_a_gpu
from torch import nn

from ipfm.engine import DistillConfig, Distiller, PidConfig, TeacherConfig, TeacherTraining
from ipfm.engine.config import Precision
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.arithmetic import (
    GPUS,
    SHARE,
    TRAINING_FORWARDS,
    flops_in_words,
    forward_flops,
    gpu_seconds,
    step_forwards,
    training_forwards,
)
from ipfm.models import NetworkConfig, build_network, presets
from ipfm.models.layers import Conv2d, Linear

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.0,
)  # fmt: skip


def test_operations_are_those_of_convolutions_and_matrix_products() -> None:
    net = build_network(SMALL).eval()
    found = []

    def count(module: nn.Module, _: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        weight = module.weight
        if isinstance(weight, nn.Parameter):
            numbers = sum(part.numel() for part in (out if isinstance(out, tuple) else (out,)))
            found.append(2 * numbers * weight[0].numel())

    for module in net.modules():
        if isinstance(module, (Conv2d, Linear)):
            module.register_forward_hook(count)
    net(torch.zeros(1, 1, 8, 8), torch.ones(1))
    counted = forward_flops(SMALL)
    # So is attention.
    assert sum(found) <= counted <= 1.2 * sum(found)


_ONE = {"D": 128.0, "batch": 2, "max_steps": 1, "precision": "fp32", "zero": 0, "activation_checkpointing": "off"}


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (DistillConfig(**_ONE, backward="joint"), 11),
        (DistillConfig(**_ONE, backward="phased"), 13),
        (DistillConfig(**_ONE, backward="joint", steps=2), 16),
        (PidConfig(**_ONE, backward="joint", distance="l2"), 7),
    ],
    ids=["joint", "phased", "two steps", "pid"],
)
def test_a_step_has_the_arithmetic_of_so_many_forward_passes(config: DistillConfig | PidConfig, passes: int) -> None:
    """Counted in a real step: a backward pass is two forward passes, and one through a frozen network is one."""
    network = presets.get("digits", D=128.0)
    run = Distiller(config, build_network(network).eval(), world=World(0, 1, torch.device("cpu")))
    counted = counted_flops(lambda: run.iteration(0)) / config.batch
    assert run.objective.forwards(phased=config.backward == "phased", checkpointed=False) == passes
    # The first layers need no gradient of their images.
    assert counted == pytest.approx(passes * forward_flops(network), rel=0.02)


@pytest.mark.parametrize(
    "more",
    [
        {"activation_checkpointing": "on"},
        {"activation_checkpointing": "on", "backward": "phased", "steps": 2},
        {"width": 0.5},
        {"width": 2.0, "student_width": 0.5, "activation_checkpointing": "on", "steps": 2},
    ],
    ids=["checkpointed", "phased", "narrow", "of other widths"],
)
def test_networks_count_by_their_width_and_by_what_is_computed_again(more: dict[str, Any]) -> None:
    """Predicted beside what a real step does."""
    network = presets.get("digits", D=128.0)
    config = DistillConfig(**{**_ONE, "backward": "joint", **more})
    run = Distiller(config, build_network(network).eval(), world=World(0, 1, torch.device("cpu")))
    counted = counted_flops(lambda: run.iteration(0)) / config.batch
    form = {"phased": config.backward == "phased", "checkpointed": config.activation_checkpointing == "on"}
    predicted = step_forwards(run.objective, network, **form) * forward_flops(network)
    assert predicted == pytest.approx(counted, rel=0.02)
    whole = run.objective.forwards(**form) * forward_flops(network)
    assert abs(whole / counted - 1) > 0.02, "as if all were as wide, and computed again as a whole"


def test_an_update_of_a_teacher_that_is_checkpointed() -> None:
    network = presets.get("digits", D=128.0)
    data = ImageDataset(torch.zeros(4, *network.image_shape, dtype=torch.uint8))
    config = TeacherConfig(**{**_ONE, "activation_checkpointing": "on"})
    run = TeacherTraining(config, network, data, world=World(0, 1, torch.device("cpu")))
    counted = counted_flops(lambda: run.iteration(0)) / 2
    with put_together_as_on_a_gpu():
        # Whose blocks are functions of autograd, but where they are computed again.
        there = counted_flops(lambda: run.iteration(1)) / 2
    predicted = training_forwards(network, checkpointed=True) * forward_flops(network)
    assert predicted == pytest.approx(counted, rel=0.02) == pytest.approx(there, rel=0.02)


def test_an_update_of_a_teacher_has_the_arithmetic_of_three() -> None:
    network = presets.get("digits", D=128.0)
    data = ImageDataset(torch.zeros(4, *network.image_shape, dtype=torch.uint8))
    run = TeacherTraining(TeacherConfig(**_ONE), network, data, world=World(0, 1, torch.device("cpu")))
    counted = counted_flops(lambda: run.iteration(0)) / 2
    assert counted == pytest.approx(TRAINING_FORWARDS * forward_flops(network), rel=0.02)


@pytest.mark.parametrize(
    ("precision", "tf32", "name", "peak"),
    [("bf16", True, "A100", 312e12), ("fp16", True, "H100", 989.4e12), ("fp32", True, "A100", 156e12),
     ("fp32", False, "A100", 19.5e12), ("bf16", False, "RTX 4090", 165.2e12)],
)  # fmt: skip
def test_seconds_are_operations_over_a_share_of_the_peak(
    precision: Precision, tf32: bool, name: str, peak: float
) -> None:
    assert gpu_seconds(3e15, precision, tf32)[name] == pytest.approx(3e15 / (SHARE * peak))
    assert gpu_seconds(3e15, precision, tf32, share=0.5)[name] == pytest.approx(3e15 / (0.5 * peak))
    assert list(gpu_seconds(1.0, precision)) == [gpu.name for gpu in GPUS]


@pytest.mark.parametrize(
    ("flops", "words"),
    [
        (2.5e9, "2.5 GFLOP"),
        (3.14159e12, "3.14 TFLOP"),
        (4e15, "4 PFLOP"),
        (7.25e20, "725 EFLOP"),
        (1.194e21, "1,190 EFLOP"),
        (0, "0 GFLOP"),
    ],
)
def test_in_words(flops: float, words: str) -> None:
    assert flops_in_words(flops) == words and math.isfinite(flops)
