"""Teachers with VP's and VE's preconditioning: noise levels, loss and gradient; trained, sampled, described."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.teacher import precond_notes
from ipfm.engine.noise_levels import NoiseLevels, training_sigmas
from ipfm.engine.objectives.losses import add_noise, bind, denoising_objective
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.kernels import philox, reference
from ipfm.models import NetworkConfig, build_network
from ipfm.recipes import cifar_teacher

CPU = torch.device("cpu")


def config(precond: Any, **changes: Any) -> NetworkConfig:
    shape = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
    return NetworkConfig(**{**shape, "attn_resolutions": (), "dropout": 0.0, "precond": precond, **changes})


def levels(network: NetworkConfig, count: int = 20_000) -> torch.Tensor:
    return training_sigmas(network, NoiseLevels(), torch.arange(count), seed=3, stream=1, step=2)


def test_noise_levels_are_those_of_the_paper() -> None:
    """Karras et al. 2022, table 1: by their distribution functions, at the ends and in between."""
    u = philox.uniform(torch.arange(20_000), 1, seed=3, stream=1, step=2)[:, 0].double()
    sigma = levels(config("VPPrecond")).double()
    # Its inverse is uniform: t of sigma, by the formula of the paper.
    t = ((0.1**2 + 2 * 19.9 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9
    torch.testing.assert_close(t, 1e-5 + (1 - 1e-5) * u, rtol=1e-5, atol=1e-6)
    assert 152.167 > sigma.max() > 150 and sigma.min() < 0.02
    sigma = levels(config("VEPrecond")).double()
    torch.testing.assert_close((sigma / 0.02).log() / math.log(100 / 0.02), u, rtol=1e-5, atol=1e-5)
    narrow = levels(config("VEPrecond", sigma_min=0.1, sigma_max=10.0))
    assert 0.1 <= narrow.min() < 0.101 and 9.9 < narrow.max() <= 10
    noise = NoiseLevels(p_mean=-0.5)
    edm = training_sigmas(config("EDMPrecond"), noise, torch.arange(9), seed=3, stream=1, step=2)
    assert torch.equal(edm, noise.denoising(torch.arange(9), seed=3, stream=1, step=2))


@pytest.mark.parametrize("D", [math.inf, 128.0])
@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond"])
def test_loss_and_gradient_are_autograd_of_the_formula(precond: str, D: float) -> None:
    """1/sigma^2 ||D(y + n; sigma) - y||^2 in float64, D written out."""
    torch.manual_seed(0)
    net = build_network(config(precond, D=D)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    y, index = torch.randn(4, 1, 8, 8, dtype=torch.float64) / 2, torch.arange(4)
    sigma = levels(net.config, 4).double()
    position = {"seed": 1, "stream": 5, "step": 6, "sample_index": index}
    noisy = add_noise(y, sigma, D, net, **position)
    result = denoising_objective(bind(net, None), y, noisy, sigma_data=math.inf)
    result.surrogate.backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    net.zero_grad()
    column = sigma.view(-1, 1, 1, 1)
    x = y + reference.perturb(torch.zeros_like(y), sigma, D, **position)
    if precond == "VPPrecond":
        t = ((0.1**2 + 2 * 19.9 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9
        denoised = x - column * net.model(x / (column**2 + 1).sqrt(), 999 * t, None, None)
    else:
        denoised = x + column * net.model(x, (sigma / 2).log(), None, None)
    loss = ((denoised - y) / column).square().sum((1, 2, 3))
    loss.sum().backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=0)
    assert len(got) > 10
    for name, p in net.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-7 * float(p.grad.abs().max()), msg=name)


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond"])
def test_a_few_steps_then_samples_in_the_networks_own_range(precond: str) -> None:
    settings = TeacherConfig(
        batch=64, max_steps=12, lr=2e-3, lr_rampup_kimg=0, eval_every=0, heun_steps=3, zero=0, precision="fp32"
    )
    training = TeacherTraining(settings, config(precond), digits(), world=World(0, 1, CPU))
    losses = [float(training.iteration(step).sums["teacher_loss"]) / 64 for step in range(12)]
    # A network of zeros has n/sigma for its error: 1 an element, as at the start.
    assert losses[0] == pytest.approx(64, rel=0.15) and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    training.refresh()
    asked: list[float] = []
    training.average.register_forward_pre_hook(lambda _, arguments: asked.append(float(arguments[1].max())))
    assert training.sample(0, 2, seed=0).isfinite().all()
    assert max(asked) == pytest.approx(80.0) and min(asked) == pytest.approx(max(0.002, training.average.sigma_min))


def test_the_recipe_trains_describes_and_names_it() -> None:
    small = ["--model-channels", "8", "--channel-mult", "1", "--num-blocks", "0", "--attention", "0"]
    recipe = cifar_teacher.RECIPE

    def planned(*more: str) -> Any:
        return recipe.plan(parse_given([*small, *more, "--dry-run"], default=recipe.defaults, prog="x", description=""))

    vp = planned("--precond", "vp")
    assert (vp.network.precond, vp.network.D, vp.network.sigma_min) == ("VPPrecond", math.inf, 0.0009765625)
    assert vp.path.name == "cifar-teacher-ncsnpp-vp-Dinf"
    ve = planned("--precond", "ve", "--D", "128")
    assert (ve.network.precond, ve.network.D, ve.network.sigma_max) == ("VEPrecond", 128.0, 100.0)
    text = "\n".join(precond_notes(ve.network))
    assert "loss weight of VE (EDM, arXiv 2206.00364, table 1)" in text and "this project's extension" in text
    assert planned().network.precond == "EDMPrecond" and planned().network.D == 2048
    assert not precond_notes(planned().network)
    for option, message in (
        (["--precond", "iddpm"], "iDDPM networks are not trained here, as their loss has a part for variances"),
        (["--precond", "ddim"], "--precond must be edm, vp or ve, got 'ddim'"),
        (
            ["--precond", "vp", "--noise.p-mean", "-1"],
            "p-mean was given, but the noise levels of VPPrecond are its own",
        ),
        (["--precond", "vp", "--continue-from", "x.pt"], "--precond was given, but continue-from says"),
    ):
        with pytest.raises(BadInput) as caught:
            cifar_teacher.main([*option, "--dry-run"])
        assert message in str(caught.value) and "\n" not in str(caught.value)
