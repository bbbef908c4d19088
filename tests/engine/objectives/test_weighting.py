"""A weighting of one's own: a subclass of IPFM's settings with a kind, whose methods weigh samples and draw levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from small_distillation import at_six_levels, four_pixels
from torch import Tensor

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.no_reading import NoReading
from ipfm.engine.config import setting
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives import OBJECTIVES, check_objective
from ipfm.engine.objectives.losses import bind, denoising_objective, generator_gradient
from ipfm.kernels import philox

BATCH = 6


@dataclass(frozen=True, kw_only=True)
class Tilted(DistillConfig):
    """Both losses are tilted by a power of sigma, and the generator's levels are drawn evenly in its logarithm."""

    kind: ClassVar[str] = "tilted"

    power: float = setting(0.5, memory=False)
    """Exponent of sigma."""

    def generator_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        return weight.sqrt() * sigma**self.power

    def student_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        return weight * (1 + sigma) ** -self.power

    def generator_sigma(self, sample_index: Tensor, **position: int) -> Tensor:
        u = philox.uniform(sample_index, 1, **position)[:, 0]
        return 0.05 * 400**u

    def student_sigma(self, sample_index: Tensor, **position: int) -> Tensor:
        return replace(self.noise, p_mean=-0.4).denoising(sample_index, **position)

    @classmethod
    def weighting_words(cls, settings: Mapping[str, Any]) -> str:
        return f"sigma^{settings.get('power')}"


@pytest.mark.parametrize("phased", [False, True], ids=["joint", "phased"])
def test_the_generators_gradient_is_autograd_of_the_weighted_formula(phased: bool) -> None:
    teacher, student = four_pixels(0).double(), four_pixels(1).double()
    y, noisy = at_six_levels(teacher)
    raw, weighting = (bind(teacher, None), bind(student, None)), Tilted().generator_weight
    got = generator_gradient(*raw, y, noisy, alpha=1.2, phased=phased, weighting=weighting)
    leaf = y.clone().requires_grad_()
    x = leaf + (noisy.x - y)
    t, s = teacher(x, noisy.sigma), student(x, noisy.sigma)
    weight = (1 / (t - leaf).detach().abs().mean((1, 2, 3))).sqrt() * noisy.sigma**0.5
    squares = [(a - b).square().sum((1, 2, 3)) for a, b in ((t, leaf), (s, leaf), (t, s))]
    loss = weight * (squares[0] - squares[1] - 1.4 * squares[2])
    loss.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(got.gradient, leaf.grad, rtol=0, atol=1e-12 * leaf.grad.abs().max().item())
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.weight, weight, rtol=1e-12, atol=0)
    assert got.valid.all()


def test_the_students_gradient_is_autograd_of_the_weighted_formula() -> None:
    student = four_pixels(1).double().requires_grad_(True)
    y, noisy = at_six_levels(student)
    result = denoising_objective(bind(student, None), y, noisy, sigma_data=0.5, weighting=Tilted().student_weight)
    result.surrogate.backward()
    got = [p.grad for p in student.parameters()]
    weight = (4 + noisy.sigma**-2) * (1 + noisy.sigma) ** -0.5
    losses = weight * (student(noisy.x, noisy.sigma) - y).square().sum((1, 2, 3))
    wanted = torch.autograd.grad(losses.sum(), list(student.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, b.abs().max().item()))
    torch.testing.assert_close(result.loss, losses.detach(), rtol=1e-12, atol=0)


