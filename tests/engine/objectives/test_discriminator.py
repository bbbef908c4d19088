"""A discriminator from the student's encoder: its numbers, taps of every network, steps, plans, runs, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from small_distillation import ALONE, BASE, log_kernel, run, tiny_teacher
from torch import Tensor, nn

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import NETWORK, compared_teacher, real_images, trained_tensors
from ipfm.engine.commands.bench.plain_rule import EDM2
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.experiments.options import options_for
from ipfm.engine.experiments.real_data import read_real
from ipfm.engine.memory.arithmetic import encoder_flops, forward_flops
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
from ipfm.engine.memory.state import Sharding
from ipfm.engine.objectives.checking import _Trial, check_objective
from ipfm.engine.objectives.discriminator import Adversary, deceived, told_apart
from ipfm.engine.objectives.dmd import RATIO_WEIGHTS, DmdConfig, denoiser_difference, density_ratio
from ipfm.engine.objectives.losses import Noisy, generator_gradient
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_folder import check_run_folder
from ipfm.models import build_network, guided, presets
from ipfm.recipes import digits_ipfm

TINY = ("--teacher-steps", "2", "--max-steps", "2", "--batch", "8", "--eval-images", "16", "--heun-steps", "1",
        "--zero", "0", "--micro-batch", "8", "--backward", "joint", "--activation-checkpointing", "off")  # fmt: skip
TOLD: dict[str, Any] = {"discriminator": "encoder", "discriminator_weights": (1.0, 0.02), "discriminator_kimg": (0, 0)}


# ------------------------------------------------------------------------------------------------ printed numbers


@pytest.mark.quick
def test_cross_entropies_and_their_slopes_by_autograd() -> None:
    logits = torch.tensor([[[0.0, 2.0], [-3.0, 9.0]]], dtype=torch.float64).requires_grad_()
    cross = nn.functional.binary_cross_entropy_with_logits
    for found, target in (
        (told_apart(logits, real=True), 1.0), (told_apart(logits, real=False), 0.0), (deceived(logits), 1.0),
    ):  # fmt: skip
        expected = cross(logits, torch.full_like(logits, target))
        (slope,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(found.loss[0], expected.detach())
        torch.testing.assert_close(found.slope, slope)
    assert float(told_apart(torch.zeros(1, 8, 8), real=True).loss) == pytest.approx(math.log(2))


def test_beyond_ten_the_generator_has_no_slope() -> None:
    """softplus(-+10) there, of which -10 is what the generator could flee from: 0 too, as of a clamp."""
    found = deceived(torch.tensor([12.0, -12.0, 10.0, -10.0], dtype=torch.float64).view(4, 1, 1))
    assert found.loss.tolist() == pytest.approx([4.539889921686464e-05, 10.000045398899218] * 2, rel=1e-12)
    assert found.slope.flatten().tolist() == pytest.approx([0, 0, -4.5397868702434395e-05, -0.9999546021312976])
    # The student is told so at any logit.
    assert told_apart(torch.full((1, 1, 1), 12.0), real=False).slope.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("p_mean", "p_std", "mean"), [(-1.2, 1.2, 200.4), (-0.4, 1.0, 20.4)])
def test_the_mean_of_the_students_weight(p_mean: float, p_std: float, mean: float) -> None:
    """E w of EDM's law and of EDM2's, w = 1 / sigma^2 + 4, by quadrature of ln sigma."""
    n = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    density = torch.softmax(-(n**2) / 2, 0)
    assert float((density * (4 + torch.exp(-2 * (p_mean + p_std * n)))).sum()) == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_the_best_logits_are_the_log_ratio_and_leave_the_divergence_of_jensen_and_shannon(D: float) -> None:
    """Of noisy marginals of one level, by quadrature: no slope there, and 2 log 2 - 2 JSD is the loss."""
    end = 2.5 if math.isinf(D) else 9.0
    u = torch.linspace(-end, end, 2001, dtype=torch.float64)
    x, dx = torch.sinh(u), torch.cosh(u) * (u[1] - u[0])

    def marginal(*atoms: float) -> Tensor:
        kernel = log_kernel((x[:, None] - torch.tensor(atoms, dtype=torch.float64)) ** 2, D, 1.0).exp().mean(1)
        return kernel / (kernel * dx).sum()

    data, made = marginal(-1.0, 1.0), marginal(0.0, 1.0)
    for other in (made, data):
        logits = (data.log() - other.log()).view(-1, 1, 1)
        real, fake = told_apart(logits, real=True), told_apart(logits, real=False)
        assert (data * real.slope.flatten() + other * fake.slope.flatten()).abs().max() < 1e-15
        loss = (dx * (data * real.loss + other * fake.loss)).sum()
        middle = (data + other) / 2
        shannon = 0.5 * (dx * (data * (data / middle).log() + other * (other / middle).log())).sum()
        assert float(loss) == pytest.approx(2 * math.log(2) - 2 * float(shannon), rel=1e-9)
        assert (float(shannon) > 1e-4) == (other is made)


def test_weights_of_f_divergences() -> None:
    """h(r) of the table by its value at r = 1; the ratio is clipped to [0.1, 20]."""
    assert density_ratio(torch.tensor([0.0, math.log(3), 9.0, -50.0]).view(4, 1, 1)).tolist() == pytest.approx(
        [1.0, 3.0, 20.0, 0.1]
    )
    r = torch.tensor([1.0, 4.0])
    expected = {
        "kl": (1, 4), "jensen-shannon": (1, 8 / 5), "softened-reverse-kl": (1, 2 / 5), "neyman": (1, 1 / 4),
        "hellinger": (1, 2), "jeffreys": (1, 5 / 2),
    }  # fmt: skip
    assert set(expected) == {name for name, h in RATIO_WEIGHTS.items() if h}
    for name, values in expected.items():
        h = RATIO_WEIGHTS[name]
        assert h is not None and h(r).tolist() == pytest.approx(list(values))


# --------------------------------------------------------------------------------------------------------- networks

FAMILIES = {
    "ncsn++": NETWORK,
    "ddpm++": replace(NETWORK, embedding_type="positional", encoder_type="standard", channel_mult_noise=1,
                      resample_filter=(1, 1)),
    "adm": replace(presets.get("imagenet64-adm"), img_resolution=8, img_channels=1, label_dim=3, model_channels=32,
                   channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0),
    "edm2": replace(EDM2, logvar_channels=8),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoders_logits_come_with_the_output_or_alone(family: str) -> None:
    torch.manual_seed(0)
    net = build_network(FAMILIES[family]).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(3)[:2]
    seen: list[Tensor] = []
    list(net.model.enc.values())[-1].register_forward_hook(lambda module, given, out: seen.append(out))
    out, logits = net(x, sigma, labels, logits="too")
    alone = net(x, sigma, labels, logits="alone")
    assert torch.equal(out, net(x, sigma, labels)) and torch.equal(logits, alone)
    torch.testing.assert_close(logits, seen[0].mean(1))
    assert logits.shape == (2, 4, 4)
    alone.sum().backward()
    moved = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None}
    assert "enc" in moved and not moved & {"dec", "out_conv", "out_norm"}
    if family == "edm2":
        assert [tuple(part.shape) for part in net(x, sigma, labels, logits="too", return_logvar=True)] == [
            (2, 1, 8, 8), (2,), (2, 4, 4),
        ]  # fmt: skip
    with pytest.raises(ValueError, match="a guided network has two encoders"):
        guided(net, build_network(FAMILIES[family]), 1.4)(x, sigma, labels, logits="too")


# ------------------------------------------------------------------------------------------------------- gradients


def small_net(seed: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    mix = torch.randn(2, 2, dtype=torch.float64)

    def net(scaled: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.einsum("bchw,cd->bdhw", torch.tanh(3 * scaled), mix)
        return inner + scaled.roll(1, -1), 5 * inner[:, :, ::2, ::2].mean(1)

    return net


def noisy_samples() -> tuple[Tensor, Callable[[Tensor], Noisy]]:
    torch.manual_seed(0)
    y, sigma = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    n = sigma.view(-1, 1, 1, 1) * torch.randn_like(y)
    skip, out, scale = 0.25 / (sigma**2 + 0.25), sigma / (2 * (sigma**2 + 0.25).sqrt()), (sigma**2 + 0.25).rsqrt()
    return y, lambda y: Noisy(y + n, scale.view(-1, 1, 1, 1) * (y + n), sigma, skip, out, scale)


def adversary_of(net: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Adversary:
    return Adversary(net, lambda scaled, sigma: net(scaled, sigma)[1], 0.02 * 32)


@pytest.mark.parametrize(("phased", "rescale"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["ipfm", "dmd"])
def test_the_generators_gradient_is_that_of_the_sum(kind: str, phased: bool, rescale: bool) -> None:
    """By autograd through the whole loss, per sample, gamma N lambda with lambda held still."""
    teacher, student = small_net(1), small_net(2)
    y, noise = noisy_samples()
    leaf = y.clone().requires_grad_()
    noisy = noise(leaf)
    denoised = []
    for net in (teacher, student):
        raw, logits = net(noisy.scaled, noisy.sigma)
        denoised.append(noisy.c_skip.view(-1, 1, 1, 1) * noisy.x + noisy.c_out.view(-1, 1, 1, 1) * raw)
    t, s = denoised
    weight = 1 / (t - leaf).detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
    term = 0.02 * 32 * weight * nn.functional.softplus(-logits.clamp(-10, 10)).mean((1, 2))
    adversary = adversary_of(student)
    if kind == "ipfm":
        loss = weight * ((t - leaf) ** 2 - (s - leaf) ** 2 - (t - s) ** 2).sum((1, 2, 3))
        (expected,) = torch.autograd.grad((loss + term).sum(), leaf)
        found = generator_gradient(
            lambda *g: teacher(*g)[0], adversary.student, y, noise(y), alpha=1.0, phased=phased, rescale=rescale,
            beside=adversary.beside,
        )  # fmt: skip
        torch.testing.assert_close(found.loss, loss.detach())
    else:
        ratio = density_ratio(logits).sqrt() if phased else 1.0
        scale = weight * ratio
        (expected,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True)
        expected = expected + 2 * scale.view(-1, 1, 1, 1) * (s - t).detach()
        found = denoiser_difference(
            lambda *g: teacher(*g)[0], lambda *g: student(*g)[0], y, noise(y), adversary=adversary, rescale=rescale,
            ratio_weight=RATIO_WEIGHTS["hellinger"] if phased else None,
        )  # fmt: skip
    limit = 1e-5 if rescale else 1e-12  # by way of float32
    torch.testing.assert_close(found.gradient, expected, rtol=limit, atol=limit)
    assert found.valid.all() and adversary.loss is not None
    torch.testing.assert_close(adversary.loss, nn.functional.softplus(-logits.clamp(-10, 10)).mean((1, 2)).detach())


def test_nothing_moves_where_the_two_agree_and_the_discriminator_is_beyond_its_clamp() -> None:
    net = small_net(1)
    y, noise = noisy_samples()

    def sure(scaled: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        raw, logits = net(scaled, sigma)
        return raw, logits.sign() * (11 + logits.abs())

    adversary = adversary_of(sure)
    found = generator_gradient(
        lambda *g: net(*g)[0], adversary.student, y, noise(y), alpha=1.2, phased=True, beside=adversary.beside
    )
    assert not found.loss.any() and found.gradient.abs().max() < 1e-11 and found.valid.all()


# ----------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("more", [{}, {"real_weights": (0.7, 0.8)}, {"steps": 2, "gradient": "last"}])
def test_the_steps_keep_what_is_promised_of_an_objective(more: dict[str, Any]) -> None:
    """Micro-batches of half the size give the same; at D = 2 too."""
    check_objective(DistillConfig(D=16.0, batch=4, micro_batch=2, **TOLD, **more), tiny_teacher())
    if not more:
        check_objective(DistillConfig(D=2.0, batch=4, **{**TOLD, "discriminator_kimg": None}), tiny_teacher(D=2.0))


def test_denoiser_matching_has_it_too() -> None:
    check_objective(DmdConfig(D=16.0, batch=4, student_updates=1, f_weight="kl", **TOLD), tiny_teacher())


def test_denoiser_matching_equals_the_plain_loop() -> None:
    settings = {name: value for name, value in BASE.items() if name != "alpha"}
    config = DmdConfig(**{**settings, "student_updates": 2}, **TOLD)
    teacher = tiny_teacher()
    made = Distiller(config, teacher, real=real_images(), world=ALONE)
    for step in range(2):
        made.iteration(step)
    expected = plain_loop.distill(teacher, config, 2, real=real_images())
    assert max(equivalence.difference(expected, trained_tensors(made))) <= equivalence.LIMIT


def test_the_student_first_then_the_generator_then_the_term() -> None:
    """8 images a step: the generator stays for one step, and meets the discriminator in the third alone."""
    teacher = tiny_teacher()
    config = DistillConfig(**BASE, **{**TOLD, "discriminator_kimg": (0.008, 0.016)})
    assert (config.first_whole_step, config.planned_step) == (1, 2)
    made = Distiller(config, teacher, real=real_images(), world=ALONE)
    found, measured = [trained_tensors(made)], []
    for step in range(3):
        measured.append(made.iteration(step))
        found.append(trained_tensors(made))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0] if n.startswith("generator/"))
    assert any(not torch.equal(found[0][n], found[1][n]) for n in found[0] if n.startswith("student/"))
    said = [set(one.sums) for one in measured]
    assert said[0] == {"student_loss", "discriminator_loss"} and said[1] == said[0] | {"generator_loss"}
    assert said[2] == said[1] | {"adversarial_loss"}
    # Binary cross entropies: near log 2 while nothing is known.
    for one in measured:
        assert 0.3 < float(one.sums["discriminator_loss"] / one.counts["discriminator_loss"]) < 1.5
    expected = plain_loop.distill(teacher, config, 3, real=real_images())
    assert max(equivalence.difference(expected, found[3])) <= equivalence.LIMIT
    # By a weight of 0 the discriminator learns, and the generator's step is without it.
    found = run(replace(config, discriminator_weights=(1.0, 0.0), discriminator_kimg=(0, 0)), teacher, real_images(), 1)
    assert "loss 0 generator_loss" in found and "loss 0 adversarial_loss" not in found


def test_a_real_image_that_is_not_finite_is_left_out_and_counted() -> None:
    config = DistillConfig(**BASE, **TOLD)
    made = Distiller(config, tiny_teacher(), real=real_images(), world=ALONE)
    whole = made.steps._real.batch(0, torch.arange(8))
    broken = whole.images.clone()
    broken[2] = math.nan

    class Broken:
        def batch(self, step: int, index: Tensor) -> Any:
            return whole._replace(images=broken[index])

    made.steps._real = Broken()
    found = made.steps.student_step(0)
    assert float(found.bad["student"]) == 1 and float(found.counts["discriminator_loss"]) == 7.5
    assert float(found.counts["student_loss"]) == 8 and all(torch.isfinite(v) for v in trained_tensors(made).values()
                                                             if v.ndim == 0)  # fmt: skip
    assert all(bool(torch.isfinite(v).all()) for v in trained_tensors(made).values())


def test_a_weight_that_is_no_number_is_not_in_the_mean_of_the_others() -> None:
    class Own(DistillConfig):
        def student_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
            return torch.where(torch.arange(len(sigma)) == 1, math.inf, 3.0)

    teacher = tiny_teacher()
    trial = _Trial(Own(D=16.0, batch=4, precision="fp32", **TOLD).completed(teacher.config), teacher, 4)
    found = trial.steps._student_levels(0, trial.steps._micro(0, {"step": 0, "first": 0}))[1]
    assert found is not None and found.factor.tolist() == pytest.approx([0.5 * 3 * 3 / 4] * 4)


def test_a_log_variance_counts_each_level_alike() -> None:
    """Of EDM2: the discriminator's loss is weighed as the denoising loss is, and does not move the log-variance."""
    torch.manual_seed(0)
    teacher = build_network(FAMILIES["edm2"]).eval().requires_grad_(False)
    found = []
    for weight in (100.0, 1.0):
        config = DistillConfig(
            D=16.0, batch=4, precision="fp32", logvar=True, **{**TOLD, "discriminator_weights": (weight, 2e-4)}
        )
        trial = _Trial(config.completed(teacher.config), teacher, 4)
        trial.iterate(0)
        found.append(trial.networks["student"].updates[0])
    one, other = found
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert one.keys() == other.keys() and any("logvar" in name for name in same)
    assert {name for name in one if ".dec." in name and "emb" not in name} <= same
    assert not any(name.startswith("unet.enc.") for name in same)


