"""The engine against a plain PyTorch loop: every ZeRO stage, one and two processes, joint and phased, accumulated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compared_cases
import equivalence
import plain_lora
import pytest
import torch
from compared_cases import BASE, STEPS, WHOLE
from parts import parts
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.pid import PidConfig
from ipfm.kernels.adam import ema_entries
from ipfm.models import load_teacher

# Physics informed distillation, whose gradients are those of a difference quotient; eps as the gradients are large.
PID = {**{name: value for name, value in BASE.items() if name != "alpha"}, "points": 50, "eps": 1.0}
PIDS: dict[str, dict[str, Any]] = {
    "pid-z1-joint": {"zero": 1, "backward": "joint"},
    "pid-z2-phased": {"zero": 2, "backward": "phased", "difference": "central"},
    "pid-z2-clipped": {"zero": 2, "backward": "joint", "clip_grad": 0.5},
}
HALF = (("bf16", 1), ("bf16", 3), ("fp16", 1))
# Of the grid on one process: all stages, one form of each.
ALONE = [f"k1-z{stage}-{('joint', 'phased')[stage % 2]}-a1" for stage in (0, 1, 2, 3)]
# On two processes the one of the grid's own network, of two levels; the others are of that of one.
OF_2_LEVELS = "k1-z3-joint-a1"
# Factors on the teacher's weights, of two processes: no setting of `compared_cases`, as they begin by themselves.
LORA = {
    f"lora-z{stage}": {"zero": stage, "backward": ("joint", "phased")[stage % 2], "micro_batch": (4, 2, 2, 4)[stage]}
    for stage in (0, 1, 2, 3)
} | {"lora-z3-offload": {"zero": 3, "offload": "all", "backward": "joint", "micro_batch": 4}}


def _grid(ranks: int) -> dict[str, dict[str, Any]]:
    """Every stage, on two processes accumulated and in both forms.

    `make equivalence` makes 20 steps of it, and goes through every combination on the network of two levels.
    """
    return {
        name: {**config, "max_steps": STEPS}
        for name, config in equivalence.grid(ranks).items()
        if (name.endswith("a2") or name == OF_2_LEVELS if ranks == 2 else name in ALONE)
    }


def _further(ranks: int) -> dict[str, dict[str, Any]]:
    """Some cases of each further setting; `make equivalence` has all of them."""
    every = compared_cases.beside_the_grid(ranks)
    return {name: case for name, case in every.items() if name not in compared_cases.LEFT_TO_THE_TABLE}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of all but one case."""
    return compared_cases.make_small_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def plain(teacher: Path) -> plain_loop.Plain:
    """What the case of two levels is compared with."""
    return plain_loop.distill(load_teacher(teacher), DistillConfig(**BASE), STEPS)


@pytest.fixture(scope="module")
def further(small: Path) -> dict[str, plain_loop.Plain]:
    return compared_cases.by_the_plain_loop(load_teacher(small))


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def results(request: pytest.FixtureRequest, teacher: Path, small: Path, tmp_path_factory: pytest.TempPathFactory):
    ranks, out = request.param, tmp_path_factory.mktemp("out")
    cases = _grid(ranks)
    if ranks == 2:
        cases |= {name: {**BASE, **plain_lora.BOTH, **more} for name, more in LORA.items()}
    cases |= _further(ranks)
    if ranks == 2:
        cases[OF_2_LEVELS]["teacher"] = str(teacher)
    return equivalence.run(small, out, ranks, cases, STEPS, whole=WHOLE)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_equals_the_plain_loop(results, plain: plain_loop.Plain, further: dict[str, plain_loop.Plain]) -> None:
    for name, found in results.items():
        if name not in LORA:
            expected = plain if name == OF_2_LEVELS else further[name.partition("-")[0]]
            assert max(compared_cases.check_steps(expected, found, name)) <= equivalence.LIMIT, name


def test_what_is_left_to_the_table_is_of_a_setting_that_is_compared_here_too() -> None:
    assert compared_cases.beside_the_grid(2).keys() > compared_cases.LEFT_TO_THE_TABLE
    here = {name.partition("-")[0] for ranks in (1, 2) for name in _further(ranks)}
    assert here >= compared_cases.SETTINGS.keys()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2], ids=["1-process", "2-processes"])
def test_networks_put_together_as_on_a_gpu_equal_the_plain_loop(
    ranks: int, small: Path, further: dict[str, plain_loop.Plain], tmp_path: Path
) -> None:
    """One product for all projections of the embedding, biases that leave their layers, weights in channels_last.

    On one process the stage that one takes by itself, on two the others.
    """
    cases = {
        name: case for name, case in compared_cases.as_on_a_gpu(ranks).items() if (name == "k1-z0") == (ranks == 1)
    }
    found = equivalence.run(small, tmp_path, ranks, cases, STEPS, whole=WHOLE, as_on_a_gpu=True)
    for name, tensors in found.items():
        assert max(compared_cases.check_steps(further["k1"], tensors, name)) <= equivalence.LIMIT, name


@pytest.mark.distributed
@pytest.mark.parametrize("results", [2], indirect=True, ids=["2-processes"])
def test_factors_on_the_teachers_weights_equal_the_plain_loop(results, small: Path) -> None:
    """Every ZeRO stage, joint and phased, accumulated."""
    net = load_teacher(small)
    config = DistillConfig(**{**BASE, **plain_lora.BOTH, "zero": 0})
    first = plain_lora.weights_of(Distiller(config, net, world=World(0, 1, torch.device("cpu"))))
    expected = plain_lora.plain(config, net, first, STEPS)
    for name in LORA:
        found = results[name]
        losses = {key[5:]: loss for key, loss in found.items() if key.startswith("loss/")}
        plain_lora.check_equals(expected, found, losses, first)


