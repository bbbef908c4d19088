"""Real images in the student's loss: the printed numbers, what it is at its ends, runs, plans, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import pytest
import torch
from small_distillation import ALONE, BASE, log_kernel, run, tiny_teacher
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import NETWORK, compared_teacher, real_images, trained_tensors
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
from ipfm.engine.memory.state import Sharding
from ipfm.engine.objectives.checking import check_objective
from ipfm.engine.objectives.losses import Noisy, generator_gradient
from ipfm.engine.objectives.real_data import RealWeights
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.training.data_order import OrderedImages
from ipfm.engine.training.resolve import complete
from ipfm.kernels import denoising_loss, ipfm_loss
from ipfm.models import guided, load_model
from ipfm.recipes import digits_ipfm

PUBLISHED = RealWeights(0.92, 0.94)


# ------------------------------------------------------------------------------------------------ printed numbers

# D -> T, S_G, p_G / p*, and the best student for (a, b, k) = (.92, .94, 0), (.92, .94, .2), (.98, .96, 0).
ATOMS = {
    1.0: (0.562248996, 0.577519380, 1.352551144, 0.579902350, 0.579156969, 0.574038951),
    8.0: (0.584148116, 0.554080419, 1.429529056, 0.558785186, 0.557923152, 0.551577028),
    128.0: (0.602701056, 0.550107990, 1.456714939, 0.555868139, 0.554967687, 0.548090052),
    math.inf: (0.604367777, 0.549833997, 1.458956508, 0.555683238, 0.554779679, 0.547857386),
}


@pytest.mark.quick
@pytest.mark.parametrize("D", ATOMS)
def test_the_best_student_of_two_atoms(D: float) -> None:
    """Where the gradient of both halves together is 0, as the loss gives it for each atom; sigma = 1, x = 0.7."""
    x, one = torch.tensor(0.7, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    real, generated = (torch.tensor(atoms, dtype=torch.float64) for atoms in ((-1.0, 1.0), (0.0, 1.0)))
    likely = {
        name: log_kernel((x - atoms) ** 2, D, 1.0).exp() for name, atoms in (("real", real), ("generated", generated))
    }
    means = [float((likely[name] * atoms).sum() / likely[name].sum()) for name, atoms in
             (("real", real), ("generated", generated))]  # fmt: skip
    found = [*means, float(likely["generated"].sum() / likely["real"].sum())]
    for a, b, k in ((0.92, 0.94, 0.0), (0.92, 0.94, 0.2), (0.98, 0.96, 0.0)):
        weights = RealWeights(a, b)
        given = {"x": x.expand(2, 1), "c_skip": k * one, "c_out": one} if k else {}

        def slope(student: float, weights: RealWeights = weights, given: dict = given, k: float = k) -> float:
            """Of the loss by the student's value at x, whose raw output is c_skip x less."""
            total = 0.0
            for atoms, name, half in (
                (generated, "generated", weights.generated), (real, "real", weights.real),
            ):  # fmt: skip
                pred = torch.full((2, 1), student - k * 0.7, dtype=torch.float64)
                got = denoising_loss(pred, atoms[:, None], one, share=half.share, stretch=half.stretch, **given)
                total += float((likely[name] * got.grad[:, 0]).sum())
            return total

        at_0, at_1 = slope(0.0), slope(1.0)
        found.append(at_0 / (at_0 - at_1))
    assert found == pytest.approx(ATOMS[D], rel=0, abs=6e-10)


# D -> J, and its gradient by theta, with (a, b) = (.92, .94) and c_skip as the offset, and without real data.
QUADRATURES = {
    8.0: ((0.14909271, (-0.9792227, 0.1815200, 0.1534622)), (0.16795699, (-1.1023432, 0.1830794, 0.1567266))),
    128.0: ((0.14160332, (-0.9242581, 0.1591039, 0.1347786)), (0.15918627, None)),
    math.inf: ((0.14100425, (-0.9198773, 0.1563696, 0.1328624)), (0.15849364, (-1.0331444, 0.1563453, 0.1347825))),
}


