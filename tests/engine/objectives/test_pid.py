"""Physics informed distillation against a plain loop by autograd, and its differences against known trajectories."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ipfm.engine import Distiller, NoiseLevels
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.lpips_weights import shapes
from ipfm.engine.objectives.pid import PidConfig, PidStream, stencil
from ipfm.engine.random_streams import draw_labels, seed_dropout
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.engine.sampling.trajectory import trajectory
from ipfm.kernels import perturb, philox
from ipfm.models import EDMPrecond, NetworkConfig, Precond, presets, read_config
from ipfm.models.facts import GeneratorFacts

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.0, D=64.0, label_dim=3,
)  # fmt: skip
BASE = PidConfig(batch=8, max_steps=3, points=12, lr=1e-3, eps=1e-4, zero=0, ema_kimg=0.02, backward="joint")


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    net = EDMPrecond(NETWORK)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return net.eval().requires_grad_(False)


def plain_loop(teacher: Precond, config: PidConfig, steps: int) -> tuple[list[float], dict[str, Tensor], Precond]:
    """The method as the paper writes it: autograd through both points of the trajectory, torch's RAdam."""
    G = copy.deepcopy(teacher).requires_grad_(True).train()
    for module in G.modules():
        if hasattr(module, "dropout"):
            module.dropout = config.dropout
    average = {name: p.detach().clone() for name, p in G.named_parameters()}
    radam = torch.optim.RAdam(G.parameters(), lr=config.lr, betas=(config.beta1, 0.999), eps=config.eps)
    grid, index = config.noise.karras(config.points)[:-1], torch.arange(config.batch)
    losses = []
    for step in range(steps):
        at = {"seed": config.seed, "step": step}
        labels = draw_labels(teacher.label_dim, index, stream=PidStream.LABEL, **at)
        zeros, start = torch.zeros(config.batch, 3, 8, 8), torch.full((config.batch,), 80.0)
        z = perturb(zeros, start, teacher.D, stream=PidStream.LATENT, sample_index=index, **at)
        u = philox.uniform(index, 1, stream=PidStream.LEVEL, **at)[:, 0].double()
        i = (u * (config.points - 1)).long().clamp(max=config.points - 2)
        t, s = grid[i], grid[i + 1]

        def point(level: Tensor, step: int = step, z: Tensor = z, labels: Tensor | None = labels) -> Tensor:
            seed_dropout(config.seed, PidStream.DROPOUT, step, 0)
            return trajectory(G, z.double(), level, sigma_max=80.0, sigma_data=0.5, class_labels=labels,
                              input_dtype=torch.float32)  # fmt: skip

        x, following = point(t), point(s)
        slope = (x - following) / (t - s).view(-1, 1, 1, 1)
        t_here = t
        if config.difference == "central":
            x, t = (x + following) / 2, (t + s) / 2
        # Dropout acts in what is trained: the teacher is asked about the trajectory of the network without it.
        G.eval()
        with torch.no_grad():
            asked = point(t) if config.difference == "first" else (point(t_here) + point(s)) / 2
        G.train()
        target = teacher(asked.float(), t.float(), labels)
        loss = (x - t.view(-1, 1, 1, 1) * slope - target).square().sum((1, 2, 3)).mean()
        radam.zero_grad()
        loss.backward()
        radam.step()
        losses.append(loss.item())
        decay = config.ema_decay(step)
        for name, p in G.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
    return losses, average, G


