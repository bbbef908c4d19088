"""Consistency tuning against a plain loop by autograd, at the levels of its formula, and after a mid-training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import compared_cases
import equivalence
import pytest
import torch
from plain_generator import PlainGenerator
from torch import Tensor

from ipfm.engine import Distiller
from ipfm.engine.commands.bench.equivalence import real_images, trained_tensors
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments import DistilRecipe
from ipfm.engine.objectives.cmt import CmtConfig
from ipfm.engine.objectives.ect import EctConfig, EctStream
from ipfm.engine.random_streams import seed_dropout
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.kernels import perturb, philox
from ipfm.models import EDMPrecond, Precond, load_teacher, presets
from ipfm.recipes import cifar_ect, distill_ect

ALONE = World(0, 1, torch.device("cpu"))
# From the third step on the gap is half as wide.
SETTINGS: dict[str, Any] = {
    "batch": 8, "max_steps": 3, "q_kimg": 0.016, "lr": 1e-3, "eps": 1e-1, "ema_kimg": 0.05, "seed": 3,
    "activation_checkpointing": "off", "zero": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    return equivalence.compared_teacher().eval().requires_grad_(False)


def plain_loop(teacher: Precond, config: EctConfig, steps: int) -> PlainGenerator:
    """The method in plain PyTorch: the formulas as they are printed, torch's RAdam."""
    plain = PlainGenerator(teacher, config)
    G = plain.net
    index, data = torch.arange(config.batch), real_images()
    zeros = torch.zeros(config.batch, *teacher.config.image_shape)

    def wide(values: Tensor) -> Tensor:
        return values.float().view(-1, 1, 1, 1)

    for step in range(steps):
        at = {"seed": config.seed, "step": step}
        real = data.batch(step, index, batch_size=config.batch, seed=config.seed)
        y, labels = real.images, real.labels
        t = torch.exp(-1.1 + 2 * philox.normal(index, 1, stream=EctStream.LEVEL, **at)[:, 0].double()).clamp(0.002, 80)
        stage = step * config.batch // 16
        r = torch.clamp(t * (1 - config.q ** (-stage - 1) * (1 + 8 / (1 + t.exp()))), min=0)

        def noise(sigma: Tensor, at: dict[str, int] = at) -> Tensor:
            # One draw: the kernel's noise at every level is that of sigma = 1 times it.
            found = perturb(zeros, sigma.float(), teacher.D, stream=EctStream.NOISE, sample_index=index, **at)
            assert isinstance(found, Tensor)
            return found

        x, at_zero = y + noise(t), r == 0
        some = torch.where(at_zero, t, r)
        if config.pairs == "data":
            x_r = torch.where(wide(at_zero) > 0, y, y + noise(some))
        else:
            slope = (x - teacher(x, t.float(), labels)) / wide(t)
            x_r = x + wide(r - t) * slope
            if config.pairs == "heun":
                other = (x_r - teacher(x_r, some.float(), labels)) / wide(some)
                x_r = torch.where(wide(at_zero) > 0, x_r, x + wide(r - t) * (slope + other) / 2)
        with torch.no_grad():
            seed_dropout(config.seed, EctStream.DROPOUT, step, 0)
            target = torch.where(wide(at_zero) > 0, x_r, G(x_r, some.float(), labels))
        seed_dropout(config.seed, EctStream.DROPOUT, step, 0)
        square = (G(x, t.float(), labels) - target).square().sum((1, 2, 3))
        loss = (((square + config.huber**2).sqrt() - config.huber) / (t - r).float()).mean()
        plain.update(loss, step)
    return plain


@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch": 2},
        {"pairs": "euler", "dropout": 0.2, "q": 8.0},
        {"pairs": "heun", "huber": 0.3, "micro_batch": 4, "backward": "phased", "q": 64.0},
    ],
)
def test_equals_the_plain_loop(teacher: Precond, more: dict[str, Any]) -> None:
    """Pairs of data and of both solvers, micro-batches, dropout, levels that end at 0 and do not."""
    config = EctConfig(**{**SETTINGS, **more})
    run = Distiller(config, teacher, real=real_images(), world=ALONE)
    measured = [run.iteration(step) for step in range(3)]
    losses = torch.stack([m.sums["generator_loss"] / m.counts["generator_loss"] for m in measured])
    plain_loop(teacher, config, 3).check(trained_tensors(run), losses)