# ------------------------------------------------------------------------------------------------- plans and words


def test_passes_are_counted() -> None:
    """Of each image: 11, and three of the encoder, which is a share of a network; both terms share the real pass."""
    plain, told, both = (DistillConfig(batch=8, max_steps=1, precision="fp32", **more) for more in
                         ({}, TOLD, {**TOLD, "real_weights": (0.92, 0.94)}))  # fmt: skip
    share = encoder_flops(NETWORK) / forward_flops(NETWORK)
    assert 0.1 < share < 0.5
    steps = [Run(config, NETWORK).step_flops() / (8 * forward_flops(NETWORK)) for config in (plain, told, both)]
    assert steps == pytest.approx([11, 11 + 3 * share, 14])
    dmd = DmdConfig(batch=8, max_steps=1, precision="fp32", student_updates=2, **TOLD)
    assert Run(dmd, NETWORK).step_flops() / (8 * forward_flops(NETWORK)) == pytest.approx(13 + 6 * share + 2 * share)
    cifar = presets.get("cifar10-ddpmpp")
    assert 11.8 < Run(told, cifar).step_flops() / (8 * forward_flops(cifar)) < 12.4  # 12 in the table
    phases = simulate_distillation(StepSettings(NETWORK, 8, Sharding(), config=told, phased=True))
    one, other = (phases[f"student: forward and backward{of}"] for of in ("", ", real"))
    gradient = 4 * sum(p.numel() for p in compared_teacher().parameters())
    assert other < one + gradient and "generator: backward" in phases


