"""Networks on the teacher's weights with low-rank factors, against a plain loop by autograd through W + s B A."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from parts import parts
from plain_lora import BOTH, check_equals, plain, weights_of

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.equivalence import NETWORK, trained_tensors
from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.engine.distributed.precision import apply_precision, halve_storage
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.memory.live import tensor_bytes
from ipfm.engine.memory.plan import distillation_bytes
from ipfm.engine.memory.simulate import StepSettings
from ipfm.engine.memory.state import Sharding, parameter_count
from ipfm.engine.training.checkpoint import load_checkpoint
from ipfm.engine.training.checkpoint_writer import save_checkpoint
from ipfm.engine.training.resolve import resolve
from ipfm.models import Precond, build_network, load_teacher, presets
from ipfm.models.low_rank import low_rank_network

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 2
BASE: Mapping[str, Any] = {**equivalence.BASE, "max_steps": STEPS, **BOTH}
CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "both-phased": {"backward": "phased", "micro_batch": 4, "activation_checkpointing": "on"},
    "student": {"generator": "full"},
    "generator": {"student": "full", "backward": "phased"},
    "k2": {"steps": 2, "backward": "phased", "student_beta1": 0.5},
    "edm2": {},
    "edm2-phased": {"backward": "phased", "generator": "full", "activation_checkpointing": "on", "micro_batch": 4},
}


def of(name: str, folder: Path) -> Precond:
    """The teacher of a case."""
    if name.startswith("edm2"):
        return load_teacher(equivalence.make_edm2_teacher(folder))
    return equivalence.compared_teacher().eval().requires_grad_(False)


@pytest.mark.parametrize("name", parts(CASES, ["k2", "edm2-phased"]))
def test_equals_the_plain_loop(name: str, tmp_path: Path) -> None:
    """The factors and averages of autograd's; the teacher's weights are those of all networks, and stay."""
    teacher = of(name, tmp_path)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", ["ncsn++", "edm2"])
def test_the_plan_is_what_one_process_holds(network: str, precision: str) -> None:
    """Weights of the teacher, factors, their masters, moments and averages; then the gradients of a network."""
    # In which factors and gains are small beside weights.
    small = EDM2 if network == "edm2" else NETWORK
    thin = replace(small, model_channels=64, channels_per_head=64)
    storage = "fp32" if precision == "fp32" else "half"
    config = DistillConfig(**{**BASE, "precision": precision, "teacher_storage": storage, "rank": 16})
    settings = resolve(config, thin, ALONE)
    gc.collect()
    before = tensor_bytes()
    teacher = apply_precision(build_network(thin), settings.precision).eval().requires_grad_(False)
    if storage == "half":
        halve_storage(teacher, settings.precision)
    held = {}
    for role in config.objective(thin).roles:
        net = low_rank_network(role.network, teacher, role.lora)
        held[role.name] = TrainedNetwork(
            net, settings, world=ALONE, lr=role.lr, beta1=role.beta1, ema=role.kept(config.average_names)
        )
    gc.collect()
    parts = distillation_bytes(StepSettings.of(settings, thin, 1, keeps_gradients=False))
    # Filters, embeddings and such are buffers of each network, and small.
    assert tensor_bytes() - before == pytest.approx(parts.permanent, rel=0.02)
    for net in held.values():
        for p in net.module.parameters():
            p.grad = torch.zeros_like(p)
        gc.collect()
        assert tensor_bytes() - before == pytest.approx(parts.permanent + parts.gradients, rel=0.02)
        for p in net.module.parameters():
            p.grad = None
    assert held["student"].parameter_count == held["generator"].parameter_count == parts.trained


def test_a_checkpoint_holds_factors_alone_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In bf16."""
    teacher = equivalence.compared_teacher().eval().requires_grad_(False)
    run, again = (Distiller(DistillConfig(**{**BASE, "precision": "bf16"}), teacher, world=ALONE) for _ in range(2))
    run.iteration(0)
    checkpoint = save_checkpoint(tmp_path, 1, run.networks, ALONE)
    # What is planned of the disk is what lies there, but for names.
    taken = sum(len(file.read_bytes()) for file in checkpoint.glob("*.safetensors"))
    numbers = Run(run.config, teacher.config).checkpoint
    assert numbers < taken < numbers + 200_000 and taken < 0.6 * 4 * 5 * parameter_count(teacher.config)
    run.iteration(1)
    assert load_checkpoint(checkpoint, again.networks) == 1
    again.iteration(1)
    ours, theirs = trained_tensors(run), trained_tensors(again)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {name.rpartition(".")[2] for name in ours} == {"lora_A", "lora_B"}