class Line:
    """The generator theta_0 + theta_1 z + theta_2 tanh 3z, of z on 121 points, against one of another theta."""

    SIGMAS = (0.3, 1.0, 2.5)

    def __init__(self, D: float, theta: tuple[float, ...] = (-0.2, 0.3, 0.45)) -> None:
        self.D = D
        z = torch.linspace(-6, 6, 121, dtype=torch.float64)
        self.basis = torch.stack([torch.ones_like(z), z, torch.tanh(3 * z)], 1)
        self.log_mass = torch.log_softmax(-(z**2) / 2, 0)
        self.theta = torch.tensor(theta, dtype=torch.float64)
        self.data = self.basis @ torch.tensor((0.1, 0.15, 0.6), dtype=torch.float64)
        # The trapezoid rule in asinh x: it converges exponentially, tails included.
        u = torch.linspace(-9, 9, 1201, dtype=torch.float64)
        self.x, self.dx = torch.sinh(u), torch.cosh(u) * (u[1] - u[0])

    def density(self, y: Tensor, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(log p_r(x) of the samples y, E[y | x])."""
        likely = self.log_mass + log_kernel((x[:, None] - y) ** 2, self.D, sigma)
        constant = (log_kernel(self.x**2, self.D, sigma).exp() * self.dx).sum().log()
        return torch.logsumexp(likely, 1) - constant, (torch.softmax(likely, 1) * y).sum(1)

    def best(self, y: Tensor, x: Tensor, sigma: float, weights: RealWeights) -> tuple[Tensor, Tensor, Tensor]:
        """(T, S*, q) at x: the teacher, the best student, the law that it is best on."""
        a, b = weights
        (real, T), (made, S) = self.density(self.data, x, sigma), self.density(y, x, sigma)
        made, c = made + math.log(a), 0.25 / (sigma**2 + 0.25) * x
        if a == 1:
            return T, S, made.exp()
        share = torch.sigmoid(made - real - math.log(1 - a))
        S = c + b / a * share * (S - c) + (1 - b) / (1 - a) * (1 - share) * (T - c)
        return T, S, made.exp() + (1 - a) * real.exp()

    def J(self, theta: Tensor, weights: RealWeights) -> Tensor:
        y, total = self.basis @ theta, torch.zeros((), dtype=torch.float64)
        for sigma in self.SIGMAS:
            T, S, q = self.best(y, self.x, sigma, weights)
            total = total + (self.dx * q * (T - S) ** 2).sum()
        return total

    def gradient(self, weights: RealWeights, alpha: float) -> Tensor:
        """By theta, of the generator's loss with the best student frozen: what `ipfm_loss` gives for every (z, x)."""
        y, total = self.basis @ self.theta, torch.zeros(3, dtype=torch.float64)
        for sigma in self.SIGMAS:
            x = self.x.clone().requires_grad_()
            T, S, _ = self.best(y, x, sigma, weights)
            slopes = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (T, S)]
            likely = log_kernel((self.x[:, None] - y) ** 2, self.D, sigma).exp() * self.dx[:, None]
            joint = self.log_mass.exp() * likely / likely.sum(0)
            skip = 0.25 / (sigma**2 + 0.25)

            def of_all(v: Tensor, shape: torch.Size = joint.shape) -> Tensor:
                return v.detach()[:, None].expand(shape).reshape(-1, 1)

            ones = torch.ones(joint.numel(), dtype=torch.float64)
            got = ipfm_loss(
                of_all(T - skip * x), of_all(S - skip * x), y.expand(len(self.x), -1).reshape(-1, 1), alpha=alpha,
                x=of_all(x), c_skip=skip * ones, c_out=ones, real_weights=weights,
            )  # fmt: skip
            # What it gives for y takes x along, of the networks' own slopes the offset's part is known to it.
            inner = [of_all(slope) - skip for slope in slopes]
            dy = (got.dy + inner[0] * got.dt + inner[1] * got.ds) / got.weight[:, None]
            total += (joint * dy.view_as(joint)).sum(0) @ self.basis
        return total


@pytest.mark.parametrize("D", QUADRATURES)
def test_the_generators_gradient_is_that_of_the_distance_it_minimises(D: float) -> None:
    line = Line(D)
    for weights, (J, gradient) in zip((PUBLISHED, RealWeights(1.0, 1.0)), QUADRATURES[D], strict=True):
        theta = line.theta.clone().requires_grad_()
        found = line.J(theta, weights)
        (slope,) = torch.autograd.grad(found, theta)
        assert float(found.detach()) == pytest.approx(J, rel=1e-7)
        if gradient is not None:
            assert slope.tolist() == pytest.approx(gradient, rel=0, abs=6e-8)
        # With the student that is best now held still, at alpha = 1/2.
        torch.testing.assert_close(line.gradient(weights, 0.5), slope, rtol=0, atol=1e-9)
    there = Line(D, (0.1, 0.15, 0.6))
    for alpha in (0.5, 1.2):
        assert there.gradient(PUBLISHED, alpha).abs().max() < 1e-13