@pytest.mark.parametrize("difference", ["first", "central"])
def test_against_autograd(teacher: Precond, difference: str) -> None:
    """Joint, phased, accumulated, with dropout: the losses, weights and averages of the plain loop."""
    config = replace(BASE, difference=difference)
    forms = [
        (config, {"backward": "joint"}), (config, {"backward": "phased"}),
        (config, {"backward": "phased", "micro_batch": 2}), (replace(config, dropout=0.2), {"backward": "joint"}),
        (replace(config, dropout=0.2), {"backward": "phased"}),
    ]  # fmt: skip
    for settings, form in forms:
        losses, average, net = plain_loop(teacher, settings, 3)
        run = Distiller(replace(settings, **form), teacher, world=ALONE)
        measured = [run.iteration(step) for step in range(3)]
        got = [float(m.sums["generator_loss"] / m.counts["generator_loss"]) for m in measured]
        assert got == pytest.approx(losses, rel=1e-4)
        weights = dict(run.generator.full("weight"))
        moved = max(
            float((p - q).detach().abs().max()) for p, q in zip(net.parameters(), teacher.parameters(), strict=True)
        )
        for name, p in net.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=2e-3 * moved, msg=name)
        for name, p in run.generator.full("ema"):
            torch.testing.assert_close(p, average[name], rtol=0, atol=2e-3 * moved, msg=name)


@pytest.mark.parametrize(("difference", "order"), [("first", 1), ("central", 2)])
def test_order_of_the_differences(difference: str, order: int) -> None:
    """Gaussian data have known trajectories, z sqrt((t^2 + s^2) / (T^2 + s^2)): the residual falls as N^-order."""
    s, T = 0.5, 80.0

    def residuals(points: int) -> Tensor:
        grid = NoiseLevels().karras(points)[:-1]
        index = torch.arange(points - 1)
        at = stencil(grid, index, difference)  # type: ignore[arg-type]

        def exact(t: Tensor) -> Tensor:
            return ((t**2 + s**2) / (T**2 + s**2)).sqrt()

        def inner(t: Tensor) -> Tensor:
            """F of z = 1 where c_out is not zero."""
            out = (T - t) / T
            return torch.where(out > 0, (exact(t) - t / T) / out.clamp(min=1e-9), 0.0)

        here, there = inner(grid[index]), inner(grid[index + 1])
        p_z, p_here, p_there = (p.double() for p in at.point)
        x, level = p_z + p_here * here + p_there * there, at.level.double()
        denoised = x * s**2 / (s**2 + level**2)
        return ((at.a.double() * here + at.b.double() * there - denoised) / exact(level)).abs()

    coarse, fine = residuals(101).max(), residuals(401).max()
    assert float(coarse / fine) == pytest.approx(4**order, rel=0.15)
    assert 1e-5 < float(fine) < float(coarse) < 0.3


def test_run_and_sample(teacher: Precond, tmp_path: Path) -> None:
    """A run's generator is drawn from as it says, in one evaluation, and can be continued."""
    run = Distiller(replace(BASE, log_every=1), teacher, world=ALONE)
    net = run.run(tmp_path / "run")
    drawn = sample_model(tmp_path / "run" / "generator", torch.device("cpu"), heun_steps=5, seed=4)
    assert drawn.nfe == 1 and drawn.facts == read_config(tmp_path / "run" / "generator").facts
    assert isinstance(drawn.facts, GeneratorFacts) and drawn.facts.parametrisation == "trajectory"
    assert torch.equal(drawn.draw(2, 3), run.objective.sample(net, 2, 3, seed=4))
    again = Distiller(replace(BASE, log_every=1, max_steps=4), teacher, world=ALONE).run(tmp_path / "run")
    assert not torch.equal(next(again.parameters()), next(net.parameters()))


def test_samples_that_overflow_do_not_count(teacher: Precond) -> None:
    """At D = 0.02 many latents leave float32; the others train."""
    net = EDMPrecond(replace(NETWORK, D=0.02))
    net.load_state_dict(teacher.state_dict())
    run = Distiller(replace(BASE, batch=64), net.requires_grad_(False), world=ALONE)
    measured = run.iteration(0)
    assert 0 < float(measured.bad["generator"]) < 64
    assert float(measured.bad["generator"]) + float(measured.counts["generator_loss"]) == 64
    assert all(p.isfinite().all() for _, p in run.generator.full("weight"))


