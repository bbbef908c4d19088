"""The four preconditioners: their scalings in an independent spelling, noise levels, dtypes, storage."""

import copy
import math

import numpy as np
import pytest
import torch
from random_values import rand, randomise
from torch import Tensor

from ipfm.models import (
    EDMPrecond,
    NetworkConfig,
    Precond,
    VEPrecond,
    VPPrecond,
    build_network,
    iDDPMPrecond,
    load_model,
    save_model,
)
from ipfm.models.schedules import iddpm_levels, vp_sigma_range

CLASSES = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond, "iDDPMPrecond": iDDPMPrecond}
UNETS = ("SongUNet", "DhariwalUNet")
SMALL = {"img_resolution": 8, "img_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
SIGMA = torch.tensor([0.003, 0.05, 1.3, 40.0], dtype=torch.float64)


def build(precond: str, **changes) -> Precond:
    net = build_network(NetworkConfig(precond=precond, **{**SMALL, "label_dim": 3, **changes}))
    randomise(net)
    return net.eval()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return rand(4, 2, 8, 8, seed=1).to(dtype)


def levels(M: int, C_1: float, C_2: float) -> list[float]:
    """u in float64, by its recursion."""
    u = [0.0]
    for j in range(M, 0, -1):
        before, now = (math.sin(math.pi / 2 * k / (M * (C_2 + 1))) ** 2 for k in (j - 1, j))
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(before / now, C_1) - 1))
    return u[::-1]


def expected_coefficients(config: NetworkConfig, s: float) -> tuple[float, float, float, float]:
    """Table 1 of Karras et al. (2022): c_skip, c_out, c_in, c_noise."""
    if config.precond == "EDMPrecond":
        d = config.sigma_data
        return d**2 / (s**2 + d**2), s * d / math.hypot(s, d), 1 / math.hypot(s, d), math.log(s) / 4
    if config.precond == "VEPrecond":
        return 1, s, 1, math.log(s / 2)
    c_in = 1 / math.sqrt(s**2 + 1)
    if config.precond == "VPPrecond":
        b, a = config.beta_d, config.beta_min
        # By bisection of σ(t), which t(σ) inverts.
        low, high = 0.0, 10.0
        for _ in range(200):
            t = (low + high) / 2
            if math.expm1(b * t**2 / 2 + a * t) < s**2:
                low = t
            else:
                high = t
        return 1, -s, c_in, (config.M - 1) * low
    u = iddpm_levels(config.M, config.C_1, config.C_2).tolist()
    nearest = min(range(len(u)), key=lambda j: abs(u[j] - s))
    return 1, -s, c_in, config.M - 1 - nearest


OPTIONS = [
    ("EDMPrecond", {"sigma_data": 0.7}),
    ("VPPrecond", {}),
    ("VPPrecond", {"beta_d": 3.0, "beta_min": 0.4, "M": 20, "epsilon_t": 0.01}),
    ("VEPrecond", {}),
    ("iDDPMPrecond", {}),
    ("iDDPMPrecond", {"M": 50, "C_1": 0.1, "C_2": 0.2}),
]


