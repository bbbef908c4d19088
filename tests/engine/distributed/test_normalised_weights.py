"""Forced weight normalisation in training: plain weights at every ZeRO stage against the rule's own form."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from edm2_fixtures import CONFIGS, network, recorded
from normalised_network import largest_difference, small_network, trained_in_forward, used
from safetensors.torch import load_file
from torch import Tensor

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import TrainedNetwork, _by_alignment
from ipfm.engine.memory.state import Sharding, state_bytes
from ipfm.models import EDM2Precond, build_network, presets

STEPS = 6
HALF = (("bf16", 2), ("fp16", 1))


def _cases(ranks: int, out: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for zero in (0, 1, 2, 3):
        # Small parameters stay whole at stage 3 in one of the two.
        cases.append({"name": f"z{zero}", "steps": STEPS, "config": {"zero": zero}, "persistent": 100})
        cases.append({"name": f"z{zero}-clipped", "steps": STEPS, "config": {"zero": zero, "clip_grad": 1.0}})
        # Saved on the way, and gone on from at another stage.
        saved = {"name": f"z{zero}-saved", "steps": 3, "config": {"zero": zero}, "save": str(out / f"{zero}.at-3")}
        cases.append(saved)
    cases += [
        {"name": f"to-{zero}", "steps": STEPS, "config": {"zero": zero}, "load": str(out / f"{(zero + 1) % 4}.at-3")}
        for zero in (0, 1, 2, 3)
    ]
    cases += [
        {"name": f"again-{zero}", "steps": STEPS, "config": {"zero": zero}, "load": str(out / f"{zero}.at-3")}
        for zero in (0, 1, 2, 3)
    ]
    cases.append({"name": "z2-offload", "steps": STEPS, "config": {"zero": 2, "offload": "optimizer"}})
    cases.append({"name": "z3-offload", "steps": STEPS, "config": {"zero": 3, "offload": "all"}})
    cases += [{"name": f"{p}-z{z}", "steps": STEPS, "config": {"zero": z, "precision": p}} for p, z in HALF]
    if ranks == 1:
        cases += [{"name": f"{p}-z0", "steps": STEPS, "config": {"zero": 0, "precision": p}} for p, _ in HALF]
        cases.append({"name": "fp16-z0-void", "steps": 1, "config": {"zero": 0, "precision": "fp16"}, "overflow": 0})
    for zero in (0, 3):
        cases.append({"name": f"z{zero}-void", "steps": 1, "config": {"zero": zero}, "overflow": 0})
    cases.append({"name": "fp16-z1-void", "steps": 1, "config": {"zero": 1, "precision": "fp16"}, "overflow": 0})
    return cases


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("out")
    cases = _cases(request.param, out)
    launch.run_workers("normalised_steps.py", request.param, {"out": str(out), "cases": cases})
    return {case["name"]: load_file(out / f"{case['name']}-{request.param}.safetensors") for case in cases}


@pytest.mark.distributed
def test_masters_averages_and_outputs_are_those_of_the_rule_in_the_forward_pass(found) -> None:
    """At every stage, offloaded and clipped too; two micro-batches a step, normalised once."""
    for clip in (None, 1.0):
        expected = trained_in_forward(STEPS, clip=clip)
        names = [n for n in found if n.startswith("z") and n.endswith("-clipped") == bool(clip)]
        for name in (n for n in names if not n.endswith(("void", "saved"))):
            assert largest_difference(found[name], expected) <= 2e-6, name


def test_rows_begin_where_16_bytes_do() -> None:
    """Gains, of one number each, lie behind the weights in a flat tensor, so that kernels read 128 bits at a time."""
    with torch.device("meta"):
        parameters = list(build_network(presets.get("edm2-img512-xs")).parameters())
    ordered = _by_alignment(parameters)
    assert set(ordered) == set(parameters) and len(ordered) == len(parameters)

    def apart(line: list[torch.nn.Parameter]) -> int:
        """Weights of which no row begins there that might."""
        ends = itertools.accumulate(p.numel() for p in line)
        return sum(
            (end - p.numel()) % 4 != 0 and p[0].numel() % 4 == 0 for p, end in zip(line, ends, strict=True) if p.ndim
        )

    assert apart(ordered) == 0 < apart(parameters)


@pytest.mark.distributed
def test_a_training_goes_on_at_any_stage_and_at_its_own_bit_for_bit(found) -> None:
    for zero in (0, 1, 2, 3):
        straight = found[f"z{zero}"]
        for key, tensor in found[f"again-{zero}"].items():
            if key != "scale":
                torch.testing.assert_close(tensor, straight[key], rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")
        assert largest_difference(found[f"to-{zero}"], {k: t for k, t in straight.items() if t.numel()}) <= 2e-6


@pytest.mark.distributed
def test_16_bits_keep_masters_in_float32(found) -> None:
    """They follow those of fp32, and stage 0 computes what stage 1 does."""
    expected = trained_in_forward(STEPS)
    for name in found:
        if name.startswith(("bf16", "fp16")) and not name.endswith("void"):
            assert 0 < largest_difference(found[name], expected) < 0.05, name
    if "fp16-z0" in found:
        keys = found["fp16-z0"].keys() - {"output"}
        for key in keys:
            torch.testing.assert_close(found["fp16-z0"][key], found["fp16-z1"][key], rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_a_void_step_changes_nothing(found) -> None:
    start = {f"weight/{n}": t for n, t in small_network().state_dict().items()}
    for name in (name for name in found if name.endswith("void")):
        assert found[name]["steps"] == 0
        for key, tensor in start.items():
            assert torch.equal(found[name][key], tensor) and torch.equal(found[name][f"ema/{key[7:]}"], tensor), name


def trained(net: EDM2Precond, precision: str = "fp32", **more: Any) -> TrainedNetwork:
    """An EDM2 network in training on one process at stage 0."""
    config = RunConfig(eps=1e-8, zero=0, precision=precision)
    settings = config.laid_out(D=float("inf"), stage=0, micro_batch=1, phased=False, checkpointed=False)
    return TrainedNetwork(
        net, settings, world=World(0, 1, torch.device("cpu")), lr=0.0, beta1=0.9, beta2=0.99, ema=True, **more
    )


def test_four_steps_of_two_batches_are_those_that_the_reference_recorded() -> None:
    """With its log-variance, learning rates and average. The rule is applied once a step here, there at each batch.

    That moves the weights by 1.1e-5, as the file's rows are far from size 1; nothing else does.
    """
    there = recorded("edm2_training_steps")
    net = trained(network("edm2_latent_uncond", torch.float64).train())
    for step, lr in enumerate(there["lr"].tolist()):
        for images, noise, normal in zip(
            *(there[k][step].double() for k in ("images", "noise", "normal_sigma")), strict=True
        ):
            sigma = torch.exp(-0.4 + normal)
            denoised = net(images + noise * sigma.view(-1, 1, 1, 1), sigma)
            u = net.module.logvar(sigma).view(-1, 1, 1, 1)
            weight = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).view(-1, 1, 1, 1)
            net.backward((weight / u.exp() * (denoised - images) ** 2 + u).sum() / 8)
        net.step(lr=lr, ema_decay=(1 - 8 / (8 * (step + 1))) ** (6.937203937601809 + 1))
    for kind, key in (("weight", "weights_f64"), ("ema", "ema_100_f64")):
        found = torch.cat([tensor.flatten() for _, tensor in net.full(kind)])
        assert (found - there[key]).abs().max() <= 1.2e-5
    start = torch.cat([p.flatten() for p in network("edm2_latent_uncond", torch.float64).state_dict().values()])
    assert (start[: len(found)] - found).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_a_network_in_training_are_those_that_the_plan_counts(precision: str) -> None:
    """16 bits have masters anyway, of which the plain weights take the roundings' place: no byte more."""
    config = CONFIGS["edm2_latent_uncond"]
    net = trained(network("edm2_latent_uncond", torch.float32), precision)
    counted = state_bytes(config, Sharding(precision=precision), [(config, 3)], teacher=False)
    tensors = [*net.module.parameters(), *net.optimizer.param_groups[0]["params"]]
    tensors += [t for state in net.optimizer.state.values() for t in state.values()]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    assert sum(held.values()) == counted.weights + counted.masters + counted.optimizer
    assert counted.per_parameter == pytest.approx({"fp32": 24, "bf16": 20}[precision], rel=0.01)


def test_the_reference_normalises_what_the_forward_pass_uses() -> None:
    """The layer that is left out keeps its master: it is in the comparison above."""
    masters = {n: t for n, t in trained_in_forward(1).items() if n.endswith(".weight") and n.startswith("weight/")}
    start = small_network().state_dict()
    for name, master in masters.items():
        rms = master.flatten(1).square().mean(1).sqrt()
        assert used(name.removeprefix("weight/")) == bool((rms - 1).abs().max() < 0.05)
        assert used(name.removeprefix("weight/")) != torch.equal(master, start[name.removeprefix("weight/")])