def test_a_weighting_that_changes_nothing_is_the_method_bit_for_bit() -> None:
    nets = four_pixels(0), four_pixels(1)
    y, noisy = at_six_levels(nets[0])
    y, noisy = y.float(), noisy._replace(**{name: getattr(noisy, name).float() for name in noisy._fields})
    raw = [bind(net, None) for net in nets]
    for weighting in (DistillConfig().generator_weight, lambda sigma, weight: weight.clone()):
        with_it = generator_gradient(*raw, y, noisy, alpha=1.0, phased=True, weighting=weighting)
        without = generator_gradient(*raw, y, noisy, alpha=1.0, phased=True)
        assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    for weighting in (DistillConfig().student_weight, lambda sigma, weight: weight.clone()):
        losses = [denoising_objective(raw[1], y, noisy, sigma_data=0.5, weighting=w).loss for w in (weighting, None)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_costs_its_sample_alone(value: float) -> None:
    nets = four_pixels(0), four_pixels(1)
    y, noisy = at_six_levels(nets[0])
    y, noisy = y.float(), noisy._replace(**{name: getattr(noisy, name).float() for name in noisy._fields})

    def bad(sigma: Tensor, weight: Tensor) -> Tensor:
        return torch.where(sigma > 10, value, weight)

    raw = [bind(net, None) for net in nets]
    whole = generator_gradient(*raw, y, noisy, alpha=1.0, phased=True)
    got = generator_gradient(*raw, y, noisy, alpha=1.0, phased=True, weighting=bad)
    assert got.valid.tolist() == [True] * 5 + [False] and not got.gradient[5].any() and got.loss[5] == 0
    assert torch.equal(got.gradient[:5], whole.gradient[:5])
    student = denoising_objective(raw[1], y, noisy, sigma_data=0.5, weighting=bad)
    assert student.valid.tolist() == [True] * 5 + [False] and student.loss[5] == 0


@pytest.mark.parametrize("returned", [lambda s, w: w[:, None], lambda s, w: 1.0], ids=["shape", "number"])
def test_a_weighting_returns_a_number_a_sample(returned: Any) -> None:
    net = four_pixels(0)
    y, noisy = at_six_levels(net)
    with pytest.raises(ValueError, match=r"^a weighting must return a number a sample, of shape \(6,\), got "):
        denoising_objective(bind(net.double(), None), y, noisy, sigma_data=0.5, weighting=returned)


def test_steps_are_those_of_the_plain_loop() -> None:
    config = Tilted(
        batch=6, micro_batch=3, max_steps=4, lr=1e-3, eps=1e-2, alpha=1.0, power=0.7, zero=0, backward="phased",
        precision="fp32", activation_checkpointing="off",
    )  # fmt: skip
    teacher = four_pixels(0)
    distiller = Distiller(config, teacher, world=World(0, 1, torch.device("cpu")))
    losses = [distiller.iteration(step).sums for step in range(4)]
    plain = plain_loop.distill(teacher, config, 4)
    for name, wanted in (("student_loss", plain.student_loss), ("generator_loss", plain.generator_loss)):
        assert [line[name].item() / 6 for line in losses] == pytest.approx(wanted, rel=1e-4)
    for name, net in (("student", plain.student), ("generator", plain.generator)):
        for a, b in zip(distiller.networks[name].module.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    usual = plain_loop.distill(teacher, DistillConfig(batch=6, max_steps=4, lr=1e-3, eps=1e-2), 4)
    assert usual.student_loss[0] != pytest.approx(plain.student_loss[0], rel=1e-2)


def test_the_methods_own_weights_are_left_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a weighting of its own asks for none, and computes nothing for it."""
    seen: list[Any] = []
    from ipfm.engine.objectives import ipfm, student_steps

    for module, name in ((ipfm, "generator_gradient"), (student_steps, "denoising_objective")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, real=real, **named: seen.append(named["weighting"]) or real(*given, **named)
        )
    world = World(0, 1, torch.device("cpu"))
    decided: dict[str, Any] = {"batch": 2, "micro_batch": 2, "max_steps": 1, "zero": 0, "precision": "fp32"}
    decided |= {"backward": "phased", "activation_checkpointing": "off"}
    for config in (DistillConfig(**decided), Tilted(**decided)):
        Distiller(config, four_pixels(0), world=world).iteration(0)
    assert seen[:2] == [None, None] and all(map(callable, seen[2:])) and len(seen) == 4


def test_weights_of_ones_own_make_the_host_wait_for_nothing() -> None:
    check_objective(Tilted(batch=4, D=16.0), four_pixels(0))
    with NoReading(count=True) as mode:
        nets, usual = four_pixels(0), torch.ones(BATCH)
        y, noisy = at_six_levels(nets)
        y, noisy = y.float(), noisy._replace(**{name: getattr(noisy, name).float() for name in noisy._fields})
        before = dict(mode.found)
        raw = bind(nets, None)
        generator_gradient(raw, raw, y, noisy, alpha=1.0, phased=True, weighting=lambda sigma, weight: sigma + usual)
        denoising_objective(raw, y, noisy, sigma_data=0.5, weighting=lambda sigma, weight: sigma + usual)
    assert mode.found == before


def test_a_weighting_is_an_objective_of_its_own() -> None:
    config = Tilted(max_steps=3, D=16.0)
    assert OBJECTIVES["tilted"] is Tilted and config.recorded() == {"objective": "tilted"}
    said = config.about()
    assert said["words"] == "inverse Poisson flow matching (α = 1), weighting: sigma^0.5"
    assert said["info"] == "inverse Poisson flow matching, alpha = 1, 1 step, weighting: sigma^0.5"
    assert "weighting" in Tilted.card_rows(config.to_json())
    # Figures are published for the method as it is.
    assert DistillConfig().published("cifar10") and not config.published("cifar10")
    # One that does not say what it weighs is told from the method by its kind.
    assert super(Tilted, Tilted).weighting_words({}) == "tilted" and DistillConfig.weighting_words({}) == ""
    # A folder that is older than the key is this project's, whatever else is known.
    assert OBJECTIVES.of(None, config.to_json()) is DistillConfig