@pytest.mark.distributed
@pytest.mark.parametrize("results", [2], indirect=True, ids=["2-processes"])
def test_joint_and_phased_agree(results) -> None:
    check_forms(results, "a2")


@pytest.mark.thorough
@pytest.mark.distributed
def test_joint_and_phased_agree_on_one_process(teacher: Path, tmp_path: Path) -> None:
    cases = {name: {**case, "max_steps": STEPS} for name, case in equivalence.grid(1).items() if name.endswith("a1")}
    check_forms(equivalence.run(teacher, tmp_path, 1, cases, STEPS, whole=WHOLE), "a1")


def check_forms(results: Mapping[str, Mapping[str, Tensor]], accumulated: str) -> None:
    for stage in (0, 1, 2, 3):
        joint, phased = (results[f"k1-z{stage}-{form}-{accumulated}"] for form in ("joint", "phased"))
        for key in joint:
            torch.testing.assert_close(phased[key], joint[key], rtol=1e-5, atol=2e-7)


def test_settings_matter(further: dict[str, plain_loop.Plain]) -> None:
    """Each setting changes the result by far more than the limit: none of the comparisons is empty."""
    for name, run in further.items():
        if name != "k1":
            weights = {f"generator/weight/{n}": p.detach() for n, p in run.generator.named_parameters()}
            weights |= {f"student/weight/{n}": p.detach() for n, p in run.student.named_parameters()}
            for kind, kept in zip(ema_entries(1 + len(run.others)), (run.ema, *run.others), strict=True):
                weights |= {f"generator/{kind}/{n}": p for n, p in kept.items()}
            assert max(equivalence.difference(further["k1"], weights)) > 50 * equivalence.LIMIT, name


@pytest.fixture(scope="module", params=parts(["1-level", "2-levels"], ["2-levels"]))
def distilled(request: pytest.FixtureRequest, teacher: Path, small: Path) -> Path:
    """The teacher of the runs in 16 bits."""
    return small if request.param == "1-level" else teacher


@pytest.fixture(scope="module")
def exact(distilled: Path) -> dict[str, plain_loop.Plain]:
    """What those of IPFM are compared with."""
    return compared_cases.by_the_plain_loop(load_teacher(distilled), ("k1", "k2"))


@pytest.fixture(scope="module")
def half(distilled: Path, tmp_path_factory: pytest.TempPathFactory):
    """16-bit runs of two processes, at the start and after some steps."""
    out = tmp_path_factory.mktemp("half")
    cases = {f"{p}-z{z}": {**BASE, "zero": z, "precision": p, "backward": "phased"} for p, z in HALF}
    cases["fp16-z2-k2"] = {**BASE, "zero": 2, "precision": "fp16", "backward": "phased", "steps": 2}
    cases |= {f"{name}-fp16": {**PID, **more, "precision": "fp16", "objective": "pid"} for name, more in PIDS.items()}
    return equivalence.run(distilled, out, 2, cases, STEPS, start=True, whole=WHOLE)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*(f"{p}-z{z}" for p, z in HALF), "fp16-z2-k2"])
def test_16_bits_keep_exact_masters_and_follow_fp32(half, exact, distilled: Path, case: str) -> None:
    """Masters start from the fp32 weights, not from rounded ones; two steps stay near those in fp32."""
    start = dict(load_teacher(distilled).named_parameters())
    for name, p in start.items():
        for key in (f"student/weight/{name}", f"generator/weight/{name}", f"generator/ema/{name}"):
            assert torch.equal(half[f"{case}-start"][key], p), key
    found, expected = half[case], exact["k2" if case.endswith("k2") else "k1"]
    for which, net in (("student", expected.student), ("generator", expected.generator)):
        moved = sum((p - start[n]).square().sum() for n, p in net.named_parameters()).sqrt()
        apart = sum((found[f"{which}/weight/{n}"] - p).square().sum() for n, p in net.named_parameters()).sqrt()
        assert 0 < apart < 0.2 * moved, f"{which}: {apart:.2e} apart after moving {moved:.2e}"
        torch.testing.assert_close(
            found[f"loss/{which}_loss"], torch.tensor(getattr(expected, f"{which}_loss")).double(), rtol=0.05, atol=0.2
        )


@pytest.mark.distributed
@pytest.mark.parametrize("case", PIDS)
def test_physics_informed_distillation_in_fp16_follows_fp32(half, distilled: Path, case: str) -> None:
    """Joint and phased, with clipped gradients too, at ZeRO 1 and 2: no step is lost, and the update is fp32's."""
    net = load_teacher(distilled)
    start = dict(net.named_parameters())
    config = PidConfig(**{**PID, **PIDS[case], "zero": 0})
    exact = Distiller(config, net, world=World(0, 1, torch.device("cpu")))
    losses = [exact.iteration(step).sums["generator_loss"] / config.batch for step in range(STEPS)]
    expected = dict(exact.generator.full("weight"))
    found = half[f"{case}-fp16"]
    moved = sum((p - start[n]).square().sum() for n, p in expected.items()).sqrt()
    apart = sum((found[f"generator/weight/{n}"] - p).square().sum() for n, p in expected.items()).sqrt()
    assert 0 < apart < 0.05 * moved, f"{apart:.2e} apart after moving {moved:.2e}"
    torch.testing.assert_close(found["loss/generator_loss"], torch.stack(losses).double(), rtol=0.02, atol=0.0)