@pytest.mark.parametrize("model_type", UNETS)
@pytest.mark.parametrize(("precond", "options"), OPTIONS)
@torch.no_grad()
def test_scalings(precond, options, model_type):
    """D = c_skip·x + c_out·F(c_in·x; c_noise); of more channels than the image has, only the first are used."""
    net = build(precond, model_type=model_type, **options).double()
    assert type(net) is CLASSES[precond] and type(net.model).__name__ == model_type
    labels = torch.eye(3)[[0, 1, 2, 0]].double()
    d = net(images(), SIGMA, labels)
    for i, s in enumerate(SIGMA.tolist()):
        c_skip, c_out, c_in, c_noise = expected_coefficients(net.config, s)
        found = [float(c) for c in net.coefficients(SIGMA[i])]
        assert found == pytest.approx([c_skip, c_out, c_in, c_noise], rel=1e-11)
        x = images()[i : i + 1]
        raw = net.model(c_in * x, torch.tensor([c_noise], dtype=torch.float64), labels[i : i + 1])
        assert raw.shape[1] == (4 if precond == "iDDPMPrecond" else 2)
        torch.testing.assert_close(d[i : i + 1], c_skip * x + c_out * raw[:, :2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("precond", "options"), OPTIONS)
def test_scalings_in_float32(precond, options):
    """c_noise of VP is a small difference of large numbers at low noise: it is computed without losing digits."""
    net = build(precond, **options)
    for exact, single in zip(net.coefficients(SIGMA), net.coefficients(SIGMA.float()), strict=True):
        assert single.dtype == torch.float32 and single.shape == (4,)
        torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=0)


def test_noise_levels_of_the_classes():
    ranges = {name: (net.sigma_min, net.sigma_max) for name in CLASSES if (net := build(name))}
    assert ranges["EDMPrecond"] == (0, math.inf)
    assert ranges["VEPrecond"] == (0.02, 100)
    assert ranges["VPPrecond"] == (0.0009765625, 152.16697692871094)
    # A unit in the last place of sin, which differs between machines, moves u_0 by a millionth.
    assert ranges["iDDPMPrecond"] == pytest.approx((0.006422337144613266, 20291.169921875), rel=3e-6)
    limited = build("VEPrecond", sigma_min=0.01, sigma_max=50)
    assert (limited.sigma_min, limited.sigma_max) == (0.01, 50)
    other = build("VPPrecond", beta_d=3.0, beta_min=0.4, epsilon_t=0.01)
    t = np.array([0.01, 1])
    assert (other.sigma_min, other.sigma_max) == pytest.approx(np.sqrt(np.expm1(1.5 * t**2 + 0.4 * t)), rel=1e-4)
    assert vp_sigma_range(3.0, 0.4, 0.01) == (other.sigma_min, other.sigma_max)


@pytest.mark.parametrize("options", [(1000, 0.001, 0.008), (50, 0.1, 0.2), (2, 0.001, 0.0)])
def test_iddpm_levels(options):
    """Against float64; float32 loses most near the end, where the square root is of a difference of near equals."""
    u = iddpm_levels(*options)
    assert u.dtype == np.float32 and len(u) == options[0] + 1 and u[-1] == 0
    assert (np.diff(u) < 0).all()
    assert u == pytest.approx(np.array(levels(*options)), rel=2e-3)
    net = iDDPMPrecond(**SMALL, M=options[0], C_1=options[1], C_2=options[2])
    assert np.array_equal(net.u.numpy(), u) and net.u.dtype == torch.float32
    assert (net.sigma_min, net.sigma_max) == (float(u[-2]), float(u[0]))