def test_lpips_as_the_distance(teacher: Precond, tmp_path: Path) -> None:
    """Weights are asked for before anything begins; a step descends the distance, and the plan knows its memory."""
    config = replace(BASE, distance="lpips", lpips=tmp_path / "lpips.safetensors", lpips_side=16, batch=2)
    with pytest.raises(ValueError, match="lpips"):
        Distiller(config, teacher, world=ALONE)
    torch.manual_seed(1)
    fans = {name: math.prod(size[1:]) for name, size in shapes().items()}
    save_file({n: torch.randn(s) * (2 / max(1, fans[n])) ** 0.5 for n, s in shapes().items()}, config.lpips)
    with pytest.raises(ValueError, match=r"needs images of at least 16x16, .* give --lpips-side 32"):
        Distiller(replace(config, lpips_side=None), teacher, world=ALONE)
    run = Distiller(config, teacher, world=ALONE)
    measured = run.iteration(0)
    assert float(measured.bad["generator"]) == 0 and float(measured.sums["generator_loss"]) > 0
    plain = Distiller(replace(config, distance="l2", lpips=None, lpips_side=None), teacher, world=ALONE)
    assert run.memory_plan().working > plain.memory_plan().working + 4 * 14_700_000  # VGG-16


def test_published_figures() -> None:
    config = PidConfig(D=math.inf, distance="l2")
    assert {D: str(r) for D, r in config.published("CIFAR-10").items()} == {
        math.inf: "FID 5.85 (Tee et al., Physics Informed Distillation)"
    }
    for other in (replace(config, points=35), replace(config, width=0.5), replace(config, difference="central")):
        assert other.published("cifar10") == {}
    small = replace(config, distance="lpips", width=0.5, lpips_side=224)
    assert [r.fid for r in small.published("cifar10").values()] == [8.29]


def test_a_published_figure_stands_with_what_the_paper_did_otherwise() -> None:
    """Images resized before VGG, clipped gradients, fp16, the teacher's network."""
    config = PidConfig(distance="lpips", precision="bf16")

    def differs(dataset: str, preset: str, **settings) -> tuple[str, ...]:
        figure = config.figure(dataset, replace(config, **settings).to_json(), presets.get(preset))
        assert figure is not None
        return figure.differs

    assert differs("cifar10", "cifar10-ddpmpp") == ("side before VGG 244 there, as it is here",)
    assert differs("cifar10", "cifar10-ddpmpp", lpips_side=224) == differs("cifar10", "cifar10-ddpmpp", lpips_side=244)
    assert differs("cifar10", "cifar10-ncsnpp", lpips_side=244) == ("ddpm++ there, ncsn++ here",)
    imagenet = ("imagenet64-cond", "imagenet64-adm")
    assert differs(*imagenet, lpips_side=244) == ("precision fp16 there, bf16 here", "gradient clipping there")
    assert differs(*imagenet, lpips_side=244, precision="fp16", clip_grad=1.0) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 1}, "points must be an integer >= 2, got 1"),
        ({"difference": "second"}, "difference must be first or central, got 'second'"),
        ({"distance": "l1"}, "distance must be l2 or lpips, got 'l1'"),
        ({"lpips_side": 32}, "lpips and lpips-side are settings of --distance lpips, got distance l2"),
        ({"lpips_side": 8, "distance": "lpips"}, "lpips-side must be an integer >= 16, got 8"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), got 1.0"),
        ({"augment": 0.1}, "augment must be 0, .* got 0.1"),
    ],
)
def test_refusals(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        PidConfig(**settings)


def test_other_preconditionings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^a trajectory needs a teacher with EDM's preconditioning .* got VPPrecond; IPFM and SiD"
    ):
        BASE.completed(replace(NETWORK, precond="VPPrecond", D=math.inf, sigma_min=None, sigma_max=None))
