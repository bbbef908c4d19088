"""Consistency mid-training against a plain loop by autograd, and its solver against known trajectories."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import compared_cases
import edm2_fixtures
import equivalence
import pytest
import stand_ins
import torch
from plain_generator import PlainGenerator

from ipfm.engine import Distiller
from ipfm.engine.commands.bench.equivalence import trained_tensors
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments import DistilRecipe
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
from ipfm.engine.memory.state import Sharding
from ipfm.engine.objectives import check_objective
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.cmt import CmtConfig, CmtStream, _trajectories, solved_together, solver
from ipfm.engine.objectives.dmd import DmdConfig
from ipfm.engine.random_streams import draw_labels, seed_dropout
from ipfm.engine.runtime.commandline import parse_given
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.engine.training import resolve
from ipfm.kernels import perturb
from ipfm.models import EDMPrecond, Precond, build_network, load_teacher, save_model
from ipfm.recipes import cifar_cmt, distill_cmt, distill_dmd

ALONE = World(0, 1, torch.device("cpu"))
# Two trajectories of four points: two processes, or micro-batches of 2, have parts of one.
SETTINGS: dict[str, Any] = {
    "batch": 8, "max_steps": 3, "points": 4, "lr": 1e-3, "eps": 1e-2, "ema_kimg": 0.05, "seed": 3,
    "activation_checkpointing": "off", "zero": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    return equivalence.compared_teacher().eval().requires_grad_(False)


def plain_loop(teacher: Precond, config: CmtConfig, steps: int) -> PlainGenerator:
    """The method in plain PyTorch: trajectories by the textbook's steps, torch's RAdam."""
    plain = PlainGenerator(teacher, config)
    G = plain.net
    grid = torch.linspace(math.log(80), math.log(0.002), config.points, dtype=torch.float64).exp()
    h, count = math.log(80 / 0.002) / (config.points - 1), config.batch // config.points
    c = 0.06 * math.sqrt(math.prod(teacher.config.image_shape) / 12288) if config.huber is None else config.huber
    for step in range(steps):
        at = {"seed": config.seed, "step": step}
        index = torch.arange(count)
        labels = draw_labels(teacher.label_dim, index, stream=CmtStream.LABEL, **at)
        zeros = torch.zeros(count, *teacher.config.image_shape)
        x = perturb(zeros, torch.full((count,), 80.0), teacher.D, stream=CmtStream.LATENT, sample_index=index, **at)
        points, slopes = [x], []
        for sigma in grid[:-1]:
            slopes.append(teacher(x, torch.full((count,), float(sigma)), labels))
            # e^-h x + the integral of e^-(h-u) times the polynomial through the last predictions, by Simpson's rule.
            u = torch.linspace(0, h, 201, dtype=torch.float64)
            weight = torch.exp(u - h) * torch.tensor([1, *[4, 2] * 99, 4, 1]) * h / 600
            known = min(len(slopes), config.order)
            x = math.exp(-h) * x
            for j in range(known):
                others = [k for k in range(known) if k != j]
                lagrange = math.prod([(u + k * h) / ((k - j) * h) for k in others], start=torch.ones_like(u))
                x = x + float((weight * lagrange).sum()) * slopes[-1 - j]
            points.append(x)
        # Point i of trajectory j is image j N + i.
        x = torch.stack(points, 1).flatten(0, 1)
        target = points[-1].repeat_interleave(config.points, 0)
        level = grid.float().repeat(count)
        seed_dropout(config.seed, CmtStream.DROPOUT, step, 0)
        y = G(x, level, None if labels is None else labels.repeat_interleave(config.points, 0))
        square = (y - target).square().sum((1, 2, 3))
        loss = (square if c == 0 else (square + c**2).sqrt() - c).mean()
        plain.update(loss, step, lr=config.lr * (1 - (1 - config.lr_end) * step / config.total_steps))
    return plain


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"order": 2, "huber": 0.0, "micro_batch": 2},
        {"order": 1, "lr_end": 1.0, "micro_batch": 4, "backward": "phased"},
        {"dropout": 0.2},
    ],
)
def test_equals_the_plain_loop(teacher: Precond, more: dict[str, Any]) -> None:
    """Orders of the solver, losses, micro-batches that part a trajectory, dropout."""
    config = CmtConfig(**{**SETTINGS, **more})
    run = Distiller(config, teacher, world=ALONE)
    measured = [run.iteration(step) for step in range(3)]
    losses = torch.stack([m.sums["generator_loss"] / m.counts["generator_loss"] for m in measured])
    plain_loop(teacher, config, 3).check(trained_tensors(run), losses)


@pytest.mark.distributed
def test_equals_the_plain_loop_on_two_processes(tmp_path: Path) -> None:
    """Every ZeRO stage; with 8 points the one trajectory belongs to both processes."""
    small, base = compared_cases.make_small_teacher(tmp_path), {**SETTINGS, "objective": "cmt"}
    cases = {f"z{stage}": {**base, "zero": stage, "micro_batch": (4, 2)[stage % 2]} for stage in (0, 1, 2, 3)}
    cases["shared"] = {**base, "zero": 1, "points": 8}
    net = load_teacher(small)
    expected = {points: plain_loop(net, CmtConfig(**{**SETTINGS, "points": points}), 2) for points in (4, 8)}
    found = equivalence.run(small, tmp_path, 2, cases, 2, whole=compared_cases.WHOLE)
    for name, tensors in found.items():
        expected[8 if name == "shared" else 4].check(tensors, tensors["loss/generator_loss"])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_the_solver(order: int) -> None:
    """Gaussian data have known trajectories, x sqrt((s^2 + t^2) / (s^2 + T^2)) at every D: errors fall as h^order."""
    s, T, t = 0.5, 80.0, 0.02

    def error(steps: int) -> float:
        ratio = (t / T) ** (1 / steps)
        x, predicted = 1.0, []
        for i, advance in enumerate(solver(ratio, steps, order)):
            predicted = [x * s**2 / (s**2 + (T * ratio**i) ** 2), *predicted]
            x = advance.kept * x + sum(w * p for w, p in zip(advance.weights, predicted, strict=False))
        return abs(x - math.sqrt((s**2 + t**2) / (s**2 + T**2)))

    found = math.log2(error(100) / error(200))
    assert order - 0.1 <= found <= order + 1 and (order == 3 or found <= order + 0.1)


def test_run_and_sample(teacher: Precond, tmp_path: Path) -> None:
    """A run's generator is drawn from in one evaluation from the prior, or several, and the run can be continued."""
    config = CmtConfig(**{**SETTINGS, "log_every": 1, "max_steps": 1, "sigmas": (80.0, 0.821)})
    net = Distiller(config, teacher, world=ALONE).run(tmp_path / "run")
    drawn = sample_model(tmp_path / "run" / "generator", torch.device("cpu"), heun_steps=5, seed=4)
    assert drawn.nfe == 2 and drawn.facts.objective == "cmt" and drawn.sigmas == (80.0, 0.821)
    assert CmtConfig.nfe_of(config.to_json()) == 2 and CmtConfig.nfe_of({}) == 1
    again = Distiller(replace(config, max_steps=2), teacher, world=ALONE).run(tmp_path / "run")
    assert not torch.equal(next(again.parameters()), next(net.parameters()))