def test_rounding_to_a_noise_level():
    net = build("iDDPMPrecond", M=50)
    u = net.u.double()
    for dtype in (torch.float64, torch.float32):
        for shape in ((), (1,), (4,), (2, 3)):
            given = (5 * rand(*shape, seed=3).abs() + 0.02).to(dtype)
            got = net.round_sigma(given)
            assert got.dtype == dtype and got.shape == shape
            best = (given.double().reshape(-1, 1) - u).abs().amin(1).reshape(shape)
            torch.testing.assert_close((got.double() - given.double()).abs(), best, rtol=0, atol=1e-12)
            assert torch.equal(net.round_sigma(got), got)
    assert float(net.round_sigma(0.0)) == 0 and float(net.round_sigma(1_000_000)) == float(u[0])
    assert net.round_sigma(1).dtype == torch.float32
    for name in ("EDMPrecond", "VPPrecond", "VEPrecond"):
        other = build(name)
        assert other.round_sigma(SIGMA) is SIGMA and float(other.round_sigma(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_the_levels_of_iddpm_survive_casts(cast):
    net = build("iDDPMPrecond")
    before = net.u.clone()
    net.to(cast)
    assert net.u.dtype == torch.float32 and torch.equal(net.u, before)
    assert all(p.dtype == cast for p in net.parameters())
    assert net.to("meta").u.device.type == "meta"


def test_the_levels_of_iddpm_are_the_first_tensor_of_its_state():
    net = build("iDDPMPrecond")
    assert next(iter(net.state_dict())) == "u" and "u" not in dict(net.named_parameters())
    assert all(name == "u" or name.startswith("model.") for name in net.state_dict())
    for name in ("EDMPrecond", "VPPrecond", "VEPrecond"):
        assert all(key.startswith("model.") for key in build(name).state_dict())
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="other noise levels than M, C_1 and C_2"):
        net.load_state_dict({**state, "u": state["u"] * 1.1})
    with pytest.raises(RuntimeError, match="size mismatch for u"):
        net.load_state_dict({**state, "u": state["u"][1:]})
    # What another machine's arithmetic made of the same options is taken over.
    near = state["u"] * (1 + 1e-5)
    net.load_state_dict({**state, "u": near})
    assert torch.equal(net.u, near)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("precond", CLASSES)
@torch.no_grad()
def test_half_precision_compute(precond, dtype, most):
    """The error is that of F: the rest, c_noise above all, is float32."""
    net, x, s = build(precond), images(torch.float32), SIGMA.float()
    seen: list[torch.dtype] = []
    net.model.map_noise.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    exact = net(x, s)
    net.compute_dtype = dtype
    got = net(x, s)
    assert got.dtype == torch.float32 and seen == [torch.float32, torch.float32]
    c_skip, _, _, _ = net.coefficients(s.reshape(-1, 1, 1, 1))
    size = (exact - c_skip * x).square().mean((1, 2, 3)).sqrt()
    error = (got - exact).square().mean((1, 2, 3)).sqrt()
    # At the lowest noise D - x rounds to float32 multiples of x's last place.
    assert (error < most * size + 1e-6).all() and (error > most * size / 1000).all()


@pytest.mark.parametrize("precond", CLASSES)
@torch.no_grad()
def test_labels_and_sigma_shapes(precond):
    net, x = build(precond, model_type="DhariwalUNet", augment_dim=4).double(), images()
    nothing = net(x, SIGMA)
    torch.testing.assert_close(net(x, SIGMA, torch.zeros(4, 3), torch.zeros(4, 4)), nothing, rtol=0, atol=1e-12)
    assert not torch.allclose(net(x, SIGMA, torch.ones(4, 3)), nothing)
    assert not torch.allclose(net(x, SIGMA, None, torch.ones(4, 4)), nothing)
    one = net(x, torch.full((4,), 1.3, dtype=torch.float64))
    for sigma in (1.3, torch.tensor(1.3, dtype=torch.float64), torch.tensor([1.3], dtype=torch.float64)):
        torch.testing.assert_close(net(x, sigma), one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precond", CLASSES)
@torch.no_grad()
def test_sigma_and_labels_as_other_programs_give_them(precond):
    """Any shape that has a level for each image or one for all, any dtype; the same for labels."""
    net, x, labels = build(precond), images(torch.float32), torch.eye(3)[[0, 1, 2, 0]]
    expected = net(x, SIGMA.float(), labels)
    for shape in ((4,), (4, 1, 1, 1), (1, 4), (4, 1), (2, 2)):
        for dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(net(x, SIGMA.reshape(shape).to(dtype), labels), expected, rtol=0, atol=0)
    two = net(x, torch.full((4,), 2.0), labels)
    whole = (2, 2.0, np.float64(2), np.int64(2), torch.tensor(2), torch.tensor([[[2]]], dtype=torch.uint8))
    for level in (*whole, torch.tensor(2.0, dtype=torch.bfloat16), torch.full((4, 1, 1, 1), 2, dtype=torch.int16)):
        torch.testing.assert_close(net(x, level, labels), two, rtol=0, atol=1e-6)
    for given in (labels.long(), labels.bool(), labels.double(), labels.reshape(4, 1, 3)):
        assert torch.equal(net(x, SIGMA, given), expected)
    torch.testing.assert_close(net(x, SIGMA, labels[1]), net(x, SIGMA, labels[[1] * 4]), rtol=0, atol=1e-6)
    # One image at several levels; F in the dtype of the network, whatever that of the image is.
    torch.testing.assert_close(net(x[:1], SIGMA, labels), net(x[[0] * 4], SIGMA, labels), rtol=0, atol=1e-6)
    one = torch.ones(2, 2, 8, 8, dtype=torch.uint8)
    assert torch.equal(net(one, 1), net(one.double(), 1.0)) and net(one, 1).dtype == torch.float32
    double = copy.deepcopy(net).double()
    assert double(x, SIGMA.reshape(4, 1, 1, 1), labels.long()).dtype == torch.float64
    torch.testing.assert_close(double(x, SIGMA.reshape(4, 1), labels).float(), expected, rtol=1e-3, atol=1e-3)
    on_meta = copy.deepcopy(net).to("meta")(x.to("meta"), SIGMA.reshape(4, 1, 1, 1).to("meta"), labels.to("meta"))
    assert on_meta.shape == expected.shape


@torch.no_grad()
def test_levels_of_every_shape_compile_without_a_break():
    net = build("EDMPrecond", img_resolution=4, channel_mult=(1,))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x, labels = images(torch.float32)[:, :, :4, :4], torch.eye(3)[[0, 1, 2, 0]].long()
    for sigma in (SIGMA.reshape(4, 1, 1, 1), 2):
        assert torch.equal(compiled(x, sigma, labels), net(x, sigma, labels))


@pytest.mark.parametrize("model_type", UNETS)
@pytest.mark.parametrize("precond", CLASSES)
def test_storage(precond, model_type, tmp_path):
    net = build(precond, model_type=model_type)
    save_model(net, tmp_path / "net")
    back = load_model(tmp_path / "net")
    assert type(back) is type(net) and type(back.model) is type(net.model) and back.config == net.config
    assert list(back.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        assert torch.equal(back(images(torch.float32), SIGMA), net(images(torch.float32), SIGMA))
    config = (tmp_path / "net" / "config.json").read_text()
    other = "VEPrecond" if precond == "VPPrecond" else "VPPrecond"
    (tmp_path / "net" / "config.json").write_text(config.replace(f'"class": "{precond}"', f'"class": "{other}"'))
    with pytest.raises(ValueError, match=f"config.json: class is {other}, but the network describes {precond}"):
        load_model(tmp_path / "net")


def test_ways_to_construct():
    for name, cls in CLASSES.items():
        net = cls(**SMALL, D=64, dropout=0.2)
        assert net.config == NetworkConfig(**SMALL, D=64, dropout=0.2, precond=name) and net.D == 64
        assert type(build_network(net.config)) is cls and cls(net.config).config is net.config
        assert copy.deepcopy(net).config == net.config
    with pytest.raises(ValueError, match="the configuration is one of VPPrecond, it cannot build EDMPrecond"):
        EDMPrecond(NetworkConfig(**SMALL, precond="VPPrecond"))
    with pytest.raises(ValueError, match="the configuration is one of EDMPrecond, it cannot build VEPrecond"):
        VEPrecond(**SMALL, precond="EDMPrecond")
    with pytest.raises(ValueError, match="sigma_data is no option of VEPrecond"):
        VEPrecond(**SMALL, sigma_data=1.0)
    with pytest.raises(TypeError, match="abstract"):
        Precond(NetworkConfig(**SMALL))
    assert not hasattr(build("VPPrecond"), "sigma_data") and build("EDMPrecond").sigma_data == 0.5
