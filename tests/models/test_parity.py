"""The networks against outputs recorded from EDM's own code."""

from pathlib import Path

import naive_unet
import numpy as np
import pytest
import torch
from torch import Tensor

from ipfm.models import Precond, load_teacher

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("edm_ddpmpp_uncond", "edm_ncsnpp_uncond")
BACKENDS = ("auto", "sdpa", "math")


def recorded(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max())


def test_the_recorded_arrays_are_the_ones_tested():
    common = {"x", "sigma", "D", "D_f64", "F_f64", "sigma_scalar", "D_sigma_scalar_f64"}
    assert set(recorded("edm_ddpmpp_uncond")) == common
    assert set(recorded("edm_ncsnpp_uncond")) == common | {"augment_labels", "D_no_augment_f64"}


def raw_output(net: Precond, data: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """F at c_in·x and c_noise, which are computed here."""
    x, sigma = data["x"].to(dtype), data["sigma"].to(dtype)
    c_in = 1 / (0.25 + sigma**2).sqrt()
    augment = data["augment_labels"].to(dtype) if "augment_labels" in data else None
    return net.model(c_in[:, None, None, None] * x, sigma.log() / 4, augment_labels=augment)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_recorded_outputs(name, dtype, most, backend):
    """Absolute errors, also of F, which is larger than D."""
    net, data = load_teacher(FIXTURES / name).to(dtype), recorded(name)
    net.attention_backend = backend
    x, sigma, augment = data["x"], data["sigma"], data.get("augment_labels")
    d = net(x, sigma, augment_labels=augment)
    assert d.dtype == dtype
    assert worst(d.double(), data["D_f64"]) <= most
    if dtype == torch.float32:
        assert worst(d, data["D"]) <= most
    one = data["sigma_scalar"]
    for given in (one, one.reshape(1), one.expand(6), float(one)):
        assert worst(net(x, given, augment_labels=augment).double(), data["D_sigma_scalar_f64"]) <= most
    if "D_no_augment_f64" in data:
        assert worst(net(x, sigma).double(), data["D_no_augment_f64"]) <= most
        nothing = torch.zeros_like(data["augment_labels"])
        assert worst(net(x, sigma, augment_labels=nothing).double(), data["D_no_augment_f64"]) <= most
    assert worst(raw_output(net, data, dtype).double(), data["F_f64"]) <= most


NAIVE = {"edm_ddpmpp_uncond": naive_unet.Song(8), "edm_ncsnpp_uncond": naive_unet.Song(16, (1, 3, 3, 1), fourier=True)}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_written_out_network_is_the_recorded_one(name):
    """What other tests compare with is itself held to EDM's own code."""
    net, data = load_teacher(FIXTURES / name), recorded(name)
    x, sigma = data["x"].double(), data["sigma"].double()
    x = x / (0.25 + sigma**2).sqrt()[:, None, None, None]
    augment = data["augment_labels"].double() if "augment_labels" in data else None
    raw = naive_unet.song_unet(net.model.state_dict(), NAIVE[name], x, sigma.log() / 4, augment_labels=augment)
    assert worst(raw, data["F_f64"]) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_input_through_the_frozen_teacher(name):
    """d(Σ g·D)/dx against central differences in float64: what distillation takes from a teacher."""
    net, data = load_teacher(FIXTURES / name).double(), recorded(name)
    x, sigma = data["x"][2:4].double().requires_grad_(), data["sigma"][2:4]
    generator = torch.Generator().manual_seed(0)
    g, direction = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    (grad,) = torch.autograd.grad(net(x, sigma), x, g)
    with torch.no_grad():
        step = 1e-5
        slope = ((net(x + step * direction, sigma) - net(x - step * direction, sigma)) * g).sum() / (2 * step)
    assert torch.allclose((grad * direction).sum(), slope, rtol=1e-7)
