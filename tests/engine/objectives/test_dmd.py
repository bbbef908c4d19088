"""Denoiser matching against a plain loop by autograd, and what may be said of it at which D, by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import compared_cases
import equivalence
import pytest
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import trained_tensors
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.dmd import DmdConfig, denoiser_difference
from ipfm.engine.objectives.losses import Noisy
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.kernels.adam import ema_entries
from ipfm.models import build_network, load_teacher, presets, save_model
from ipfm.recipes import distill_dmd

ALONE = World(0, 1, torch.device("cpu"))
BASE = {**{n: v for n, v in equivalence.BASE.items() if n != "alpha"}, "max_steps": 2, "student_updates": 2}
CASES: dict[str, dict[str, Any]] = {
    "z0": {"zero": 0},
    "z1-phased": {"zero": 1, "backward": "phased", "micro_batch": 2},
    "z2": {"zero": 2, "micro_batch": 2, "activation_checkpointing": "on"},
    "z3": {"zero": 3, "micro_batch": 4},
    "k2": {"zero": 0, "steps": 2},
    "phased": {"zero": 0, "backward": "phased", "micro_batch": 4},
}


def check_equals(expected: plain_loop.Plain, tensors: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> None:
    assert max(equivalence.difference(expected, tensors)) <= equivalence.LIMIT
    for which in ("student", "generator"):
        plain = torch.tensor(getattr(expected, f"{which}_loss")).double()
        torch.testing.assert_close(losses[f"{which}_loss"], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["z0", "k2", "phased"])
def test_equals_the_plain_loop(name: str) -> None:
    """One and several steps, accumulated: the weights and averages of autograd's."""
    teacher = equivalence.compared_teacher()
    config = DmdConfig(**{**BASE, **CASES[name]})
    expected = plain_loop.distill(teacher, config, 2)
    run = Distiller(config, teacher, world=ALONE)
    measured = [run.iteration(step) for step in range(2)]
    losses = {n: torch.stack([m.sums[n] / m.counts[n] for m in measured]) for n in measured[0].sums}
    check_equals(expected, trained_tensors(run), losses)
    if name != "z0":
        return
    # It is no other objective's.
    other = plain_loop.distill(teacher, DistillConfig(**BASE), 2)
    weights = {f"generator/weight/{n}": p.detach() for n, p in other.generator.named_parameters()}
    weights |= {f"student/weight/{n}": p.detach() for n, p in other.student.named_parameters()}
    for kind, kept in zip(ema_entries(2), (other.ema, *other.others), strict=True):
        weights |= {f"generator/{kind}/{n}": p for n, p in kept.items()}
    assert equivalence.difference(expected, weights).generator > 50 * equivalence.LIMIT


@pytest.mark.distributed
def test_equals_the_plain_loop_on_two_processes(tmp_path: Path) -> None:
    """Every ZeRO stage, phased, accumulated; in 16 bits, by an average of the student, near what fp32 does."""
    cases = {n: {**BASE, **more, "objective": "dmd"} for n, more in CASES.items() if n.startswith("z")}
    small, averaged = compared_cases.make_small_teacher(tmp_path), {**BASE, "student_ema": 0.6}
    teacher = load_teacher(small)
    expected, by_average = (plain_loop.distill(teacher, DmdConfig(**settings), 2) for settings in (BASE, averaged))
    half = {f"half{z}": {**averaged, "zero": z, "precision": "bf16", "objective": "dmd"} for z in (2, 3)}
    found = equivalence.run(small, tmp_path, 2, cases | half, 2, whole=compared_cases.WHOLE)
    for name in cases:
        check_equals(expected, found[name], {n[5:]: v for n, v in found[name].items() if n.startswith("loss/")})
    start = dict(teacher.named_parameters())
    for name in half:
        tensors = found[name]
        for which, net in (("student", by_average.student), ("generator", by_average.generator)):
            pairs = [(start[n], tensors[f"{which}/weight/{n}"], p.detach()) for n, p in net.named_parameters()]
            moved, apart = (sum(float((p - q[i]).square().sum()) for *q, p in pairs) ** 0.5 for i in (0, 1))
            assert 0 < apart < 0.2 * moved, f"{name}, {which}: {apart:.2e} apart after moving {moved:.2e}"
        # Four updates: 0.6^4 of the start is left in the average, of fp32 weights, shares of both processes.
        for n, p in start.items():
            average, last = tensors[f"student/ema/{n}"], tensors[f"student/weight/{n}"]
            assert average.dtype == torch.float32
            assert (average - last).norm() <= (p - last).norm() + 1e-6 and (average - p).norm() <= 2 * (last - p).norm()