def test_ten_million_dimensions_are_nearly_infinitely_many() -> None:
    lines = [Line(D) for D in (1e7, math.inf)]
    one, other = (line.J(line.theta, PUBLISHED) for line in lines)
    assert 0 < abs(float(one - other)) < 8e-8 * float(other)
    one, other = (line.gradient(PUBLISHED, 1.0) for line in lines)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("phased", [False, True])
def test_nothing_moves_where_student_and_teacher_are_one_function(alpha: float, phased: bool) -> None:
    torch.manual_seed(0)
    y, sigma = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    x = y + sigma.view(-1, 1, 1, 1) * torch.randn_like(y)
    skip, out, scale = 0.25 / (sigma**2 + 0.25), sigma / (2 * (sigma**2 + 0.25).sqrt()), (sigma**2 + 0.25).rsqrt()
    noisy = Noisy(x, scale.view(-1, 1, 1, 1) * x, sigma, skip, out, scale)

    def net(scaled: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(3 * scaled) + scaled.roll(1, -1)

    for weights in (PUBLISHED, (0.5, 1.0), (0.9, 0.9), (0.8, 1.2)):
        got = generator_gradient(net, net, y, noisy, alpha=alpha, phased=phased, real_weights=weights)
        assert not got.loss.any() and got.valid.all()
        # Joint, the two that cancel are added up within one pass.
        assert got.gradient.abs().max() <= 1e-13 * 1e2


# ---------------------------------------------------------------------------------------------------------- steps


def test_weights_of_one_are_the_step_without_real_data_bit_for_bit() -> None:
    teacher = tiny_teacher()
    plain = run(DistillConfig(**BASE), teacher, None)
    same = run(DistillConfig(**BASE, real_weights=(1, 1)), teacher, real_images())
    assert plain.keys() == same.keys() and all(torch.equal(plain[name], same[name]) for name in plain)
    other = run(DistillConfig(**BASE, real_weights=PUBLISHED), teacher, real_images())
    assert not torch.equal(plain["loss 0 student_loss"], other["loss 0 student_loss"])


def test_equal_weights_have_no_offset_and_any_number_of_dimensions() -> None:
    """At D = 2 too, in the plain loop's way."""
    teacher = tiny_teacher(D=2.0)
    config = DistillConfig(**BASE, real_weights=(0.9, 0.9))
    made = Distiller(config, teacher, real=real_images(), world=ALONE)
    made.iteration(0)
    expected = plain_loop.distill(teacher, config, 1, real=real_images())
    assert max(equivalence.difference(expected, trained_tensors(made))) <= equivalence.LIMIT


def test_of_a_guided_teacher_the_generator_alone_is_driven() -> None:
    """The student learns both halves as before: its first update, which the teacher has no part in, is the same."""
    teacher = tiny_teacher()
    driven = guided(teacher, tiny_teacher(), 1.4)
    config = DistillConfig(**BASE, real_weights=PUBLISHED)
    plain = run(config, teacher, real_images(), 1)
    found = run(replace(config, guidance=1.4), driven, real_images(), 1)
    assert torch.equal(plain["loss 0 student_loss"], found["loss 0 student_loss"])
    for name, tensor in plain.items():
        if name.startswith("student/weight"):
            assert torch.equal(tensor, found[name])


def test_a_real_image_that_overflows_is_left_out_and_counted() -> None:
    """Its half is divided by those that are left: the others count as much as in a batch without it."""
    teacher, config = tiny_teacher(), DistillConfig(**{**BASE, "augment": 0.0}, real_weights=(0.5, 0.6))
    made = Distiller(config, teacher, real=real_images(), world=ALONE)
    whole = made.steps._real.batch(0, torch.arange(8))
    broken = whole.images.clone()
    broken[2] = math.nan

    class Broken:
        def batch(self, step: int, index: Tensor) -> Any:
            return whole._replace(images=broken[index])

    made.steps._real = Broken()
    found = made.steps.student_step(0)
    assert float(found.bad["student"]) == 1 and float(found.counts["student_loss"]) == pytest.approx(7.5, rel=1e-14)
    assert math.isfinite(float(found.sums["student_loss"]))
    made.steps._real = OrderedImages(real_images(), batch=8, seed=3, world=ALONE)
    assert float(made.steps.student_step(1).bad["student"]) == 0


def test_the_steps_keep_what_is_promised_of_an_objective() -> None:
    more = {"student_updates": 2, "steps": 2, "gradient": "last", "augment": 0.5}
    check_objective(DistillConfig(D=16.0, batch=4, micro_batch=2, real_weights=PUBLISHED, **more), tiny_teacher())


def test_a_pass_more_each_way_and_one_network_at_a_time() -> None:
    """14 forward passes instead of 11 of each image; in the plan the real half takes the memory of the other."""
    plain, real = (DistillConfig(batch=8, max_steps=1, precision="fp32", **more) for more in
                   ({}, {"real_weights": PUBLISHED}))  # fmt: skip
    counts = [config.objective(NETWORK).forwards(phased=False, checkpointed=False) for config in (plain, real)]
    assert counts == [11, 14]
    assert [config.objective(NETWORK).forwards(phased=True, checkpointed=True) for config in (plain, real)] == [17, 21]
    several = replace(real, student_updates=5)
    assert several.objective(NETWORK).forwards(phased=False, checkpointed=False) == 5 * 7 + 7
    assert Run(real, NETWORK).step_flops() == pytest.approx(14 / 11 * Run(plain, NETWORK).step_flops(), rel=1e-9)
    phases = simulate_distillation(StepSettings(NETWORK, 8, Sharding(), config=real, phased=True))
    one, other = (phases[f"student: forward and backward{of}"] for of in ("", ", real"))
    # The gradient of the first half is there in the second.
    image, gradient = 4 * 64 * 8, 4 * sum(p.numel() for p in compared_teacher().parameters())
    assert one <= other <= one + gradient + 8 * image


# --------------------------------------------------------------------------------------------------- whole runs


def test_a_run_goes_on_with_its_images_alone(tmp_path: Path) -> None:
    """Saved, resumed on other micro-batches: the same weights; other images, or none, are refused by name."""
    config = DistillConfig(**{**BASE, "max_steps": 4, "checkpoint_every": 2, "heun_steps": 1}, real_weights=PUBLISHED)
    teacher = tiny_teacher()
    Distiller(config, teacher, real=real_images(), world=ALONE).run(tmp_path / "whole")
    Distiller(replace(config, max_steps=2), teacher, real=real_images(), world=ALONE).run(tmp_path / "parts")
    resumed = Distiller(replace(config, micro_batch=4), teacher, real=real_images(), world=ALONE)
    resumed.run(tmp_path / "parts")
    ends = [load_model(tmp_path / name / "generator") for name in ("whole", "parts")]
    for one, other in zip(*(net.state_dict().values() for net in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert record["real_data"]["images"] == 19 and record["config"]["real_weights"] == [0.92, 0.94]
    others = replace(real_images(), images=255 - real_images().images)
    with pytest.raises(ValueError, match=r"belongs to another configuration \(real_data.pictures is "):
        Distiller(config, teacher, real=others, world=ALONE).run(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"real_weights is \[0.92, 0.94\] there, null here"):
        Distiller(replace(config, real_weights=None), teacher, world=ALONE).run(tmp_path / "parts")


def test_what_a_run_says_of_itself() -> None:
    config = complete(DistillConfig(real_data=Path("images.zip")), NETWORK, ALONE.device)
    assert config.real_weights == (0.98, 0.96) and config.takes_real_images
    free = replace(NETWORK, label_dim=0)
    assert complete(DistillConfig(real_data=Path("images.zip")), free, ALONE.device).real_weights == (0.92, 0.94)
    assert complete(DistillConfig(), free, ALONE.device).real_weights is None
    assert config.name() == "alpha1-K1-real0.98-0.96"
    assert DistillConfig(real_data=Path("own")).name() == "alpha1-K1-real" and DistillConfig().name() == "alpha1-K1"
    assert DistillConfig(real_data=Path("own"), real_weights=(1, 1)).name() == "alpha1-K1"
    objective = config.objective(NETWORK)
    assert objective.title == "distil D=16 alpha=1 K=1 real=0.98,0.96"
    assert objective.summary.endswith("with real data by 0.98 0.96")
    for words in (DistillConfig.info_words, DistillConfig.report_words):
        assert words(config.to_json()).endswith(", with real data by 0.98 0.96")
        assert "real data" not in words(DistillConfig().to_json())
        assert "real data" not in words({**config.to_json(), "real_weights": "damaged"})
    rows = DistillConfig.card_rows(config.to_json())
    assert str(rows["real data in the student's loss, a and b"]) == "0.98 0.96"
    # Figures of IPFM are none of such a run.
    settings = {**DistillConfig(real_weights=PUBLISHED).to_json(), "steps": 1}
    assert {D: figure.fid for D, figure in DistillConfig.figures("cifar10", settings).items()} == {math.inf: 2.23}
    assert not DistillConfig.figures("cifar10", {**settings, "real_weights": [0.5, 0.5]})
    assert 2048.0 in DistillConfig.figures("cifar10", DistillConfig().to_json())


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0), (1.2, 1.0), (1.0, 0.9), (0.9, 0.0), (0.9, math.nan), (0.9,), "ab", (1, True)]
)
def test_weights_that_make_no_loss(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"^real-weights must be two numbers, .* b = 1 where a = 1, got "):
        DistillConfig(real_weights=weights)