def test_what_a_run_says_of_itself() -> None:
    given = DistillConfig(real_data=Path("own"), discriminator="encoder")
    config = complete(given, NETWORK, ALONE.device)
    assert config.real_weights is None and config.takes_real_images
    assert (config.discriminator_weights, config.starts) == ((1.0, 2e-4), (100.0, 200.0))
    short = complete(replace(given, max_steps=300, batch=64), NETWORK, ALONE.device)
    assert short.starts == pytest.approx((0.96, 1.92)) and short.first_whole_step == 15
    # What a folder records is open, so that the run can be lengthened.
    assert short.discriminator_kimg is None
    edm2 = complete(given, EDM2, ALONE.device)
    assert edm2.discriminator_weights == (100.0, 2e-4)
    assert given.name() == "alpha1-K1-encoder" and replace(given, real_weights=(0.9, 0.8)).name() == (
        "alpha1-K1-real0.9-0.8-encoder"
    )
    assert config.objective(NETWORK).title == "distil D=16 alpha=1 K=1 discriminator=encoder"
    words = ", with a discriminator from the student's encoder"
    for kind, more in ((DistillConfig, {}), (DmdConfig, {"f_weight": "kl"})):
        settings = kind(discriminator="encoder", **more).to_json()
        assert words in kind.info_words(settings) and words in kind.report_words(settings)
        assert words not in kind.info_words(kind().to_json()) and kind.card_rows(settings)["discriminator"] == "encoder"
    dmd = DmdConfig(discriminator="encoder", f_weight="kl")
    assert dmd.name() == "dmd5-K1-encoder-kl" and "the weight of kl" in DmdConfig.info_words(dmd.to_json())
    # The vector alone is the gradient of that divergence.
    words = [DmdConfig.report_words({**one.to_json(), "D": math.inf}) for one in (DmdConfig(), dmd)]
    assert ["descends a Kullback-Leibler divergence" in one for one in words] == [True, False]
    row = "weight of an f-divergence"
    assert [DmdConfig.card_rows(one.to_json())[row] for one in (DmdConfig(), dmd)] == [None, "kl"]
    figures = DistillConfig.figures("cifar10", {**config.to_json(), "steps": 1})
    assert {D: figure.fid for D, figure in figures.items()} == {math.inf: 1.499}
    assert not DistillConfig.figures("cifar10", {**config.to_json(), "alpha": 0.5})
    heavier = replace(config, discriminator_weights=(10.0, 2e-4)).to_json()
    here, other = (
        figures[math.inf].beside(of, presets.get("cifar10-ddpmpp")).differs for of in (config.to_json(), heavier)
    )
    assert set(other) - set(here) == {"weights of the discriminator 1, 0.0002 there, 10, 0.0002 here"}
    assert not DmdConfig.figures("imagenet64-cond", {**dmd.to_json(), "steps": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discriminator": "head"}, "discriminator must be encoder, got 'head'"),
        ({"discriminator_weights": (1, 1)}, "discriminator-weights 1 1 was given without discriminator encoder"),
        ({"discriminator_kimg": (1, 1)}, "discriminator-kimg 1 1 was given without discriminator encoder"),
        ({**TOLD, "discriminator_weights": (0, 1)}, "discriminator-weights must be two numbers, .*, got 0 1$"),
        ({**TOLD, "discriminator_weights": 3}, "discriminator-weights must be two numbers, .*, got 3$"),
        ({**TOLD, "discriminator_kimg": (2, 1)}, "discriminator-kimg must be two numbers >= 0, .*, got 2 1$"),
        ({**TOLD, "discriminator_kimg": (0, math.inf)}, "discriminator-kimg must be two numbers >= 0, .*, got 0 inf$"),
    ],
)
def test_settings_that_make_no_discriminator(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)


