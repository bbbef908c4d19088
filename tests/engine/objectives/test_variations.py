"""Weights of the generator's loss, laws of the noise levels and the average of the student, as options."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import edm2_fixtures
import pytest
import torch
from small_distillation import at_six_levels, four_pixels
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.plan import distillation_bytes
from ipfm.engine.memory.simulate import StepSettings
from ipfm.engine.memory.state import Sharding, parameter_count
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives import check_objective
from ipfm.engine.objectives.base import Role
from ipfm.engine.objectives.dmd import DmdConfig, denoiser_difference
from ipfm.engine.objectives.level_laws import level_law
from ipfm.engine.objectives.loss_weights import chosen_weight
from ipfm.engine.objectives.losses import bind, generator_gradient
from ipfm.engine.training import resolve
from ipfm.models import build_network

ALONE = World(0, 1, torch.device("cpu"))
SMALL = replace(edm2_fixtures.SMALL, dropout=0.0)


def weight(name: str, D: float, y: Tensor, x: Tensor, t: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    def total(v: Tensor) -> Tensor:
        return v.square().sum((1, 2, 3))

    N = y[0].numel()
    return {
        "sid": lambda: 1 / (t - y).abs().mean((1, 2, 3)),
        "sigma": lambda: sigma**-2,
        "edm": lambda: (sigma**2 + 0.25) / (sigma * 0.5) ** 2,
        "score": lambda: sigma**-2 if math.isinf(D) else (N + D) / (total(x - t) + D * sigma**2),
        "unsquared": lambda: (total(t - s) + 1e-6 * N) ** -0.5,
    }[name]().detach()


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("D", [16.0, math.inf])
@pytest.mark.parametrize("name", ["sid", "sigma", "edm", "score", "unsquared"])
def test_a_weight_by_name_is_autograd_of_its_formula(name: str, D: float, power: float) -> None:
    teacher, student = four_pixels(0).double(), four_pixels(1).double()
    y, noisy = at_six_levels(teacher)
    raw = bind(teacher, None), bind(student, None)
    weighting = chosen_weight(name, power, D, None)
    assert (weighting is None) == (name == "sid" and not power)
    got = generator_gradient(*raw, y, noisy, alpha=1.0, phased=power > 0, weighting=weighting)
    leaf = y.clone().requires_grad_()
    x = leaf + (noisy.x - y)
    t, s = teacher(x, noisy.sigma), student(x, noisy.sigma)
    own = weight(name, D, leaf, x, t, s, noisy.sigma) * noisy.sigma**power
    squares = [(a - b).square().sum((1, 2, 3)) for a, b in ((t, leaf), (s, leaf), (t, s))]
    loss = own * (squares[0] - squares[1] - squares[2])
    loss.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(got.weight, own, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.gradient, leaf.grad, rtol=0, atol=1e-10 * leaf.grad.abs().max().item())
    apart = denoiser_difference(*raw, y, noisy, weighting=weighting)
    lead = 2 * own.view(-1, 1, 1, 1) * (s - t)
    torch.testing.assert_close(apart.gradient, lead.detach(), rtol=0, atol=1e-10 * lead.abs().max().item())


def test_score_at_a_large_D_is_the_inverse_square_of_sigma() -> None:
    """(N + D) / (|x - T|^2 + sigma^2 D) goes to 1 / sigma^2, and is a number where D has more digits than a float32."""
    teacher, student = four_pixels(0), four_pixels(1)
    y, noisy = at_six_levels(teacher)
    noisy = noisy._replace(**{name: getattr(noisy, name).float() for name in noisy._fields})
    for D in (1e9, 1e30):
        got = generator_gradient(
            bind(teacher, None), bind(student, None), y.float(), noisy, alpha=1.0, phased=False,
            weighting=chosen_weight("score", 0, D, None),
        )  # fmt: skip
        torch.testing.assert_close(got.weight, noisy.sigma**-2, rtol=1e-5, atol=0)


def levels(config: DistillConfig, count: int = 20_000) -> tuple[Tensor, Tensor]:
    index = torch.arange(count)
    draws = config.generator_sigma, config.student_sigma
    return tuple(draw(index, seed=3, stream=1, step=2).double() for draw in draws)  # type: ignore[return-value]


def test_levels_of_the_generator_have_the_law_that_is_named() -> None:
    usual, noise = DistillConfig(), NoiseLevels()
    sid, edm = levels(usual)
    assert torch.equal(levels(DistillConfig(levels_generator="grid:0:0.8"))[0], sid)
    assert torch.equal(levels(DistillConfig(levels_student="lognormal:-1.2:1.2"))[1], edm)
    # Quantiles at three shares, of the inverse of each law's distribution.
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    probit = math.sqrt(2) * torch.erfinv(2 * shares - 1)
    log_even = math.log(0.002) + shares * math.log(40_000)
    laws = {
        "grid:0.02:0.98": noise.at(0.02 + 0.96 * shares),
        "rising:0.9": noise.at(0.9 * shares.sqrt()),
        "lognormal:0.5:0.7": (0.5 + 0.7 * probit).exp(),
        "loguniform": log_even.exp(),
        "loguniform:0.1:10": (math.log(0.1) + shares * math.log(100)).exp(),
        # Student's t of one degree of freedom is Cauchy's, cut at the ends of the sampler's range.
        "log-t:0.5:0.4:1": _cut_cauchy(0.5, 0.4, shares),
    }
    for law, wanted in laws.items():
        found = levels(DistillConfig(levels_generator=law))[0]
        assert found.min() > 0 and found.isfinite().all()
        torch.testing.assert_close(found.log().quantile(shares), wanted.log(), rtol=0, atol=0.09, msg=law)
    far = levels(DistillConfig(levels_generator="log-t:0:0.2:0.01"))[0]
    # A peak outside of the range: its tail, at the end.
    assert levels(DistillConfig(levels_generator="log-t:20:0.1:1e6"))[0].min() > 70
    # TCM's: half a peak about sigma = 1, half a tail that is nearly even in ln ln sigma.
    assert 0.002 <= far.min() < 0.01 and 20 < far.max() <= 80 and 0.2 < ((far.log().abs() < 0.1).double().mean()) < 0.8


def _cut_cauchy(mean: float, scale: float, shares: Tensor) -> Tensor:
    ends = [math.atan((math.log(v) - mean) / scale) for v in (0.002, 80.0)]
    return (mean + scale * torch.tan(ends[0] + shares * (ends[1] - ends[0]))).exp()


def test_the_student_looks_where_the_generator_does() -> None:
    """P(sigma > 1), (> 3), (> 10) of the spec's two laws, and of half and half, whose other half is EDM's own."""
    sid, edm = levels(DistillConfig())
    half = levels(DistillConfig(levels_student="half"))[1]
    whole = levels(DistillConfig(levels_student="generator", levels_generator="rising:0.9"))
    assert torch.equal(*whole)
    above = [[(v > level).double().mean().item() for level in (1, 3, 10)] for v in (sid, edm, half)]
    for found, wanted in zip(above, ((0.496, 0.35, 0.16), (0.159, 0.028, 0.0018), (0.3275, 0.189, 0.081)), strict=True):
        assert found == pytest.approx(wanted, abs=0.012)
    from_edm = half == edm
    assert from_edm.double().mean().item() == pytest.approx(0.5, abs=0.015) and torch.equal(
        half[~from_edm], sid[~from_edm]
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("levels_generator", "grid:0.5:0.2", "levels-generator grid: LOW and HIGH must rise within [0, 1]"),
        ("levels_generator", "rising:1.5", "levels-generator rising: HIGH must lie in (0, 1]"),
        ("levels_student", "lognormal:0:0", "levels-student lognormal: STD must lie in (0, 10]"),
        ("levels_student", "lognormal:99:1", "levels-student lognormal: MEAN must lie in [-10, 10]"),
        ("levels_student", "loguniform:2:1", "levels-student loguniform: LOW and HIGH must be levels that rise"),
        (
            "levels_generator", "log-t:0:0.01:0.01",
            "levels-generator log-t: SCALE and NU must be above 0, and SCALE sqrt(NU) at least 0.002",
        ),
    ],
)  # fmt: skip
def test_numbers_that_make_no_law(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        DistillConfig(**{option: value})
    assert str(error.value) == f"{message}, got {value!r}"
    # One spelling, by which a run folder knows it again; no digit is lost.
    assert DistillConfig(levels_generator="grid: 0 :.80") == DistillConfig(levels_generator="grid:0:0.8")
    assert str(level_law("levels-student", "lognormal:-1.23456789:1")) == "lognormal:-1.23456789:1"


def test_varied_steps_are_a_function_of_their_number_whatever_the_micro_batch() -> None:
    varied = {
        "weight": "score", "weight_power": 0.5, "levels_generator": "log-t:0:0.5:2", "levels_student": "half",
        "student_ema": 0.9, "student_updates": 2,
    }  # fmt: skip
    check_objective(DmdConfig(batch=4, micro_batch=2, **varied), four_pixels(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("edm2", [False, True], ids=["EDM", "EDM2"])
def test_the_generator_is_trained_by_an_average_of_the_student(
    edm2: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average follows every update; a checkpoint's comes back; 1 - decay is how much of the student is in it."""
    monkeypatch.setattr(resolve, "fp16_supported", lambda device: True)
    torch.manual_seed(0)
    teacher = build_network(SMALL) if edm2 else four_pixels(0)
    settings: dict[str, Any] = {"batch": 2, "max_steps": 2, "precision": precision, "logvar": edm2, "lr": 1e-2}
    run = Distiller(DistillConfig(student_ema=0.75, **settings), teacher, world=ALONE)
    student = run.networks["student"]
    before = dict(student.full("weight"))
    before = {name: p.clone() for name, p in before.items()}
    run.iteration(0)
    average, now = dict(student.full("ema")), dict(student.full("weight"))
    moved = 0.0
    for name, p in before.items():
        if not (edm2 and p.ndim > 1):  # masters are normalised before they move
            torch.testing.assert_close(average[name], 0.75 * p + 0.25 * now[name], rtol=1e-4, atol=1e-6)
        moved += (now[name] - average[name]).abs().sum().item()
    assert moved > 0
    # What the generator was trained by: the same function as a network that is made of the average.
    again = build_network(student.followed.config).eval()
    again.compute_dtype = student.followed.compute_dtype
    student.copy_ema_to(again)
    x, sigma = torch.randn(2, *SMALL.image_shape) if edm2 else torch.randn(2, 2, 4, 4), torch.tensor([0.3, 2.0])
    labels = torch.eye(SMALL.label_dim)[:2] if edm2 else None
    with torch.no_grad():
        torch.testing.assert_close(student.followed(x, sigma, labels), again(x, sigma, labels), rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in student.followed.parameters()) and not student.followed.training
    student.load("ema", before)
    kept = student.followed if not edm2 else None
    if kept is not None:
        for name, p in kept.named_parameters():
            assert torch.equal(p, before[name].to(p.dtype))


