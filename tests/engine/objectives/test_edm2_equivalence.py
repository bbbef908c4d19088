"""Distilling an EDM2 teacher against a plain loop with its rule in the forward pass: stages, processes, K = 2."""

from __future__ import annotations

from pathlib import Path

import equivalence
import plain_lora
import pytest
import torch
from parts import parts
from plain_lora import BOTH

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import real_images, trained_tensors
from ipfm.engine.commands.bench.plain_rule import distill_edm2
from ipfm.engine.distributed.world import World
from ipfm.kernels.adam import ema_entries
from ipfm.models import load_teacher

# `make equivalence` makes 20 of every combination; here one of each stage makes some.
STEPS = 2
BASE = {**equivalence.BASE, "max_steps": STEPS}
TOLD = {"discriminator": "encoder", "discriminator_weights": (1.0, 0.02), "discriminator_kimg": (0.0, 0.0)}
CASES = {
    "k1-z0": {"zero": 0, "backward": "phased"},
    "k2-z1": {"zero": 1, "backward": "joint", "steps": 2, "memory_format": "channels_last"},
    "k2-z2": {"zero": 2, "backward": "phased", "steps": 2, "parts": 2, "memory_format": "channels_last"},
    "k1-z3": {"zero": 3, "backward": "joint", "parts": 2, "activation_checkpointing": "on"},
    "re-z2": {"zero": 2, "backward": "joint", "parts": 2, "real_weights": (0.7, 0.8)},
    "to-z1": {"zero": 1, "backward": "phased", **TOLD},
    "to-z2": {"zero": 2, "backward": "joint", "parts": 2, **TOLD},
    "to-z3": {"zero": 3, "backward": "phased", **TOLD},
    # Factors on the teacher's weights, whose plain loop begins with theirs.
    "lo-z1": {"zero": 1, "backward": "joint", "parts": 2, **BOTH},
    "lo-z3": {"zero": 3, "backward": "phased", "memory_format": "channels_last", **BOTH},
}
# By the number of processes what `make test` compares; the rest is left to `make thorough`. test_equivalence.py has a
# discriminator at stage 3.
SOME = {1: ("k1-z0", "k1-z3"), 2: ("k2-z1", "k2-z2", "k1-z3", "re-z2", "to-z2", "lo-z3")}
REST = {ranks: tuple(name for name in CASES if name not in names) for ranks, names in SOME.items()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence.make_edm2_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def plain(teacher: Path) -> dict[str, plain_loop.Plain]:
    net = load_teacher(teacher)
    return {
        name: distill_edm2(net, DistillConfig(**{**BASE, "steps": steps}), STEPS)
        for name, steps in (("k1", 1), ("k2", 2))
    } | {
        name: distill_edm2(net, DistillConfig(**BASE, **more), STEPS, real_images())
        for name, more in (("re", {"real_weights": (0.7, 0.8)}), ("to", TOLD))
    }


@pytest.fixture(scope="module")
def factors(teacher: Path) -> tuple[plain_loop.Plain, dict[str, dict[str, torch.Tensor]]]:
    """What the plain loop makes of factors, and theirs at the start."""
    config = DistillConfig(**{**BASE, **BOTH, "zero": 0})
    first = plain_lora.weights_of(Distiller(config, load_teacher(teacher), world=World(0, 1, torch.device("cpu"))))
    return plain_lora.plain(config, load_teacher(teacher), first, STEPS), first


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "names"),
    parts([*SOME.items(), *REST.items()], REST.items()),
    ids=["1-process", "2-processes", "1-process-rest", "2-processes-rest"],
)
def test_equals_the_plain_loop_with_the_rule_in_its_forward_pass(
    ranks: int, names: tuple[str, ...], teacher: Path, plain: dict[str, plain_loop.Plain], factors, tmp_path: Path
) -> None:
    cases = {}
    for name in names:
        case = CASES[name]
        settings = {key: value for key, value in case.items() if key != "parts"}
        cases[name] = {**BASE, **settings, "micro_batch": BASE["batch"] // ranks // case.get("parts", 1)}
    results = equivalence.run(teacher, tmp_path, ranks, cases, STEPS, whole=500, as_on_a_gpu=True)
    for name, found in results.items():
        if name.startswith("lo-"):
            losses = {key[5:]: loss for key, loss in found.items() if key.startswith("loss/")}
            plain_lora.check_equals(factors[0], found, losses, factors[1])
            continue
        assert max(equivalence.difference(plain[name[:2]], found)) <= equivalence.LIMIT, name
        # The squares of the generator's nearly cancel.
        for which, rtol in (("student", 1e-5), ("generator", 2e-4)):
            losses = torch.tensor(getattr(plain[name[:2]], f"{which}_loss")).double()
            torch.testing.assert_close(found[f"loss/{which}_loss"], losses, rtol=rtol, atol=1e-5)
    apart = equivalence.difference(plain["k1"], found_of(plain["k2"]))
    assert max(apart) > 50 * equivalence.LIMIT


def found_of(run: plain_loop.Plain) -> dict[str, torch.Tensor]:
    return {
        **{f"student/weight/{n}": p.detach() for n, p in run.student.named_parameters()},
        **{f"generator/weight/{n}": p.detach() for n, p in run.generator.named_parameters()},
        **{
            f"generator/{kind}/{n}": p
            for kind, kept in zip(ema_entries(1 + len(run.others)), (run.ema, *run.others), strict=True)
            for n, p in kept.items()
        },
    }


@pytest.mark.parametrize("steps", parts([8, 20], [20]))
def test_many_steps_on_one_process_equal_those_of_the_plain_loop(steps: int, teacher: Path) -> None:
    config = DistillConfig(**{**equivalence.BASE, "batch": 4, "zero": 0, "micro_batch": 2, "backward": "joint"})
    run = Distiller(config, load_teacher(teacher), world=World(0, 1, torch.device("cpu")))
    for step in range(steps):
        run.iteration(step)
    expected = distill_edm2(load_teacher(teacher), config, steps)
    assert max(equivalence.difference(expected, trained_tensors(run))) <= equivalence.LIMIT


def test_the_averaged_network_computes_with_the_averages_of_the_masters(teacher: Path) -> None:
    """And has them in its state dict, which is what is exported."""
    run = Distiller(DistillConfig(**{**BASE, "zero": 0}), load_teacher(teacher), world=World(0, 1, torch.device("cpu")))
    for step in range(2):
        run.iteration(step)
    run.refresh()
    averages = dict(run.generator.full("ema"))
    stored = run.average.state_dict()
    for name, tensor in averages.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-6, atol=0)
    fresh = load_teacher(teacher)
    fresh.load_state_dict({**fresh.state_dict(), **averages}, strict=False)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(3)[:2]
    torch.testing.assert_close(run.average(x, sigma, labels), fresh(x, sigma, labels))
