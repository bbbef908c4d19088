"""The trajectory parametrisation against its formula, its boundary, and the images that are made with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ipfm.engine.evaluation.subject import open_subject
from ipfm.engine.sampling.samplers import draw_prior, trajectory_sample
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.engine.sampling.trajectory import trajectory
from ipfm.models import EDMPrecond, VEPrecond, save_model

SMALL = {
    "img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1,
    "attn_resolutions": (), "dropout": 0.0,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> EDMPrecond:
    torch.manual_seed(0)
    net = EDMPrecond(label_dim=3, D=128.0, **SMALL)
    with torch.no_grad():  # as built, its last layers are nearly zero
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def latents(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return 80 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Affine:
    """F = weight * input + t, called as a network's raw output is; notes what it is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = torch.tensor(0.75, dtype=dtype, requires_grad=True)
        self.given: list[torch.dtype] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, augment: None, *, raw: bool) -> Tensor:
        assert raw and augment is None and class_labels is not None
        self.given.append(x.dtype)
        return self.weight * x + sigma.to(x.dtype).view(-1, 1, 1, 1)


def test_the_formula_and_its_gradient():
    """x = t/T z + (T - t)/T F(z / sqrt(sigma_data^2 + T^2), t), at one t a sample, in Python's floats."""
    z, levels, T, sigma_data = latents(3, torch.float64), [60.0, 1.0, 0.002], 60.0, 0.4
    net = Affine(torch.float64)
    z.requires_grad_()
    t = torch.tensor(levels, dtype=torch.float64)
    x = trajectory(net, z, t, sigma_max=T, sigma_data=sigma_data, class_labels=torch.eye(3))
    assert x.dtype == torch.float64 and net.given == [torch.float64]
    c_in = 1 / math.sqrt(sigma_data**2 + T**2)
    for x_i, z_i, t_i in zip(x, z, levels, strict=True):
        torch.testing.assert_close(x_i, t_i / T * z_i + (T - t_i) / T * (0.75 * c_in * z_i + t_i), rtol=1e-13, atol=0)
    x.sum().backward()
    in_weight = sum((T - t_i) / T * c_in * z_i.sum() for z_i, t_i in zip(z.detach(), levels, strict=True))
    torch.testing.assert_close(net.weight.grad, in_weight)
    in_z = torch.tensor([t_i / T + (T - t_i) / T * 0.75 * c_in for t_i in levels], dtype=torch.float64)
    torch.testing.assert_close(z.grad, in_z.view(-1, 1, 1, 1).expand_as(z))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_precision(half):
    """The network is given its own dtype; what is around it is float32."""
    net, z, t = Affine(half), latents(2), torch.tensor([0.002, 5.0])
    x = trajectory(net, z, t, sigma_max=80.0, sigma_data=0.5, input_dtype=half, class_labels=torch.eye(2))
    assert x.dtype == torch.float32 and net.given == [half]
    exact = Affine(torch.float64)
    wide = trajectory(exact, z.double(), t.double(), sigma_max=80.0, sigma_data=0.5, class_labels=torch.eye(2))
    # A few roundings of F, whose size is some 10.
    assert 0 < (x - wide).abs().max() < 10 * 3 * torch.finfo(half).eps
    with pytest.raises(ValueError, match=r"^z must be \(B, C, H, W\) and t \(B,\), got \(2, 1, 8, 8\) and \(3,\)$"):
        trajectory(net, z, torch.ones(3), sigma_max=80.0, sigma_data=0.5)


@pytest.mark.parametrize("sigma_max", [80.0, 79.9, 1 / 3])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_boundary_is_exact(network, sigma_max, compute):
    """x_theta(z, T) = z, bit for bit, beside samples at other levels."""
    z, t = latents(), torch.tensor([sigma_max, sigma_max / 2, sigma_max, 0.002])
    network.compute_dtype = compute
    with torch.no_grad():
        x = trajectory(network, z, t, sigma_max=sigma_max, sigma_data=0.5, input_dtype=network.input_dtype)
    network.compute_dtype = None
    assert torch.equal(x[[0, 2]], z[[0, 2]])
    assert not torch.isclose(x[[1, 3]], z[[1, 3]], rtol=0.1).all(dim=(1, 2, 3)).any()


def test_every_parameter_gets_a_gradient(network):
    net = EDMPrecond(network.config)
    net.load_state_dict(network.state_dict())
    x = trajectory(net, latents(), torch.full((4,), 0.5), sigma_max=80.0, sigma_data=0.5, class_labels=torch.eye(4, 3))
    x.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in net.parameters())


