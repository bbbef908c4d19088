"""Networks on the teacher's weights with low-rank factors, against a plain loop by autograd through W + s B A."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from plain_lora import BOTH, check_equals, plain, weights_of

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.equivalence import trained_tensors
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.plan import distillation_bytes
from ipfm.engine.memory.simulate import StepSettings
from ipfm.engine.memory.state import Sharding
from ipfm.engine.training.checkpoint import load_checkpoint
from ipfm.engine.training.checkpoint_writer import save_checkpoint
from ipfm.models import presets

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 2
BASE: Mapping[str, Any] = {**equivalence.BASE, "max_steps": STEPS, **BOTH}
CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "both-phased": {"backward": "phased", "micro_batch": 4, "activation_checkpointing": "on"},
    "student": {"generator": "full"},
    "generator": {"student": "full", "backward": "phased"},
    "k2": {"steps": 2, "backward": "phased", "student_beta1": 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_loop(name: str) -> None:
    """The factors and averages of autograd's; the teacher's weights are those of all networks, and stay."""
    teacher = equivalence.compared_teacher().eval().requires_grad_(False)
    config = DistillConfig(**{**BASE, **CASES[name]})
    run = Distiller(config, teacher, world=ALONE)
    first = weights_of(run)
    expected = plain(run.config, teacher, first, STEPS)
    measured = [run.iteration(step) for step in range(STEPS)]
    losses = {n: torch.stack([m.sums[n] / m.counts[n] for m in measured]) for n in measured[0].sums}
    check_equals(expected, trained_tensors(run), losses, first)
    for ours, theirs in zip(run.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is None


def test_three_networks_on_one_set_of_weights_take_few_bytes() -> None:
    """All three, gradients included: at most 10 bytes a parameter up to rank 64, in bf16 on one process."""
    network = presets.get("cifar10-ncsnpp")
    found = {}
    for rank in (8, 32, 64):
        config = DistillConfig(student="lora", generator="lora", rank=rank)
        sharding = Sharding(precision="bf16", teacher_storage="half")
        found[rank] = distillation_bytes(StepSettings(network, 1, sharding, config=config)).per_parameter
    assert found == pytest.approx({8: 3.11, 32: 5.92, 64: 9.67}, abs=0.01)


def test_a_checkpoint_holds_factors_alone_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In bf16."""
    teacher = equivalence.compared_teacher().eval().requires_grad_(False)
    run, again = (Distiller(DistillConfig(**{**BASE, "precision": "bf16"}), teacher, world=ALONE) for _ in range(2))
    run.iteration(0)
    checkpoint = save_checkpoint(tmp_path, 1, run.networks, ALONE)
    run.iteration(1)
    assert load_checkpoint(checkpoint, again.networks) == 1
    again.iteration(1)
    ours, theirs = trained_tensors(run), trained_tensors(again)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {name.rpartition(".")[2] for name in ours} == {"lora_A", "lora_B"}