def test_the_average_is_in_the_memory_plan() -> None:
    """4 bytes a parameter in the optimiser, sharded, and a copy of the student, whole, in the run's own bits."""
    net, n = four_pixels(0).config, parameter_count(four_pixels(0).config)
    for sharding in (Sharding(), Sharding(2, 2, "bf16"), Sharding(2, 3)):
        parts = [
            distillation_bytes(StepSettings(net, 2, sharding, config=DistillConfig(student_ema=ema)))
            for ema in (None, 0.99)
        ]
        assert parts[1].optimizer - parts[0].optimizer == 4 * sharding.share(n, 1)
        copied = parts[1].weights - parts[0].weights
        assert copied == 4 * n if sharding.element == 4 else 2 * n <= copied < 4 * n
        assert parts[1].teacher == parts[0].teacher
    with pytest.raises(ValueError, match="the role generator is the result"):
        Role("generator", net, "teacher", 1e-5, 0.0, averaged=True, followed=True)


def test_a_varied_run_says_so_and_has_no_published_figure() -> None:
    cifar = replace(SMALL, D=2048.0)
    varied = DistillConfig(
        D=2048.0, weight="score", weight_power=0.5, levels_generator="lognormal:-0.4:1", levels_student="half",
        student_ema=0.99,
    )  # fmt: skip
    assert varied.name() == "alpha1-K1-score-sigma0.5-levels-lognormal_-0.4_1-student-half-emaS0.99"
    assert DmdConfig(weight="sigma").name() == "dmd5-K1-sigma"
    rows = {
        "weight of the generator's loss": "sigma^0.5 (N + D) / (|x - T|^2 + sigma^2 D)",
        "noise levels of the generator's step": "lognormal:-0.4:1",
        "noise levels of the student's step": "half",
        "average of the student in the generator's step": "decay 0.99",
    }
    said = varied.to_json()
    for words in (DistillConfig.info_words(said), DistillConfig.report_words(said)):
        assert all(f", {name}: {value}" in words for name, value in rows.items())
    assert rows.items() <= DistillConfig.card_rows(said).items() and rows.items() <= DmdConfig.card_rows(said).items()
    assert all(value in varied.objective(cifar).title for value in rows.values())
    assert DistillConfig(alpha=0.5, D=2048.0).published("cifar10") and not varied.published("cifar10")
    damaged = {**said, "weight": 3, "levels_student": [1], "student_ema": "x", "weight_power": None}
    assert list(DistillConfig.card_rows(damaged)) == [
        *DistillConfig.card_rows({}),
        "noise levels of the generator's step",
    ]
