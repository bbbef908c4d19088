"""The engine against a plain PyTorch loop: every ZeRO stage, one and two processes, joint and phased, accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equivalence
import plain_lora
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import real_images
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.pid import PidConfig
from ipfm.kernels.adam import ema_entries
from ipfm.models import load_teacher

# `make equivalence` makes 20, and goes through every combination; here accumulation is two processes' alone.
STEPS = 2
# At stage 3 biases and norms stay whole, which saves two thirds of the messages; `make equivalence` shards them too.
WHOLE = 500
BASE = {**equivalence.BASE, "max_steps": STEPS}

SETTINGS: dict[str, dict[str, Any]] = {
    "k1": {},
    "k2": {"steps": 2},
    "last": {"steps": 3, "gradient": "last"},
    "augmented": {"augment": 0.5},
    "options": {
        "student_updates": 2,
        "student_lr": 5e-4,
        "generator_beta1": 0.9,
        "student_beta1": 0.5,
        "alpha": 1.2,
        "lr_warmup": 3,
        "lr_schedule": "linear",
        "lr_end": 0.1,
    },
    "clipped": {"clip_grad": 0.05, "lr_schedule": "rsqrt", "lr_decay_batches": 0.5},
    "varied": {
        "weight": "score",
        "weight_power": 0.5,
        "levels_generator": "lognormal:-0.4:1",
        "levels_student": "half",
        "student_ema": 0.6,
        "student_updates": 2,
    },
    "real": {"real_weights": (0.7, 0.8), "augment": 0.5, "student_updates": 2, "steps": 2, "alpha": 0.5},
    "told": {
        "discriminator": "encoder",
        "discriminator_weights": (1.0, 0.02),
        "discriminator_kimg": (0.0, 0.008),
        "augment": 0.5,
        "steps": 2,
    },
    "both": {
        "discriminator": "encoder",
        "discriminator_weights": (1.0, 0.02),
        "discriminator_kimg": (0.0, 0.0),
        "real_weights": (0.7, 0.8),
        "student_updates": 2,
    },
    # Masks are drawn for a micro-batch as a whole: on one process, at once, they are the plain loop's.
    "dropout": {"dropout": 0.3, "steps": 2},
    "droplast": {"dropout": 0.3, "steps": 3, "gradient": "last"},
}
# What is compared beside the grid: stage, backward, accumulation and further settings.
MORE: tuple[tuple[str, int, str, int, dict[str, Any]], ...] = (
    ("k2", 0, "phased", 2, {}),
    ("k2", 2, "joint", 2, {}),
    ("last", 1, "phased", 1, {}),
    ("augmented", 0, "phased", 1, {}),
    ("options", 3, "joint", 1, {}),
    ("clipped", 2, "phased", 2, {}),
    *(("varied", stage, ("joint", "phased")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 3)),
    *(("real", stage, ("joint", "phased")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 2, 3)),
    *(("told", stage, ("phased", "joint")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 2, 3)),
    ("both", 2, "joint", 2, {}),
    ("k2", 3, "phased", 1, {"activation_checkpointing": "on"}),
    *(("k1", stage, "phased", 2 - stage // 3, {"offload": "optimizer"}) for stage in (1, 3)),
    ("k1", 3, "joint", 1, {"offload": "all", "teacher_storage": "sharded"}),
    ("k1", 0, "phased", 1, {"teacher_storage": "sharded"}),
)
DROPOUT = tuple(
    (setting, stage, backward, 1, {"activation_checkpointing": again})
    for setting, stage, backward, again in (
        ("dropout", 0, "joint", "off"), ("dropout", 0, "phased", "off"), ("dropout", 3, "phased", "on"),
        ("droplast", 0, "joint", "off"), ("droplast", 0, "phased", "off"),
    )
)  # fmt: skip
# Physics informed distillation, whose gradients are those of a difference quotient; eps as the gradients are large.
PID = {**{name: value for name, value in BASE.items() if name != "alpha"}, "points": 50, "eps": 1.0}
PIDS: dict[str, dict[str, Any]] = {
    "pid-z1-joint": {"zero": 1, "backward": "joint"},
    "pid-z2-phased": {"zero": 2, "backward": "phased", "difference": "central"},
    "pid-z2-clipped": {"zero": 2, "backward": "joint", "clip_grad": 0.5},
}
HALF = (("bf16", 1), ("bf16", 3), ("fp16", 1))


# Factors on the teacher's weights, of two processes, which `SETTINGS` cannot stand for: they begin by themselves.
LORA = {
    f"lora-z{stage}": {"zero": stage, "backward": ("joint", "phased")[stage % 2], "micro_batch": (4, 2, 2, 4)[stage]}
    for stage in (0, 1, 2, 3)
}


def _name(setting: str, stage: int, backward: str, parts: int, more: dict[str, Any]) -> str:
    return "-".join([setting, f"z{stage}", backward, f"a{parts}", *(f"{k}={v}" for k, v in more.items())])


def _cases(ranks: int) -> dict[str, dict[str, Any]]:
    cases = {
        name: {**config, "max_steps": STEPS}
        for name, config in equivalence.grid(ranks).items()
        if name.endswith(f"a{ranks}")
    }
    for setting, stage, backward, parts, more in DROPOUT if ranks == 1 else MORE:
        cases[_name(setting, stage, backward, parts, more)] = {
            **BASE, **SETTINGS[setting], **more, "zero": stage, "backward": backward,
            "micro_batch": BASE["batch"] // ranks // parts,
        }  # fmt: skip
    if ranks == 2:
        cases |= {name: {**BASE, **plain_lora.BOTH, **more} for name, more in LORA.items()}
    return cases


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence.make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def plain(teacher: Path) -> dict[str, plain_loop.Plain]:
    net = load_teacher(teacher)
    return {
        name: plain_loop.distill(
            net,
            DistillConfig(**{**BASE, **setting}),
            STEPS,
            real=real_images() if {"real_weights", "discriminator"} & setting.keys() else None,
        )
        for name, setting in SETTINGS.items()
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def results(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    return equivalence.run(
        teacher, tmp_path_factory.mktemp("out"), request.param, _cases(request.param), STEPS, whole=WHOLE
    )


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_equals_the_plain_loop(results, plain) -> None:
    for name, found in results.items():
        if name in LORA:
            continue
        expected = plain[name.split("-")[0]]
        assert max(equivalence.difference(expected, found)) <= equivalence.LIMIT, name
        for which in ("student", "generator"):
            losses = torch.tensor(getattr(expected, f"{which}_loss")).double()
            torch.testing.assert_close(found[f"loss/{which}_loss"], losses, rtol=1e-4, atol=1e-4)
        # The student's average is the optimiser's where the generator is trained by it, and nowhere else.
        averages = any(key.startswith("student/ema/") for key in found)
        assert averages == name.startswith("varied")


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2], ids=["1-process", "2-processes"])
def test_networks_put_together_as_on_a_gpu_equal_the_plain_loop(
    ranks: int, teacher: Path, plain: dict[str, plain_loop.Plain], tmp_path: Path
) -> None:
    """One product for all projections of the embedding, biases that leave their layers, weights in channels_last."""
    cases = {
        f"k1-z{stage}": {
            **BASE, "zero": stage, "backward": ("joint", "phased")[stage % 2], "micro_batch": BASE["batch"] // ranks,
            "activation_checkpointing": "on" if stage == 3 else "off", "memory_format": "channels_last",
        }
        for stage in (0, 1, 2, 3)
    }  # fmt: skip
    found = equivalence.run(teacher, tmp_path, ranks, cases, STEPS, whole=WHOLE, as_on_a_gpu=True)
    for name, tensors in found.items():
        assert max(equivalence.difference(plain["k1"], tensors)) <= equivalence.LIMIT, name


@pytest.mark.distributed
@pytest.mark.parametrize("results", [2], indirect=True, ids=["2-processes"])
def test_factors_on_the_teachers_weights_equal_the_plain_loop(results, teacher: Path) -> None:
    """Every ZeRO stage, joint and phased, accumulated."""
    net = load_teacher(teacher)
    config = DistillConfig(**{**BASE, **plain_lora.BOTH, "zero": 0})
    first = plain_lora.weights_of(Distiller(config, net, world=World(0, 1, torch.device("cpu"))))
    expected = plain_lora.plain(config, net, first, STEPS)
    for name in LORA:
        found = results[name]
        losses = {key[5:]: loss for key, loss in found.items() if key.startswith("loss/")}
        plain_lora.check_equals(expected, found, losses, first)


@pytest.mark.distributed
def test_joint_and_phased_agree(results) -> None:
    for stage in (0, 1, 2, 3):
        joint, phased = (
            next(found for name, found in results.items() if name.startswith(f"k1-z{stage}-{form}-a"))
            for form in ("joint", "phased")
        )
        for key in joint:
            torch.testing.assert_close(phased[key], joint[key], rtol=1e-5, atol=2e-7)


def test_settings_matter(plain, teacher: Path) -> None:
    """Each setting changes the result by far more than the limit: none of the comparisons is empty."""
    for name, run in plain.items():
        if name != "k1":
            weights = {f"generator/weight/{n}": p.detach() for n, p in run.generator.named_parameters()}
            weights |= {f"student/weight/{n}": p.detach() for n, p in run.student.named_parameters()}
            for kind, kept in zip(ema_entries(1 + len(run.others)), (run.ema, *run.others), strict=True):
                weights |= {f"generator/{kind}/{n}": p for n, p in kept.items()}
            assert max(equivalence.difference(plain["k1"], weights)) > 50 * equivalence.LIMIT, name


@pytest.fixture(scope="module")
def half(teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    """16-bit runs of two processes, at the start and after some steps."""
    out = tmp_path_factory.mktemp("half")
    cases = {f"{p}-z{z}": {**BASE, "zero": z, "precision": p, "backward": "phased"} for p, z in HALF}
    cases["fp16-z2-k2"] = {**BASE, "zero": 2, "precision": "fp16", "backward": "phased", "steps": 2}
    cases |= {f"{name}-fp16": {**PID, **more, "precision": "fp16", "objective": "pid"} for name, more in PIDS.items()}
    return equivalence.run(teacher, out, 2, cases, STEPS, start=True, whole=WHOLE)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*(f"{p}-z{z}" for p, z in HALF), "fp16-z2-k2"])
def test_16_bits_keep_exact_masters_and_follow_fp32(half, plain, teacher: Path, case: str) -> None:
    """Masters start from the fp32 weights, not from rounded ones; two steps stay near those in fp32."""
    start = dict(load_teacher(teacher).named_parameters())
    for name, p in start.items():
        for key in (f"student/weight/{name}", f"generator/weight/{name}", f"generator/ema/{name}"):
            assert torch.equal(half[f"{case}-start"][key], p), key
    found, expected = half[case], plain["k2" if case.endswith("k2") else "k1"]
    for which, net in (("student", expected.student), ("generator", expected.generator)):
        moved = sum((p - start[n]).square().sum() for n, p in net.named_parameters()).sqrt()
        apart = sum((found[f"{which}/weight/{n}"] - p).square().sum() for n, p in net.named_parameters()).sqrt()
        assert 0 < apart < 0.2 * moved, f"{which}: {apart:.2e} apart after moving {moved:.2e}"
        torch.testing.assert_close(
            found[f"loss/{which}_loss"], torch.tensor(getattr(expected, f"{which}_loss")).double(), rtol=0.05, atol=0.2
        )


@pytest.mark.distributed
@pytest.mark.parametrize("case", PIDS)
def test_physics_informed_distillation_in_fp16_follows_fp32(half, teacher: Path, case: str) -> None:
    """Joint and phased, with clipped gradients too, at ZeRO 1 and 2: no step is lost, and the update is fp32's."""
    net = load_teacher(teacher)
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