@pytest.mark.parametrize("D", [1.0, 2.0])
def test_few_dimensions_are_refused_with_the_reason(D: float) -> None:
    network = replace(NETWORK, D=D)
    message = rf"^real-weights 0.92 0.94 needs D above 2, .* finite mean square, .* has D {D:g}; give two equal weights"
    with pytest.raises(ValueError, match=message):
        complete(DistillConfig(real_weights=PUBLISHED), network, ALONE.device)
    assert complete(DistillConfig(real_weights=(0.9, 0.9)), network, ALONE.device).takes_real_images
    assert complete(DistillConfig(real_weights=(1, 1)), network, ALONE.device).real_weights == (1.0, 1.0)


def images(shape: tuple[int, ...] = (4, 1, 8, 8), labels: Tensor | None = None, **more: Any) -> ImageDataset:
    return ImageDataset(torch.zeros(shape, dtype=torch.uint8), labels, name="set.zip", **more)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"real_weights \(0.92, 0.94\) was given without real images"),
        (
            images((4, 3, 8, 8)),
            "real-data must be images like the teacher's: set.zip has 3x8x8, the teacher makes 1x8x8",
        ),
        (images(), "real-data set.zip has no labels, and the teacher takes 3 classes"),
        (images(labels=torch.arange(4)), "real-data set.zip has 4 classes, the teacher takes 3"),
    ],
)
def test_images_that_do_not_fit(data: ImageDataset | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(DistillConfig(**BASE, real_weights=PUBLISHED), compared_teacher(), real=data, world=ALONE)


def test_images_without_weights_and_classes_that_have_no_image() -> None:
    with pytest.raises(ValueError, match="the real images of noise were given without real_weights"):
        Distiller(DistillConfig(**BASE), tiny_teacher(), real=real_images(), world=ALONE)
    some = images(labels=torch.tensor([0, 1, 1, 0]))
    made = Distiller(DistillConfig(**BASE, real_weights=PUBLISHED), tiny_teacher(), real=some, world=ALONE)
    made.iteration(0)


# ---------------------------------------------------------------------------------------------------- command line

TINY = ("--teacher-steps", "2", "--max-steps", "2", "--batch", "8", "--eval-images", "16", "--heun-steps", "1",
        "--zero", "0", "--micro-batch", "8", "--backward", "joint", "--activation-checkpointing", "off")  # fmt: skip


def test_a_recipe_with_its_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_ipfm.main([*TINY, "--real-data", "own", "--out", str(tmp_path / "run")])
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["real_weights"] == [0.92, 0.94] and record["real_data"]["dataset"] == "digits"
    generator = json.loads((tmp_path / "run" / "generator" / "config.json").read_text())
    assert "real_weights" in json.dumps(generator)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--real-weights", "0.9", "0.9"), "real-weights 0.9 0.9 needs the real images: give --real-data"),
        (("--real-data", "nowhere.zip"), "nowhere.zip does not exist in "),
        (("--real-xflip",), "real-xflip was given without real-data"),
        (("--real-data", "own", "--D", "2"), "real-weights 0.92 0.94 needs D above 2"),
        (("--real-data", "own", "--real-weights", "1", "0.9"), "real-weights must be two numbers"),
    ],
)
def test_what_a_recipe_refuses(given: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises((BadInput, ValueError), match=message):
        digits_ipfm.main([*TINY, *given, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