@pytest.mark.parametrize("D", [128.0, math.inf])
def test_an_image_is_the_end_of_its_trajectory(network, D):
    """z from the prior of D at T, one evaluation at t = sigma_min; whatever the batch, also from a list of seeds."""
    calls = []
    handle = network.register_forward_pre_hook(lambda _module, inputs: calls.append(inputs[1]))
    labels = torch.eye(3)
    images = trajectory_sample(network, 3, D=D, sigma_max=60.0, sigma_min=0.01, seed=5, class_labels=labels)
    handle.remove()
    assert len(calls) == 1 and calls[0].tolist() == [0.01] * 3
    assert images.dtype == torch.float32 and not images.requires_grad
    z = draw_prior(network, torch.arange(3), 60.0, D, seed=5)
    with torch.no_grad():
        F = network(z / math.sqrt(0.25 + 3600), torch.tensor(0.01), labels, None, raw=True)
    torch.testing.assert_close(images, 0.01 / 60 * z + 59.99 / 60 * F, rtol=1e-4, atol=1e-5)

    def one(seed: int, first: int) -> Tensor:
        return trajectory_sample(network, 1, D=D, seed=seed, first_index=first)

    whole = trajectory_sample(network, 3, D=D, seed=5, first_index=1)
    torch.testing.assert_close(whole, torch.cat([one(5, i) for i in (1, 2, 3)]), rtol=1e-4, atol=1e-5)
    seeds = trajectory_sample(network, 3, D=D, seed=[9, 5, 2])
    torch.testing.assert_close(seeds, torch.cat([one(s, 0) for s in (9, 5, 2)]), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        trajectory_sample(network, 3, D=D, seed=0, latents=draw_prior(network, torch.arange(3), 80.0, D, seed=5)),
        trajectory_sample(network, 3, D=D, seed=5),
    )
    assert trajectory_sample(network, 0, D=D, seed=5).shape == (0, 1, 8, 8)


def test_refusals(network):
    with pytest.raises(ValueError, match=r"^a trajectory needs .* \(EDMPrecond\), got VEPrecond$"):
        trajectory_sample(VEPrecond(**SMALL), 1, D=1.0, seed=0)
    with pytest.raises(ValueError, match=r"^sigma_min must be below sigma_max, got 90.0 and 80.0$"):
        trajectory_sample(network, 1, D=1.0, sigma_min=90.0, seed=0)
    with pytest.raises(ValueError, match=r"^latents must have shape \(2, 1, 8, 8\), got \(1, 1, 8, 8\)$"):
        trajectory_sample(network, 2, D=1.0, seed=0, latents=torch.zeros(1, 1, 8, 8))


FACTS = {"task": "generator", "parametrisation": "trajectory", "sigma_max": 70.0, "sigma_min": 0.004}


def test_a_stored_generator_says_that_it_is_one(network, tmp_path: Path):
    """It is sampled at its own D and ends, with classes that are drawn or given; `ipfm evaluate` knows its NFE."""
    save_model(network, tmp_path / "g", extra=FACTS)
    model = sample_model(tmp_path / "g", CPU, heun_steps=18, seed=3, classes=(2, 0))
    assert model.nfe == 1 and model.network.D == 128.0
    labels, ends = torch.eye(3)[[2, 0, 2, 0]], {"sigma_max": 70.0, "sigma_min": 0.004}
    expected = trajectory_sample(network, 4, D=128.0, seed=3, class_labels=labels, **ends)
    assert torch.equal(model.draw(0, 4), expected)
    torch.testing.assert_close(model.draw(1, 2), expected[1:3], rtol=1e-4, atol=1e-5)
    subject = open_subject(tmp_path / "g", CPU, heun_steps=18, seed=3)
    assert (subject.kind, subject.nfe, subject.D, subject.paper) == ("generator", 1, 128.0, None)
    assert subject.draw(0, 2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parametrisation": "flow"}, "parametrisation 'flow' is unknown; possible: trajectory, or none"),
        ({"sigma_min": 80.0}, "holds no usable noise levels of a generator: sigma_min must be below sigma_max"),
        ({"sigma_max": "high"}, "holds no usable noise levels of a generator: sigma_max must be a finite number > 0"),
        ({"sigma_max": None}, "holds no usable noise levels of a generator: sigma_max must be a finite number > 0"),
    ],
)
def test_a_stored_generator_that_cannot_be_sampled(network, tmp_path: Path, change, message):
    save_model(network, tmp_path / "g", extra=FACTS | change)
    with pytest.raises(ValueError, match=message):
        sample_model(tmp_path / "g", CPU, heun_steps=18, seed=0)


def test_facts_that_are_missing_or_do_not_fit_the_network(network, tmp_path: Path):
    save_model(network, tmp_path / "g", extra={k: v for k, v in FACTS.items() if k != "sigma_max"})
    with pytest.raises(ValueError, match=r"config.json holds no usable noise levels of a generator: no 'sigma_max'$"):
        sample_model(tmp_path / "g", CPU, heun_steps=18, seed=0)
    save_model(VEPrecond(**SMALL), tmp_path / "ve", extra=FACTS)
    with pytest.raises(ValueError, match=r"^a trajectory needs .* got VEPrecond$"):
        sample_model(tmp_path / "ve", CPU, heun_steps=18, seed=0)
