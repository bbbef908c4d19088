"""denoising_loss: against float64 autograd of the formula, both backends, layouts, invalid samples, errors."""

import math

import pytest
import torch

from ipfm.kernels import denoising_loss, reference

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # NumPy's, in the interpreter, about the non-finite samples that the tests feed it.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 1, 5, 7), (2, 3, 4), (1, 3, 8, 8), (4, 1), (2, 4100)]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"):
    generator = torch.Generator().manual_seed(4)
    pred, y = (v.to(device, dtype) for v in torch.randn(2, *shape, generator=generator, dtype=torch.float64))
    sigma = torch.exp(1.2 * torch.randn(shape[0], generator=generator, dtype=torch.float64) - 1.2)
    return pred, y, sigma.to(device, torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.3, math.inf])
def test_equals_autograd_of_the_formula(sigma_data, backend, device):
    pred, y, sigma = inputs((3, 2, 5, 7), device=device)
    pred.requires_grad_()
    # That of VP and VE has no part of the data.
    weight = 1 / sigma**2 if math.isinf(sigma_data) else (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    loss = weight * (pred - y).flatten(1).square().sum(1)
    (wanted,) = torch.autograd.grad(loss.sum(), pred)
    got = denoising_loss(pred, y, sigma, sigma_data=sigma_data, backend=backend)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad, wanted, rtol=1e-12, atol=0)
    assert got.valid.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_triton_is_no_worse_than_pytorch(shape, dtype, device, no_worse):
    pred, y, sigma = inputs(shape, dtype, device)
    truth = reference.denoising_loss(pred.double(), y.double(), sigma)
    plain = denoising_loss(pred, y, sigma, backend="reference")
    got = denoising_loss(pred, y, sigma, backend="triton")
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r)
    assert got.grad.dtype == dtype
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", ["channels_last", "mixed", "sliced"])
def test_memory_layouts(form, backend, device):
    pred, y, sigma = inputs((3, 2, 4, 5), torch.float32, device)
    wanted = denoising_loss(pred, y, sigma)
    if form == "sliced":
        pred, y = (torch.stack([v, v], -1).flatten(-2)[..., ::2] for v in (pred, y))
    else:
        pred = pred.to(memory_format=torch.channels_last)
        y = y if form == "mixed" else y.to(memory_format=torch.channels_last)
    got = denoising_loss(pred, y, sigma, backend=backend)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=0)
    if form != "sliced":
        assert got.grad.stride() == pred.stride()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sigma_in_another_precision(backend, device):
    pred, y, sigma = inputs((3, 6), torch.float32, device)
    got = denoising_loss(pred, y, sigma.double(), backend=backend)
    torch.testing.assert_close(got.loss, denoising_loss(pred, y, sigma).loss, rtol=1e-6, atol=0)
    assert got.loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_batch(backend, device):
    empty = torch.zeros(0, 3, 4, 4, device=device)
    got = denoising_loss(empty, empty, torch.zeros(0, device=device), backend=backend)
    assert [v.shape for v in got] == [(0,), empty.shape, (0,)]


def assert_isolated(got, clean, bad: int) -> None:
    batch = len(got.valid)
    assert got.valid.tolist() == [i != bad for i in range(batch)]
    keep = [i for i in range(batch) if i != bad]
    for name in ("loss", "grad"):
        value = getattr(got, name)
        assert torch.equal(value[bad], torch.zeros_like(value[bad])), name
        assert torch.equal(value[keep], getattr(clean, name)[keep]), name


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["pred", "y"])
@pytest.mark.parametrize(("shape", "sample", "element"), [((3, 35), 0, 0), ((3, 35), 2, 34), ((2, 4100), 1, 3000)])
def test_non_finite_sample_is_isolated(shape, sample, element, which, value, backend, device):
    tensors = inputs(shape, torch.float32, device)
    clean = denoising_loss(*tensors, backend=backend)
    tensors[which][sample, element] = value
    assert_isolated(denoising_loss(*tensors, backend=backend), clean, sample)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equal_infinities_are_not_a_zero_error(backend, device):
    pred, y, sigma = inputs((2, 35), torch.float32, device)
    clean = denoising_loss(pred, y, sigma, backend=backend)
    pred[1, 3] = y[1, 3] = math.inf
    assert_isolated(denoising_loss(pred, y, sigma, backend=backend), clean, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-30])
def test_sigma_that_is_no_noise_level_is_isolated(value, backend, device):
    pred, y, sigma = inputs((3, 35), torch.float32, device)
    clean = denoising_loss(pred, y, sigma, backend=backend)
    sigma[1] = value
    assert_isolated(denoising_loss(pred, y, sigma, backend=backend), clean, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_overflow_of_finite_inputs_is_isolated(backend, device):
    pred, y, sigma = inputs((2, 35), torch.float32, device)
    clean = denoising_loss(pred, y, sigma, backend=backend)
    pred[1, 3] = 1e30
    assert_isolated(denoising_loss(pred, y, sigma, backend=backend), clean, 1)
    pred, y, sigma = inputs((2, 35), torch.float16, device)
    sigma[1] = 0.005  # w = 4e4: a gradient that float16 does not hold
    got = denoising_loss(pred, y, sigma, backend=backend)
    assert_isolated(got, got, 1)


# -------------------------------------------------------------------------------- raw output, with preconditioning

# The dtypes of the network's output and of x and y.
PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float64, torch.float64), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16),
]  # fmt: skip
RAW = ("x", "c_skip", "c_out")