def test_trajectories_that_overflow_do_not_count(teacher: Precond) -> None:
    """At D = 0.02 many latents leave float32; the others train."""
    net = EDMPrecond(replace(teacher.config, D=0.02))
    net.load_state_dict(teacher.state_dict())
    run = Distiller(CmtConfig(**{**SETTINGS, "batch": 128}), net.requires_grad_(False), world=ALONE)
    measured = run.iteration(0)
    bad = float(measured.bad["generator"])
    assert 0 < bad < 128 and bad + float(measured.counts["generator_loss"]) == 128
    assert all(p.isfinite().all() for _, p in run.networks["generator"].full("weight"))


def test_a_large_D_is_the_diffusion_case(teacher: Precond) -> None:
    losses = []
    for D in (1e7, math.inf):
        net = EDMPrecond(replace(teacher.config, D=D))
        net.load_state_dict(teacher.state_dict())
        run = Distiller(CmtConfig(**SETTINGS), net.requires_grad_(False), world=ALONE)
        losses.append(float(run.iteration(0).sums["generator_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0] != losses[1]


def edm2() -> Precond:
    torch.manual_seed(0)
    return build_network(replace(edm2_fixtures.SMALL, dropout=0.0, D=16.0)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [CmtConfig, DmdConfig])
def test_networks_of_edm2_in_16_bits_follow_those_in_32(
    kind: type[Distillation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first losses agree, no sample is lost, and every step is taken."""
    monkeypatch.setattr(resolve, "fp16_supported", lambda device: True)
    more: dict[str, Any] = {"points": 4} if kind is CmtConfig else {"student_updates": 2, "logvar": True}
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        config = kind(batch=8, max_steps=2, lr=1e-3, zero=0, precision=precision, micro_batch=4, **more)
        run = Distiller(config, edm2(), world=ALONE)
        measured = [run.iteration(step) for step in range(2)]
        assert all(float(bad) == 0 for one in measured for bad in one.bad.values()), precision
        losses[precision] = {n: float(measured[0].sums[n] / measured[0].counts[n]) for n in measured[0].sums}
    for precision in ("bf16", "fp16"):
        # The first loss of denoiser matching is the square of what rounding makes of a student that is the teacher.
        wanted = {name: loss for name, loss in losses["fp32"].items() if kind is CmtConfig or name == "student_loss"}
        found = {name: losses[precision][name] for name in wanted}
        assert wanted == pytest.approx(found, rel=0.03)


def test_lpips_of_its_images(teacher: Precond, tmp_path: Path) -> None:
    """By networks of EDM2 too; micro-batches change nothing, and the plan knows what VGG takes."""
    config = CmtConfig(batch=4, max_steps=1, points=2, distance="lpips", lpips=tmp_path / "vgg.pth", lpips_side=16)
    with pytest.raises(ValueError, match="lpips"):
        config.completed(teacher.config)
    torch.save(stand_ins.lpips_weights(), config.lpips)
    check_objective(replace(config, micro_batch=2), edm2())
    run = Distiller(replace(config, zero=0), teacher, world=ALONE)
    measured = run.iteration(0)
    assert float(measured.bad["generator"]) == 0 and float(measured.sums["generator_loss"]) > 0
    plain = Distiller(replace(config, zero=0, distance="l2", lpips=None, lpips_side=None), teacher, world=ALONE)
    assert run.memory_plan().working > plain.memory_plan().working + 4 * 14_700_000  # VGG-16


def test_the_teacher_has_about_as_many_images_at_a_time_as_the_generator(teacher: Precond) -> None:
    """Trajectories of N - 1 steps are solved together, a step of the solver in each; a resumed run has the same."""
    seen: list[int] = []
    net = copy.deepcopy(teacher)
    net.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    run = Distiller(CmtConfig(**{**SETTINGS, "lr": 1e-30}), net, world=ALONE)
    measured = [run.iteration(step) for step in range(5)]
    # The first block whole, and of the second one what is a step's; then 6 of 8 images in each.
    assert seen == [6] * 4 + [6] * 4
    for step in (4, 1, 2):
        again = Distiller(CmtConfig(**{**SETTINGS, "lr": 1e-30}), net, world=ALONE) if step == 4 else run
        assert torch.equal(again.iteration(step).sums["generator_loss"], measured[step].sums["generator_loss"])
    assert [solved_together(CmtConfig(), n) for n in (1, 8, 9, 64, 100, 128, 500)] == [
        (15, 2), (15, 2), (15, 2), (2, 2), (2, 2), (1, 1), (1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("batch", "points", "ranks"), [(24, 8, 4), (48, 16, 2), (8, 4, 2), (128, 16, 8)])
def test_every_process_solves_as_many_trajectories(batch: int, points: int, ranks: int) -> None:
    """Those of its images are among them; a sharded teacher is asked by all alike."""
    config, local = CmtConfig(batch=batch, points=points), batch // ranks
    found = [_trajectories(config, ranks, rank) for rank in range(ranks)]
    assert len({count for _, count in found}) == 1
    for rank, (first, count) in enumerate(found):
        assert 0 <= first <= rank * local // points and first + count <= batch // points
        assert (rank + 1) * local <= (first + count) * points


def test_the_points_of_a_processs_images_are_in_the_memory_plan(teacher: Precond) -> None:
    """All of its trajectories lie in memory at once, however few images are trained on at a time."""
    network, image = teacher.config, 4 * math.prod(teacher.config.image_shape)
    # Two blocks of three steps, predictions of the last three, and labels.
    trajectory = 3 * (2 * 4 + 3) * image + 3 * 2 * 4 * network.label_dim
    peaks = {}
    for batch, ranks in ((8, 1), (64, 1), (64, 2)):
        config = replace(CmtConfig(**SETTINGS), batch=batch, precision="fp32").completed(network)
        found = simulate_distillation(StepSettings(network, 4, Sharding(ranks), config=config))
        peaks[batch, ranks] = found
    for phase, least in peaks[8, 1].items():
        assert peaks[64, 1][phase] - least == 14 * trajectory and peaks[64, 2][phase] - least == 6 * trajectory
    for batch, points in ((24, 8), (512, 2)):
        config = CmtConfig(**{**SETTINGS, "batch": batch, "points": points, "micro_batch": 8, "backward": "joint"})
        steps: Any = Distiller(config, teacher, world=ALONE).steps
        held = (steps._points, steps._predicted, steps._conditions)
        assert sum(one.nbytes for one in held) == config.held_bytes(network, batch)
    # Two trajectories each, where a process's images lie in two of them at most, though fewer would fill one.
    small = CmtConfig(points=8, batch=24)
    assert small.held_bytes(network, 12) == small.held_bytes(network, 6) == 2 * small.held_bytes(network, 8)
    # Of any number of points, by a simulation that is of few.
    for points, order in ((2, 1), (16, 3), (64, 3)):
        settings = replace(CmtConfig(**SETTINGS), batch=64, precision="fp32").completed(network)
        other = replace(settings, points=points, order=order)
        one, two = (StepSettings(network, 4, Sharding(), config=c) for c in (settings, other))
        assert one.config == two.config
        more = other.held_bytes(network, 64) - settings.held_bytes(network, 64)
        found = simulate_distillation(two)
        assert found == {phase: peak + more for phase, peak in simulate_distillation(one).items()}


def test_a_teacher_of_edm2_takes_the_settings_of_the_script(tmp_path: Path) -> None:
    network = replace(edm2_fixtures.SMALL, img_resolution=64, attn_resolutions=(), D=128.0)
    save_model(build_network(network), tmp_path / "edm2")
    for module, batch in ((distill_cmt, 128), (distill_dmd, 2048)):
        line = ["--teacher", str(tmp_path / "edm2"), "--scale", "full", "--dry-run"]
        config = module.RECIPE.plan(parse_given(line, default=module.RECIPE.base, prog="", description="")).config
        assert config.batch == batch and config.kind == ("cmt" if module is distill_cmt else "dmd")
    assert (config.student_updates, config.logvar) == (5, True)  # type: ignore[attr-defined]


def test_passes_are_counted(teacher: Precond) -> None:
    """4 an image, for 7 of PID."""
    objective = CmtConfig(max_steps=1).completed(teacher.config).objective(teacher.config)
    for phased in (False, True):
        assert objective.forwards(phased=phased, checkpointed=False) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 1}, "points must be an integer >= 2, got 1"),
        ({"order": 4}, "order must be 1, 2 or 3, got 4"),
        ({"sigmas": (90.0,)}, "sigmas must lie between sigma-min and sigma-max, 0.002 and 80, got 90"),
        ({"huber": -1.0}, "huber must be a finite number >= 0, got -1.0"),
        ({"huber": 1.0, "distance": "lpips"}, "huber is a setting of --distance l2, got distance lpips"),
        ({"lpips_side": 32}, "lpips and lpips-side are settings of --distance lpips, got distance l2"),
        ({"lr_end": 2.0}, r"lr-end must lie in \[0, 1\], got 2.0"),
        ({"augment": 0.1}, "augment must be 0, .* got 0.1"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        CmtConfig(**settings)


def test_a_teacher_of_other_levels_is_refused_with_what_to_give(teacher: Precond) -> None:
    network = replace(teacher.config, sigma_min=0.02, sigma_max=100.0)
    with pytest.raises(ValueError, match=r"between 0.02 and 100, and .* 80 to 0.002: give --noise.sigma-max and"):
        CmtConfig(max_steps=1).completed(network)


def test_a_batch_holds_whole_trajectories(teacher: Precond) -> None:
    with pytest.raises(ValueError, match=r"^batch must be a multiple of points, .* got batch 40 and points 16$"):
        CmtConfig(batch=40, max_steps=1).completed(teacher.config)


def test_recipes_have_the_settings_of_the_script() -> None:
    def planned(recipe: DistilRecipe, *line: str) -> CmtConfig:
        given = parse_given([*line, "--dry-run"], default=recipe.base, prog="", description="")
        config = recipe.plan(given).config
        assert isinstance(config, CmtConfig)
        return config

    for config in (
        planned(cifar_cmt.RECIPE, "--distance", "l2"),
        planned(distill_cmt.RECIPE, "--scale", "full"),  # of a teacher of CIFAR-10's size, without --lpips
    ):
        assert (config.batch, config.lr, config.lr_end, config.dropout, config.points) == (128, 2e-4, 0.0, 0.2, 16)
        assert (config.total_steps, config.distance) == (300_000, "l2")
        assert config.ema_decay(1000) == pytest.approx(0.999, abs=1e-9)
    assert planned(distill_cmt.RECIPE, "--scale", "small").batch == 64