def test_images_are_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="discriminator encoder was given without real images"):
        Distiller(DistillConfig(**BASE, **TOLD), tiny_teacher(), world=ALONE)
    with pytest.raises(ValueError, match="f-weight kl needs the ratio of densities: give discriminator encoder too"):
        DmdConfig(f_weight="kl")
    with pytest.raises(ValueError, match=r"f-weight must be reverse-kl, kl, .*, got 'chi'"):
        DmdConfig(f_weight="chi")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_recipe_with_its_own_images_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its warm-ups end within the run; resumed, it is what it is at once."""
    given = [*TINY, "--max-steps", "4", "--real-data", "own", "--discriminator", "encoder", "--checkpoint-every", "2",
             "--discriminator-kimg", "0.008", "0.016", "--log-every", "4"]  # fmt: skip
    digits_ipfm.main([*given, "--out", str(tmp_path / "run")])
    digits_ipfm.main([*given, "--max-steps", "2", "--out", str(tmp_path / "parts")])
    digits_ipfm.main([*given, "--out", str(tmp_path / "parts")])
    ends = [(tmp_path / name / "generator" / "model.safetensors").read_bytes() for name in ("run", "parts")]
    assert ends[0] == ends[1]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["discriminator"] == "encoder" and record["config"]["real_weights"] is None
    assert record["real_data"]["dataset"] == "digits"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [{name for name in line if name.endswith("_loss")} for line in lines if "student_loss" in line]
    assert [len(names) for names in losses] == [2, 3, 4, 4] and "adversarial_loss" in losses[2]
    generator = json.loads((tmp_path / "run" / "generator" / "config.json").read_text())
    assert '"discriminator": "encoder"' in json.dumps(generator)
    capsys.readouterr()


def test_a_run_that_is_lengthened_keeps_its_warm_ups(tmp_path: Path) -> None:
    """By default they are shares of the length that the run began with, which its folder records."""
    given = {name: value for name, value in TOLD.items() if name != "discriminator_kimg"}
    config = DistillConfig(**{**BASE, "max_steps": 2, "heun_steps": 1}, **given)
    teacher, shares = tiny_teacher(), [0.0008, 0.0016]

    def record() -> dict[str, Any]:
        return json.loads((tmp_path / "config.json").read_text())

    first = Distiller(config, teacher, real=real_images(), world=ALONE)
    first.run(tmp_path)
    first.run(tmp_path)
    assert record()["decided"]["discriminator_kimg"] == pytest.approx(shares)
    assert record()["config"]["discriminator_kimg"] is None
    longer = Distiller(replace(config, max_steps=3), teacher, real=real_images(), world=ALONE)
    longer.run(tmp_path)
    assert record()["decided"]["discriminator_kimg"] == pytest.approx(shares) and record()["config"]["max_steps"] == 3
    assert longer.config.starts == longer.steps.config.starts == pytest.approx(shares)
    facts = {name: value for name, value in record().items() if name in ("teacher", "real_data")}
    much = replace(longer._given or config, max_steps=400)
    kept = check_run_folder(tmp_path, "distill", much, facts)["decided"]
    assert much.first_whole_step >= 20 and much.keeping(kept).first_whole_step == 1
    # What is damaged is no other run's beginning.
    whole = record()
    (tmp_path / "config.json").write_text(json.dumps(whole | {"decided": {"discriminator_kimg": [1]}}))
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a run's configuration"):
        check_run_folder(tmp_path, "distill", much, facts)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    # One that is older than the record had them by its length so far.
    (tmp_path / "config.json").write_text(json.dumps({n: v for n, v in record().items() if n != "decided"}))
    kept = check_run_folder(tmp_path, "distill", much, facts)["decided"]
    assert kept["discriminator_kimg"] == pytest.approx([0.0012, 0.0024])
    # Settings that no run of that length has are told as what they are.
    with pytest.raises(ValueError, match=r"another configuration \(student_first_kimg is 0\.0 there, 0\.1 here\)"):
        check_run_folder(tmp_path, "distill", replace(much, student_first_kimg=0.1), facts)


def test_what_a_recipe_refuses(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="discriminator encoder needs the real images: give --real-data"):
        digits_ipfm.main([*TINY, "--discriminator", "encoder", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    options = options_for(DmdConfig)(real_data=Path("own"))
    with pytest.raises(ValueError, match="real-data own is for a discriminator here: give --discriminator encoder too"):
        read_real(options, options.distillation(), NETWORK)