def raw_inputs(shape, raw=torch.float64, clean=torch.float64, device="cpu", numbers=None) -> dict[str, torch.Tensor]:
    """What `denoising_loss` takes: F, x and y of the size of data, EDM's coefficients."""
    _, y, sigma = inputs(shape)
    f, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    spread = (sigma**2 + 0.25).sqrt()
    x = y + sigma.view(-1, *[1] * (y.ndim - 1)) * noise
    numbers = numbers or torch.promote_types(clean, torch.float32)
    vectors = {"sigma": sigma, "c_skip": 0.25 / spread**2, "c_out": 0.5 * sigma / spread}
    return {
        "pred": f.to(device, raw),
        "y": y.to(device, clean),
        "x": x.to(device, clean),
        **{name: v.to(device, numbers) for name, v in vectors.items()},
    }


def doubled(arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.double() for name, v in arguments.items()}


def column(v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 4100)], ids=ids)
def test_raw_equals_autograd_of_the_formula(shape, backend, device):
    a = raw_inputs(shape, device=device)
    f = a["pred"].requires_grad_()
    prediction = column(a["c_skip"], f) * a["x"] + column(a["c_out"], f) * f
    weight = (a["sigma"] ** 2 + 0.25) / (a["sigma"] * 0.5) ** 2
    loss = weight * (prediction - a["y"]).flatten(1).square().sum(1)
    (wanted,) = torch.autograd.grad(loss.sum(), f)
    got = denoising_loss(**a, backend=backend)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad, wanted, rtol=1e-11, atol=1e-12)
    assert got.valid.all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sign", [-1, 1], ids=["VP", "VE"])
def test_raw_with_the_preconditioning_and_weight_of_vp_and_ve(sign, backend, device):
    a = raw_inputs((3, 2, 5, 7), device=device)
    a |= {"c_skip": torch.ones_like(a["sigma"]), "c_out": sign * a["sigma"]}
    f = a["pred"].requires_grad_()
    sigma = column(a["sigma"], f)
    loss = ((a["x"] + sign * sigma * f - a["y"]) / sigma).flatten(1).square().sum(1)
    (wanted,) = torch.autograd.grad(loss.sum(), f)
    got = denoising_loss(**a, sigma_data=math.inf, backend=backend)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad, wanted, rtol=1e-11, atol=1e-12)
    a["sigma"][1] = math.inf
    assert denoising_loss(**a, sigma_data=math.inf, backend=backend).valid.tolist() == [True, False, True]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(ids, pair)))
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_raw_triton_is_no_worse_than_pytorch(shape, pair, device, no_worse):
    a = raw_inputs(shape, *pair, device=device)
    plain = denoising_loss(**a, backend="reference")
    got = denoising_loss(**a, backend="triton")
    for g, p, r in zip(got, plain, reference.denoising_loss(**doubled(a)), strict=True):
        no_worse(g, p, r, hair=2)
    assert got.grad.dtype == pair[0]
    assert got.loss.dtype == torch.promote_types(pair[1], torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("other", ["pred", "y", "x"])
def test_raw_memory_layouts(other, backend, device):
    """All in channels_last, and one of them in another format than the rest."""
    a = raw_inputs((3, 2, 4, 5), torch.bfloat16, torch.float32, device, numbers=torch.float64)
    wanted = denoising_loss(**a, backend="reference")
    last = {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in a.items()}
    got = denoising_loss(**last, backend=backend)
    assert got.grad.stride() == last["pred"].stride()
    mixed = last | {other: torch.stack([a[other]] * 2, -1).flatten(-2)[..., ::2]}
    for result in (got, denoising_loss(**mixed, backend=backend)):
        for g, w in zip(result, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2 if g.dtype == torch.bfloat16 else 5e-6, atol=1e-6)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["pred", "y", *RAW])