# -- one sample --------------------------------------------------------------------------------------------------------


def scalars(**changes: float) -> tuple[Callable[..., Any], Callable[..., Any], Tensor, Noisy]:
    """T = 0.3, S = 0.1, y = 0.5, x = 0.9 in one pixel: c_skip = 0.2, c_out = 2."""
    at = {"T": 0.3, "S": 0.1, "y": 0.5, "x": 0.9, **changes}
    one = {n: torch.full((1, 1, 1, 1), v, dtype=torch.float64) for n, v in at.items()}
    sigma, skip, out = (torch.full((1,), v, dtype=torch.float64) for v in (1.0, 0.2, 2.0))
    noisy = Noisy(one["x"], one["x"], sigma, skip, out, sigma)
    teacher, student = ((lambda scaled, sigma, f=(one[n] - 0.2 * one["x"]) / 2: f) for n in ("T", "S"))
    return teacher, student, one["y"], noisy


def test_the_gradient_of_one_scalar() -> None:
    """dL/dy = 2 lambda (S - T): the spec's -0.4 at lambda = 1; here lambda = 1 / |T - y| = 5."""
    found = denoiser_difference(*scalars())
    assert float(found.weight) == pytest.approx(5.0)
    assert float(found.gradient) == pytest.approx(5 * -0.4, rel=1e-12)
    assert float(found.loss) == pytest.approx(5 * 0.04, rel=1e-12) and bool(found.valid)
    one = denoiser_difference(*scalars(), weighting=lambda sigma, weight: torch.ones_like(weight))
    assert (float(one.gradient), float(one.loss)) == pytest.approx((-0.4, 0.04), rel=1e-12)
    # A teacher that agrees with y: the weight ends somewhere.
    assert float(denoiser_difference(*scalars(T=0.5)).weight) == pytest.approx(1e5)