@pytest.mark.distributed
def test_equals_the_plain_loop_on_two_processes(tmp_path: Path) -> None:
    """Every ZeRO stage, with accumulation and without."""
    small, base = compared_cases.make_small_teacher(tmp_path), {**SETTINGS, "objective": "ect"}
    cases = {f"z{stage}": {**base, "zero": stage, "micro_batch": (4, 2)[stage % 2]} for stage in (0, 1, 2, 3)}
    expected = plain_loop(load_teacher(small), EctConfig(**SETTINGS), 2)
    found = equivalence.run(small, tmp_path, 2, cases, 2, whole=compared_cases.WHOLE)
    for tensors in found.values():
        expected.check(tensors, tensors["loss/generator_loss"])


def test_gaps_by_hand() -> None:
    """q^-(s+1), and with it r = t (1 - q^-(s+1) (1 + 8 / (1 + e^t))): at t = 1, q = 64, s = 0 it is 0.950758."""
    config = EctConfig(batch=100, q=2.0, q_kimg=1.0)
    assert [config.gap_at(step) for step in (0, 9, 10, 20, 35)] == [0.5, 0.5, 0.25, 0.125, 0.0625]
    assert EctConfig(q=4096.0, q_kimg=0.0).gap_at(10**6) == 1 / 4096
    # Of a long run: t and r must differ in float32.
    assert config.gap_at(10**9) == 1e-6
    assert 1 - EctConfig(q=64.0).gap_at(0) * (1 + 8 / (1 + math.e)) == pytest.approx(0.950758, abs=1e-6)


def test_after_a_mid_training(teacher: Precond, tmp_path: Path) -> None:
    """A second stage of another objective: its weights, sampled in two steps; a resumed run needs its images alone."""
    first = CmtConfig(**{**{n: v for n, v in SETTINGS.items() if n != "q_kimg"}, "max_steps": 1, "points": 4})
    Distiller(first, teacher, world=ALONE).run(tmp_path / "cmt")
    line = ["--teacher", str(equivalence.make_teacher(tmp_path)), "--init", str(tmp_path / "cmt"), "--scale", "small"]
    line += ["--max-steps", "2", "--batch", "8", "--real-data", "own", "--out", str(tmp_path / "ect"), "--zero", "0"]
    given = parse_given(line, default=distill_ect.RECIPE.base, prog="", description="")
    with pytest.raises(
        ValueError, match=r"^real-data own is for recipes that have images themselves, and this one has"
    ):
        distill_ect.RECIPE.plan(given)
    config = EctConfig(**{**SETTINGS, "max_steps": 2, "sigmas": (80.0, 0.821), "q": 4096.0, "log_every": 1})
    net = Distiller(config, teacher, real=real_images(), world=ALONE).run(tmp_path / "run")
    drawn = sample_model(tmp_path / "run" / "generator", torch.device("cpu"), heun_steps=5, seed=4)
    assert drawn.nfe == 2 and drawn.facts.objective == "ect" and drawn.sigmas == (80.0, 0.821)
    again = Distiller(replace(config, max_steps=3), teacher, real=real_images(), world=ALONE).run(tmp_path / "run")
    assert not torch.equal(next(again.parameters()), next(net.parameters()))


def test_images_that_overflow_do_not_count(teacher: Precond) -> None:
    """At D = 0.02 many draws leave float32; the others train."""
    net = EDMPrecond(replace(teacher.config, D=0.02))
    net.load_state_dict(teacher.state_dict())
    config = EctConfig(**{**SETTINGS, "batch": 128, "pairs": "euler"})
    run = Distiller(config, net.requires_grad_(False), real=real_images(), world=ALONE)
    measured = run.iteration(0)
    bad = float(measured.bad["generator"])
    assert 0 < bad < 128 and bad + float(measured.counts["generator_loss"]) == 128
    assert all(p.isfinite().all() for _, p in run.networks["generator"].full("weight"))