@pytest.mark.parametrize("shape", [(3, 35), (2, 4100)], ids=ids)
def test_raw_non_finite_sample_is_isolated(shape, which, value, backend, device):
    a = raw_inputs(shape, torch.bfloat16, torch.float32, device)
    clean = denoising_loss(**a, backend=backend)
    a[which].view(shape[0], -1)[1, -1] = value
    assert_isolated(denoising_loss(**a, backend=backend), clean, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_raw_gradient_that_its_dtype_does_not_hold(backend, device):
    a = raw_inputs((2, 35), torch.float16, torch.float32, device)
    a["x"][1] = 1e5  # a gradient beyond 65504, in a loss that float32 holds
    got = denoising_loss(**a, backend=backend)
    assert_isolated(got, got, 1)
    wide = denoising_loss(**(a | {"pred": a["pred"].float()}), backend=backend)
    assert wide.valid.all()
    assert wide.grad[1].abs().max() > 65504


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_raw_empty_batch(backend, device):
    a = {n: v[:0] for n, v in raw_inputs((2, 3, 4, 4), torch.bfloat16, torch.float32, device).items()}
    got = denoising_loss(**a, backend=backend)
    assert [v.shape for v in got] == [(0,), (0, 3, 4, 4), (0,)]


ONES = torch.ones(2, 4)
COEFFICIENTS = {"x": ONES, "c_skip": torch.ones(2), "c_out": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.ones(2)}, r"pred must be \(B, C, H, W\) or \(B, N\) with N > 0; got \(2,\)"),
        ({"pred": ONES.long()}, "got int64"),
        ({"y": torch.ones(2, 5)}, r"y must have pred's shape \(2, 4\); got \(2, 5\)"),
        ({"y": ONES.half()}, "y must have pred's dtype torch.float32; got torch.float16"),
        ({"y": ONES.to("meta")}, "y must have pred's device cpu; got meta"),
        ({"sigma": torch.ones(3)}, r"sigma must be \(B,\) = \(2,\); got \(3,\)"),
        ({"sigma": 0.5}, "sigma must be a tensor; got float"),
        ({"sigma_data": 0}, r"sigma_data must be in \(0, inf\]; got 0"),
        ({"sigma_data": math.nan}, "got nan"),
        ({"sigma_data": 1e9}, r"sigma_data must be in \[1e-6, 1e6\], or inf; got"),
        ({"backend": None}, "auto, triton, reference; got None"),
        ({"x": ONES}, "x, c_skip and c_out go together; got x alone"),
        ({"x": ONES, "c_out": torch.ones(2)}, "x, c_skip and c_out go together; got x and c_out alone"),
        (COEFFICIENTS | {"x": torch.ones(2, 5)}, r"x must have y's shape \(2, 4\); got \(2, 5\)"),
        (COEFFICIENTS | {"x": ONES.half()}, "x must have y's dtype torch.float32; got torch.float16"),
        (COEFFICIENTS | {"c_skip": torch.ones(3)}, r"c_skip must be \(B,\) = \(2,\); got \(3,\)"),
        (COEFFICIENTS | {"c_out": 0.5}, "c_out must be a tensor; got float"),
        (
            COEFFICIENTS | {"pred": ONES.double()},
            "pred's dtype must be y's or one that it holds; got float64 beside float32",
        ),
        (
            COEFFICIENTS | {"pred": ONES.half(), "y": ONES.bfloat16(), "x": ONES.bfloat16()},
            "got float16 beside bfloat16",
        ),
        (COEFFICIENTS | {"y": ONES.int()}, "y's dtype must be one of .*; got int32"),
    ],
)
def test_errors(change, message):
    valid = {"pred": torch.ones(2, 4), "y": torch.ones(2, 4), "sigma": torch.ones(2)}
    with pytest.raises(ValueError, match=message) as caught:
        denoising_loss(**(valid | change))
    assert str(caught.value).startswith("denoising_loss: ")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(37, 3, 32, 32), (9, 3, 64, 64), (5, 3, 31, 29)], ids=ids)
def test_compiled(shape, dtype, no_worse):
    pred, y, sigma = inputs(shape, dtype, "cuda")
    sigma = sigma.clamp(min=0.05)
    pred.view(len(pred), -1)[2, 5] = math.nan
    truth = reference.denoising_loss(pred.double(), y.double(), sigma)
    plain = denoising_loss(pred, y, sigma, backend="reference")
    for g, p, r in zip(denoising_loss(pred, y, sigma), plain, truth, strict=True):
        no_worse(g, p, r)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(ids, pair)))
@pytest.mark.parametrize("shape", [(37, 3, 32, 32), (9, 3, 64, 64), (5, 3, 31, 29)], ids=ids)
def test_raw_compiled(shape, pair, no_worse):
    a = raw_inputs(shape, *pair, device="cuda")
    a["sigma"] = a["sigma"].clamp(min=0.05)
    a["x"].view(shape[0], -1)[2, 5] = math.nan
    plain = denoising_loss(**a, backend="reference")
    for g, p, r in zip(denoising_loss(**a), plain, reference.denoising_loss(**doubled(a)), strict=True):
        no_worse(g, p, r, hair=2)


@pytest.mark.gpu
def test_compiled_does_not_wait_for_the_device():
    pred, y, sigma = inputs((4, 3, 32, 32), torch.float32, "cuda")
    denoising_loss(pred, y, sigma)
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoising_loss(pred, y, sigma)
    finally:
        torch.cuda.set_sync_debug_mode("default")