@pytest.mark.parametrize("bad", ["T", "S", "y", "x"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_count(bad: str, value: float) -> None:
    found = denoiser_difference(*scalars(**{bad: value}))
    assert (float(found.gradient), float(found.loss), float(found.weight)) == (0, 0, 0) and not bool(found.valid)
    assert not bool(denoiser_difference(*scalars(), weighting=lambda sigma, weight: weight * value).valid)


# -- in one dimension, by quadrature -----------------------------------------------------------------------------------

_ARC = torch.linspace(-7, 7, 1401, dtype=torch.float64)
GRID, WIDTHS = _ARC.sinh(), _ARC.cosh() * (_ARC[1] - _ARC[0])
Z = torch.linspace(-6, 6, 121, dtype=torch.float64)
LOG_MASSES = torch.log_softmax(-(Z**2) / 2, 0)
# The spec's one-dimensional generator at the data, and where it starts.
RIGHT = torch.tensor([0.1, 0.15, 0.6], dtype=torch.float64)
START = torch.tensor([-0.2, 0.3, 0.45], dtype=torch.float64)
DS, SIGMAS = (1.0, 2.0, 8.0, 128.0, 2048.0, math.inf), (0.3, 1.0, 2.5)


def samples(theta: Tensor) -> Tensor:
    return theta[0] + theta[1] * Z + theta[2] * torch.tanh(3 * Z)


def log_kernel(away: Tensor, sigma: Tensor, D: float) -> Tensor:
    """log p_r(x | y) of x - y, r = sigma sqrt(D), N = 1."""
    if math.isinf(D):
        return -(away**2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
    normal = torch.lgamma(torch.tensor((D + 1) / 2, dtype=torch.float64)) - math.lgamma(D / 2)
    return normal - math.log(math.pi * D) / 2 - sigma.log() - (D + 1) / 2 * torch.log1p(away**2 / (D * sigma**2))


def fields(theta: Tensor, sigma: Tensor, D: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of the density, denoiser and score of what is noisy, on the grid."""
    y = samples(theta)
    away = GRID[:, None] - y
    each = LOG_MASSES + log_kernel(away, sigma, D)
    posterior = torch.softmax(each, 1)
    slope = -away / sigma**2 if math.isinf(D) else -(D + 1) * away / (away**2 + D * sigma**2)
    return torch.logsumexp(each, 1), (posterior * y).sum(1), (posterior * slope).sum(1)


def level(sigma: float, *, graph: bool = False) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64, requires_grad=graph)


def mean(values: Tensor, log_density: Tensor) -> Tensor:
    return (WIDTHS * log_density.exp() * values).sum()


@pytest.mark.parametrize("D", DS)
def test_what_holds_at_every_D(D: float) -> None:
    """dKL/dsigma = -E<s_G - s_*, S - T>/sigma, to seven digits, and it is never positive."""
    for sigma in SIGMAS:
        at = level(sigma, graph=True)
        (p, T, s_p), (q, S, s_q) = fields(RIGHT, at, D), fields(START, at, D)
        (slope,) = torch.autograd.grad(mean(q - p, q), at)
        inner = mean((s_q - s_p) * (S - T), q).item()
        assert slope.item() == pytest.approx(-inner / sigma, rel=1e-7) and inner > 0


# D -> sigma -> of the spec's figures.
NEGATIVE = {1.0: (0.37, 0.47), 8.0: (0.01, 0.026), 128.0: (0, 1.5e-4), 2048.0: (0, 1e-6), math.inf: (0, 1e-6)}


@pytest.mark.parametrize("D", NEGATIVE)
def test_what_does_not_hold_at_finite_D(D: float) -> None:
    """S - T is not the difference of the scores, whose sign it has not always, nor makes |S - T|^2 KL."""
    least, most = NEGATIVE[D]
    for sigma in SIGMAS:
        (p, T, s_p), (q, S, s_q) = fields(RIGHT, level(sigma), D), fields(START, level(sigma), D)
        del p
        product = (s_q - s_p) * (S - T)
        assert least <= mean((product < -1e-12).double(), q).item() <= most
        inner, square = mean(product, q).item(), mean((S - T) ** 2, q).item() / sigma**2
        if math.isinf(D):
            assert square == pytest.approx(inner, rel=1e-9)
        elif (D, sigma) == (8.0, 1.0):
            assert (square, inner) == pytest.approx((0.0522, 0.0385), abs=5e-5)


def den_and_score(sigma: float, D: float) -> tuple[Tensor, Tensor]:
    """E[y | x] and the score of what is noisy, of the data."""
    return fields(RIGHT, level(sigma), D)[1:]


@pytest.mark.parametrize("D", [1.0, 2.0, 8.0, 128.0])
def test_scores_are_denoisers_of_other_dimensions(D: float) -> None:
    """At one r: the score at D by the denoiser at D + 2, and the denoiser by the score at D - 2."""
    for sigma in SIGMAS:
        r = sigma * D**0.5
        denoised, score = den_and_score(sigma, D)
        each = LOG_MASSES + log_kernel(GRID[:, None] - samples(RIGHT), level(sigma), D)
        squares = (GRID[:, None] - samples(RIGHT)) ** 2 + r**2
        kappa = (D + 1) * (torch.softmax(each, 1) / squares).sum(1)
        above = den_and_score(r / (D + 2) ** 0.5, D + 2)[0]
        torch.testing.assert_close(-kappa * (GRID - above), score, rtol=1e-11, atol=1e-13)
        if D > 2:
            rho = (torch.softmax(each, 1) * squares).sum(1)
            below = den_and_score(r / (D - 2) ** 0.5, D - 2)[1]
            torch.testing.assert_close(-rho / (D - 1) * below, GRID - denoised, rtol=1e-11, atol=1e-11)


# Of images of 3072 elements at sigma = 10, D -> mean error of the score (E[y|x] - x) / sigma^2, and the spec's table's
# bounds at 2.5 with f = (N + D) / (|x - y|^2 + r^2) for 1 / sigma^2, and of the cosine of S - T and s_G - s_*.
LARGE = {8.0: (0.60, 0.004, 0.95), 128.0: (0.106, 0.004, 0.96), 2048.0: (0.017, 0.003, 0.985)}


@pytest.mark.parametrize("D", LARGE)
def test_a_weight_of_the_sample_stands_for_the_inverse_square_of_sigma(D: float) -> None:
    error, error_by_f, cosine = LARGE[D]
    N, sigma, spread, generator = 3072, 2.5, 0.1, torch.Generator().manual_seed(0)
    wide = {"generator": generator, "dtype": torch.float64}
    # Far from the data all of the error is that of the factor, q / (sigma^2 (N + D)) - 1.
    gammas = [torch._standard_gamma(torch.full((20_000,), n / 2, dtype=torch.float64), generator) for n in (N, D)]
    q = D * (gammas[0] / gammas[1] + 1)
    assert float((q / (N + D) - 1).abs().mean()) == pytest.approx(error, rel=0.2)
    data = torch.randn(4, N, **wide) / 2
    made = data / 2 + 0.43 * torch.randn(4, N, **wide)
    ratio = torch.linspace(-25, 25, 1501, dtype=torch.float64)
    variance = sigma**2 * ratio.exp()

    def fields_of(centres: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """E[y | x] and the score, y normal about the centres: the kernel is a mixture of normal ones by variance."""
        away = x[:, None] - centres
        both = variance + spread**2
        each = -(D / 2) * (ratio + (-ratio).exp()) - N / 2 * both.log() - away.square().sum(2)[..., None] / (2 * both)
        share = torch.softmax(each.flatten(1), 1).view(each.shape)
        means = [(share * factor).sum(2)[..., None] for factor in (variance / both, 1 / both)]
        return x - (means[0] * away).sum(1), -(means[1] * away).sum(1)

    y = made.repeat(3, 1) + spread * torch.randn(12, N, **wide)
    shrunk = torch._standard_gamma(torch.full((12, 1), D / 2, dtype=torch.float64), generator) * 2 / D
    x = y + sigma * torch.randn(12, N, **wide) / shrunk.sqrt()
    (S, s_G), (T, s_data) = (fields_of(centres, x) for centres in (made, data))
    f = (N + D) / ((x - y).square().sum(1, keepdim=True) + sigma**2 * D)
    found = ((f * (S - x) - s_G).norm(dim=1) / s_G.norm(dim=1)).mean()
    assert float(found) < error_by_f
    assert float(torch.cosine_similarity(S - T, s_G - s_data, 1).mean()) > cosine


# D -> smallest cosine of the step with the gradient of KL, and the ratio of their lengths at sigma = 0.3.
ALONG = {1.0: (0.975, None), 2.0: (0.975, None), 8.0: (0.988, 1.457), 128.0: (0.9998, 1.03), math.inf: (1 - 1e-9, 1.0)}


def step_and_gradient(D: float, sigma: float) -> tuple[Tensor, Tensor]:
    """E[(S - T) dG/dtheta] / sigma^2 and the gradient of KL(p_G,sigma | p*_sigma) in theta."""
    theta = START.clone().requires_grad_()
    (p, T, _), (q, S, _) = fields(RIGHT, level(sigma), D), fields(theta, level(sigma), D)
    (gradient,) = torch.autograd.grad(mean(q - p, q), theta)
    y = samples(theta)
    each = (LOG_MASSES + log_kernel(GRID[:, None] - y, level(sigma), D)).exp()
    given_y = (WIDTHS[:, None] * each * (S - T)[:, None]).sum(0).detach() / sigma**2
    (step,) = torch.autograd.grad((given_y * y).sum(), theta)
    return step, gradient


@pytest.mark.parametrize("D", ALONG)
def test_how_far_the_step_is_the_gradient_of_KL(D: float) -> None:
    """At D = inf it is; in theta, averaged over the noise, it is near from D = 128 on."""
    least, ratio = ALONG[D]
    for sigma in SIGMAS:
        step, gradient = step_and_gradient(D, sigma)
        assert torch.cosine_similarity(step, gradient, 0).item() >= least
        if ratio is not None and sigma == SIGMAS[0]:
            assert (step.norm() / gradient.norm()).item() == pytest.approx(ratio, abs=6e-3)


def test_a_large_D_is_the_diffusion_case() -> None:
    for sigma in SIGMAS:
        torch.testing.assert_close(step_and_gradient(1e7, sigma), step_and_gradient(math.inf, sigma), rtol=0, atol=2e-6)


# -- where teacher and student agree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1.0, 8.0, 128.0, math.inf])
def test_it_stays_where_teacher_and_student_agree(D: float) -> None:
    """S = T as functions: the generator does not move by a bit, whatever its samples are."""
    torch.manual_seed(0)
    network = replace(equivalence.compared_teacher().config, D=D)
    teacher = build_network(network).requires_grad_(False)
    # The student learns nothing at this rate.
    config = DmdConfig(**{**BASE, "student_lr": 1e-30, "zero": 0, "batch": 4})
    run = Distiller(config, teacher, world=ALONE)
    measured = run.iteration(0)
    assert float(measured.sums["generator_loss"]) == 0 and float(measured.counts["generator_loss"]) == 4
    for name, p in run.networks["generator"].full("weight"):
        assert torch.equal(p, dict(teacher.named_parameters())[name])


# -- what users meet ---------------------------------------------------------------------------------------------------


def test_passes_are_counted() -> None:
    """9 with one update of the student, 25 with five, of which the generator's step has 5; phased adds none."""
    network = presets.get("digits", D=128.0)
    for updates, total in ((1, 9), (5, 25)):
        objective = DmdConfig(student_updates=updates, max_steps=1).completed(network).objective(network)
        for phased in (False, True):
            assert objective.forwards(phased=phased, checkpointed=False) == total
    ipfm = DistillConfig(max_steps=1).completed(network).objective(network)
    assert ipfm.forwards(phased=False, checkpointed=False) - 2 == 9  # T and S do not pass back


def test_run_and_sample(tmp_path: Path) -> None:
    """A run's generator is drawn from at its levels, and says what made it; the run can be continued."""
    teacher = equivalence.compared_teacher().eval().requires_grad_(False)
    config = DmdConfig(**{**BASE, "steps": 2, "max_steps": 1, "batch": 4, "zero": 0, "log_every": 1})
    net = Distiller(config, teacher, world=ALONE).run(tmp_path / "run")
    drawn = sample_model(tmp_path / "run" / "generator", torch.device("cpu"), heun_steps=5, seed=4)
    assert drawn.nfe == 2 and drawn.facts.objective == "dmd" and "alpha" not in drawn.facts.to_json()
    again = Distiller(replace(config, max_steps=2), teacher, world=ALONE).run(tmp_path / "run")
    assert not torch.equal(next(again.parameters()), next(net.parameters()))


def test_published_figure() -> None:
    config = DmdConfig(D=math.inf, sigma_init=80.0, batch=280, max_steps=1)
    network = presets.get("imagenet64-adm")
    figure = config.completed(network).figure("ImageNet-64-cond", config.completed(network).to_json(), network)
    assert str(figure) == "FID 2.61 (arXiv 2405.14867; weight decay 0.01 there)"
    one = replace(config, student_updates=1).completed(network)
    assert "student_updates 5 there, 1 here" in str(one.figure("imagenet64cond", one.to_json(), network))
    assert config.figures("cifar10", config.to_json()) == {}
    assert config.figures("imagenet64cond", replace(config, steps=2).to_json()) == {}


def test_words() -> None:
    settings = DmdConfig(D=math.inf, max_steps=1).to_json()
    assert DmdConfig.info_words(settings) == "denoiser matching, 5 student updates a generator update, 1 step"
    assert "at D = ∞ descends a Kullback-Leibler divergence (DMD)" in DmdConfig.report_words(settings)
    assert "divergence" not in DmdConfig.report_words({**settings, "D": 128.0})
    with pytest.raises(TypeError, match="alpha"):
        DmdConfig(alpha=0.5)  # type: ignore[call-arg]


def test_the_recipe_takes_the_rule_of_sizes_and_five_updates_of_the_student(tmp_path: Path) -> None:
    save_model(build_network(replace(equivalence.compared_teacher().config, D=8.0)), tmp_path / "teacher")

    def planned(*more: str) -> DmdConfig:
        line = ["--teacher", str(tmp_path / "teacher"), "--dry-run", *more]
        config = distill_dmd.RECIPE.plan(parse_given(line, default=distill_dmd.RECIPE.base, prog="", description=""))
        assert isinstance(config.config, DmdConfig) and config.config.kind == "dmd"
        return config.config

    plain = planned()
    assert (plain.student_updates, plain.D, plain.batch) == (5, 8.0, 64)
    assert planned("--student-updates", "2").student_updates == 2
    with pytest.raises(BadInput, match="alpha"):
        planned("--alpha", "1")