def test_a_large_D_is_the_diffusion_case(teacher: Precond) -> None:
    losses = []
    for D in (1e7, math.inf):
        net = EDMPrecond(replace(teacher.config, D=D))
        net.load_state_dict(teacher.state_dict())
        run = Distiller(EctConfig(**SETTINGS), net.requires_grad_(False), real=real_images(), world=ALONE)
        losses.append(float(run.iteration(0).sums["generator_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] != losses[1]


@pytest.mark.parametrize(("pairs", "passes"), [("data", 4), ("euler", 5), ("heun", 6)])
def test_passes_are_counted(teacher: Precond, pairs: Any, passes: int) -> None:
    objective = EctConfig(max_steps=1, pairs=pairs).completed(teacher.config).objective(teacher.config)
    assert {objective.forwards(phased=phased, checkpointed=False) for phased in (False, True)} == {passes}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "rk"}, "pairs must be data, euler or heun, got 'rk'"),
        ({"q": 1.0}, r"q must lie in \(1, 1e\+06\], got 1.0"),
        ({"q_kimg": -1.0}, "q-kimg must be a finite number >= 0, got -1.0"),
        ({"t_mean": math.inf}, r"t-mean must be a number in \[-100, 100\], got inf"),
        ({"t_std": 0.0}, "t-std must be a finite number > 0, got 0.0"),
        ({"huber": -1.0}, "huber must be a finite number >= 0, got -1.0"),
        ({"sigmas": (90.0,)}, "sigmas must lie between sigma-min and sigma-max, 0.002 and 80, got 90"),
        ({"real_xflip": 1}, "real-xflip must be True or False, got 1"),
        ({"augment": 0.1}, "augment must be 0, .* got 0.1"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        EctConfig(**settings)


def test_images_are_asked_for(teacher: Precond, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^consistency tuning needs real images, and none were given$"):
        Distiller(EctConfig(**SETTINGS), teacher, world=ALONE)
    line = ["--teacher", str(equivalence.make_teacher(tmp_path)), "--scale", "small"]
    given = parse_given(line, default=distill_ect.RECIPE.base, prog="", description="")
    with pytest.raises(BadInput, match=r"^consistency tuning needs the real images: give --real-data$"):
        distill_ect.RECIPE.plan(given)


def test_recipes_have_the_settings_of_the_scripts() -> None:
    def planned(recipe: DistilRecipe, *line: str) -> EctConfig:
        given = parse_given([*line, "--dry-run"], default=recipe.base, prog="", description="")
        config = recipe.plan(given).config
        assert isinstance(config, EctConfig)
        return config

    for config in (planned(cifar_ect.RECIPE), planned(distill_ect.RECIPE, "--scale", "full")):
        assert (config.batch, config.lr, config.lr_schedule, config.dropout) == (128, 1e-4, "constant", 0.2)
        assert (config.total_steps, config.q, config.q_kimg) == (400_000, 2.0, 3200.0)
        assert config.ema_decay(1000) == pytest.approx(0.9999, abs=1e-9)
    assert planned(distill_ect.RECIPE, "--scale", "small").batch == 64
    second = cifar_ect.RECIPE.varied({"init": Path("runs/cmt")}, cifar_ect.RECIPE.plan(
        parse_given(["--dry-run"], default=cifar_ect.RECIPE.base, prog="", description="")).network)  # fmt: skip
    assert (second.q, second.q_kimg, second.lr_schedule, second.kimg) == (4096.0, 0.0, "linear", 12_800)

    def beside(config: EctConfig, *sigmas: float) -> str:
        settings = replace(config, sigmas=sigmas).to_json()
        return str(EctConfig.figure("CIFAR-10", settings, presets.get("cifar10-ddpmpp")))

    first, after = planned(cifar_ect.RECIPE), "; a second stage after consistency mid-training there)"
    assert (beside(first), beside(first, 80.0, 0.821)) == ("FID 3.6 (locuslab/ect)", "FID 2.11 (locuslab/ect)")
    assert beside(first, 80.0, 0.5) == "FID 2.11 (locuslab/ect; noise levels 80, 0.821 there, 80, 0.5 here)"
    assert beside(second.distillation()) == "FID 2.74 (sony/cmt" + after
    assert beside(second.distillation(), 80.0, 0.7757) == "FID 1.97 (sony/cmt" + after
    assert beside(replace(first, pairs="euler")) == beside(replace(first, q=3.0)) == "None"
