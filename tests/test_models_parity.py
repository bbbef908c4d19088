"""The networks against outputs recorded from EDM's own code, and the names under which checkpoints hold them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ipfm.models import EDMPrecond, load_teacher, presets

FIXTURES = Path(__file__).parent / "fixtures"
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_float32(name, backend):
    net, data = load_teacher(FIXTURES / name), recorded(name)
    net.attention_backend = backend
    d = net(data["x"], data["sigma"], augment_labels=data.get("augment_labels"))
    assert worst(d, data["D"]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_float64(name, backend):
    net, data = load_teacher(FIXTURES / name).double(), recorded(name)
    net.attention_backend = backend
    augment = data.get("augment_labels")
    assert worst(net(data["x"], data["sigma"], augment_labels=augment), data["D_f64"]) <= 1e-12
    scalar = data["sigma_scalar"]
    for sigma in (scalar, scalar.reshape(1), scalar.expand(6), float(scalar)):
        assert worst(net(data["x"], sigma, augment_labels=augment), data["D_sigma_scalar_f64"]) <= 1e-12
    if "D_no_augment_f64" in data:
        assert worst(net(data["x"], data["sigma"]), data["D_no_augment_f64"]) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_raw_network_output(name):
    net, data = load_teacher(FIXTURES / name).double(), recorded(name)
    x, sigma = data["x"].double(), data["sigma"].double()
    c_in = 1 / (0.25 + sigma**2).sqrt()
    augment = data["augment_labels"].double() if "augment_labels" in data else None
    raw = net.model(c_in[:, None, None, None] * x, sigma.log() / 4, augment_labels=augment)
    # F is larger than D at these noise levels; 1e-12 is absolute all the same.
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


BLOCK = ("norm0.weight", "norm0.bias", "conv0.weight", "conv0.bias", "affine.weight", "affine.bias")
BLOCK_END = ("norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias")
SKIP = ("skip.weight", "skip.bias")
ATTENTION = ("norm2.weight", "norm2.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias")


def block_names(prefix: str, *, skip: bool = False, resample: bool = False, attention: bool = False) -> list[str]:
    names = list(BLOCK)
    if resample:
        names.insert(4, "conv0.resample_filter")
    names += BLOCK_END
    if skip or resample:
        names += SKIP
    if resample:
        names.append("skip.resample_filter")
    if attention:
        names += ATTENTION
    return [f"model.{prefix}.{name}" for name in names]


def cifar10_ncsnpp_names() -> list[str]:
    """The names of the conditional CIFAR-10 NCSN++ checkpoints, in the order of the files."""
    names = [
        "model.map_noise.freqs",
        "model.map_label.weight",
        "model.map_label.bias",
        "model.map_augment.weight",
        "model.map_layer0.weight",
        "model.map_layer0.bias",
        "model.map_layer1.weight",
        "model.map_layer1.bias",
        "model.enc.32x32_conv.weight",
        "model.enc.32x32_conv.bias",
    ]
    for side in (32, 16, 8):
        at = f"enc.{side}x{side}"
        if side < 32:
            names += block_names(f"{at}_down", resample=True)
            names += [f"model.{at}_aux_residual.{part}" for part in ("weight", "bias", "resample_filter")]
        for index in range(4):
            names += block_names(f"{at}_block{index}", skip=side == 32 and index == 0, attention=side == 16)
    for side in (8, 16, 32):
        at = f"dec.{side}x{side}"
        if side == 8:
            names += block_names(f"{at}_in0", attention=True) + block_names(f"{at}_in1")
        else:
            names += block_names(f"{at}_up", resample=True)
        for index in range(5):
            names += block_names(f"{at}_block{index}", skip=True, attention=side == 16 and index == 4)
    for part in ("norm", "conv"):
        names += [f"model.dec.32x32_aux_{part}.weight", f"model.dec.32x32_aux_{part}.bias"]
    return names


def test_state_dict_names_order_and_shapes_of_cifar10_ncsnpp():
    with torch.device("meta"):
        net = EDMPrecond(presets.get("cifar10-ncsnpp-cond"))
    state = net.state_dict()
    expected = cifar10_ncsnpp_names()
    assert list(state) == expected
    assert len(expected) == 434
    buffers = [name for name in expected if name.endswith(("freqs", "resample_filter"))]
    assert [name for name, _ in net.named_parameters()] == [name for name in expected if name not in buffers]
    shapes = {
        "map_noise.freqs": (128,),
        "map_label.weight": (256, 10),
        "map_augment.weight": (256, 9),
        "map_layer0.weight": (512, 256),
        "enc.32x32_conv.weight": (128, 3, 3, 3),
        "enc.32x32_block0.conv0.weight": (256, 128, 3, 3),
        "enc.32x32_block0.affine.weight": (256, 512),
        "enc.32x32_block0.skip.weight": (256, 128, 1, 1),
        "enc.16x16_down.conv0.resample_filter": (1, 1, 4, 4),
        "enc.16x16_aux_residual.weight": (256, 3, 3, 3),
        "enc.8x8_aux_residual.weight": (256, 256, 3, 3),
        "enc.16x16_block0.qkv.weight": (768, 256, 1, 1),
        "dec.8x8_block0.norm0.weight": (512,),
        "dec.32x32_block4.norm0.weight": (384,),
        "dec.32x32_aux_conv.weight": (3, 256, 3, 3),
    }
    assert {name: tuple(state[f"model.{name}"].shape) for name in shapes} == shapes


def test_decoder_widths_at_64():
    with torch.device("meta"):
        net = EDMPrecond(presets.get("ffhq64-ddpmpp"))
    widths = {name: block.in_channels for name, block in net.model.dec.named_children() if hasattr(block, "conv0")}
    assert {widths[f"{r}x{r}_block{i}"] for r in (8, 16) for i in range(5)} == {512}
    assert [widths[f"32x32_block{i}"] for i in range(5)] == [512, 512, 512, 512, 384]
    assert [widths[f"64x64_block{i}"] for i in range(5)] == [384, 256, 256, 256, 256]
    assert widths["64x64_up"] == 256


@pytest.mark.parametrize(
    ("name", "changes", "parameters", "buffers", "tensors"),
    [
        ("cifar10-ddpmpp", {}, 55_733_891, 32, 425),
        ("cifar10-ddpmpp", {"augment_dim": 0}, 55_732_739, 32, 424),
        ("cifar10-ddpmpp-cond", {}, 55_735_299, 32, 427),
        ("cifar10-ncsnpp", {}, 56_397_827, 288, 432),
        ("cifar10-ncsnpp-cond", {}, 56_400_643, 288, 434),
        ("ffhq64-ddpmpp", {}, 61_805_571, 48, 553),
        ("afhqv2-64-ddpmpp", {}, 61_805_571, 48, 553),
        ("ffhq64-ncsnpp", {}, 62_761_091, 368, 563),
        ("afhqv2-64-ncsnpp", {}, 62_761_091, 368, 563),
    ],
)
def test_parameter_counts_of_the_published_networks(name, changes, parameters, buffers, tensors):
    with torch.device("meta"):
        net = EDMPrecond(replace(presets.get(name), **changes))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(b.numel() for b in net.buffers()) == buffers
    assert len(net.state_dict()) == tensors


def test_preset_training_facts():
    assert presets.get("ffhq64-ddpmpp").dropout == 0.05
    assert presets.get("afhqv2-64-ncsnpp").dropout == 0.25
    assert presets.get("cifar10-ncsnpp").dropout == 0.13
    assert presets.get("digits", D=128).D == 128
    digits = EDMPrecond(presets.get("digits"))
    assert (digits.img_channels, digits.img_resolution, digits.D) == (1, 8, float("inf"))
    with pytest.raises(ValueError, match=r"'cifar' is unknown; possible: cifar10-ddpmpp, .*digits"):
        presets.get("cifar")
