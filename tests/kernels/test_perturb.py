"""perturb: the law of the noise, its reproducibility, both backends against float64, gradients, errors.

Statistical tests have fixed seeds. Each rejects at 1e-9, and this file has fewer than 400 of them, so that a right
implementation fails the file with probability below 1e-6.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import parts
from scipy import special, stats

from ipfm.kernels import perturb, reference
from ipfm.kernels.perturbation import sample_layout

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LEVEL = 1e-9
INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 8, 8), (3, 1, 5, 7), (2, 3, 4), (2, 13), (2, 3, 3, 5), (1, 1, 40, 30)]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def noise_at(batch: int, device: torch.device | str = "cpu", **change) -> dict:
    index = torch.arange(batch, device=device) * 3 + 2**33
    return {"seed": 2**40 + 7, "stream": 3, "step": 9, "sample_index": index} | change


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return y, (torch.rand(shape[0], generator=generator) * 3 + 0.01).to(device)


def arranged(y: torch.Tensor, form: str) -> torch.Tensor:
    """The values of y in another memory layout."""
    if form == "channels_last":
        return y.to(memory_format=torch.channels_last)
    if form == "sliced":
        wide = torch.zeros(*y.shape[:-1], 2 * y.shape[-1], dtype=y.dtype, device=y.device)
        wide[..., ::2] = y
        return wide[..., ::2]
    if form == "transposed":
        return y.transpose(-1, -2).contiguous().transpose(-1, -2)
    if form == "batch inside":
        return y.movedim(0, -1).contiguous().movedim(-1, 0)
    if form == "expanded":
        return y[:1].expand(y.shape)
    return y.contiguous()


# --------------------------------------------------------------------------------------------------- both backends


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("D", [0.5, 128.0, INF])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_triton_is_no_worse_than_pytorch(shape, D, dtype, device, no_worse):
    y, sigma = inputs(shape, dtype, device)
    at = noise_at(len(y), device)
    truth = reference.perturb(y.double(), sigma, D, **at)
    got = perturb(y, sigma, D, **at, backend="triton")
    no_worse(got, perturb(y, sigma, D, **at, backend="reference"), truth)


@pytest.mark.pairs
@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("D", [2.0, INF])
def test_scaled_copy(D, dtype, out_dtype, device, no_worse):
    y, sigma = inputs((2, 3, 4, 5), dtype, device)
    c_in = 1 / (sigma**2 + 0.25).sqrt()
    at = noise_at(2, device, c_in=c_in)
    truth = reference.perturb(y.double(), sigma, D, **at)
    plain = perturb(y, sigma, D, **at, out_dtype=out_dtype, backend="reference")
    got = perturb(y, sigma, D, **at, out_dtype=out_dtype, backend="triton")
    assert got[1].dtype == (out_dtype or dtype)
    for g, p, t in zip(got, plain, truth, strict=True):
        no_worse(g, p, t)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", ["channels_last", "sliced", "transposed", "batch inside", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 3, 5), (2, 1, 4, 4)], ids=ids)
def test_noise_does_not_depend_on_the_memory_layout(shape, form, backend, device):
    y, sigma = inputs(shape, device=device)
    other = arranged(y, form)
    y = other.contiguous()
    at = noise_at(2, device, c_in=sigma)
    plain = perturb(y, sigma, 128.0, **at, backend=backend)
    got = perturb(other, sigma, 128.0, **at, backend=backend)
    for g, p in zip(got, plain, strict=True):
        torch.testing.assert_close(g, p, rtol=1e-6, atol=1e-6)
        assert g.stride() == torch.empty_like(other).stride()


def test_more_dimensions_than_the_kernel_walks(device):
    y, sigma = inputs((2, 2, 3, 2, 3, 2), device=device)
    other = y.permute(0, 5, 3, 1, 4, 2).contiguous().permute(0, 3, 5, 2, 4, 1)
    at = noise_at(2, device)
    got = perturb(other, sigma, 128.0, **at, backend="triton")
    torch.testing.assert_close(got, perturb(y, sigma, 128.0, **at, backend="reference"), rtol=1e-6, atol=1e-6)
    assert got.stride() == other.stride()


def test_layouts_that_the_kernel_is_given():
    assert sample_layout((3, 8, 8), (64, 8, 1), (64, 8, 1)) == (1, 192, [(192, 1, 1)])
    assert sample_layout((3, 8, 8), (1, 24, 3), (1, 24, 3)) == (3, 64, [(64, 3, 3)])
    assert sample_layout((3, 5, 7), (1, 21, 3), (1, 21, 3)) == (1, 105, [(3, 1, 1), (35, 3, 3)])
    assert sample_layout((3, 8, 8), (128, 16, 2), (64, 8, 1)) == (1, 192, [(192, 2, 1)])
    assert sample_layout((3, 8, 8), (256, 16, 1), (64, 8, 1)) == (3, 64, [(8, 16, 8), (8, 1, 1)])


@pytest.mark.quick
def test_many_tiles_a_program(device, monkeypatch, no_worse):
    monkeypatch.setattr("ipfm.kernels.perturbation.noise_config", lambda *_: (16, 3, 1))
    for shape in ((2, 90), (1, 3, 8, 10)):
        y, sigma = inputs(shape, device=device)
        y = arranged(y, "channels_last") if len(shape) == 4 else y
        at = noise_at(len(y), device)
        truth = reference.perturb(y.double(), sigma, 128.0, **at)
        plain = perturb(y, sigma, 128.0, **at, backend="reference")
        no_worse(perturb(y, sigma, 128.0, **at, backend="triton"), plain, truth)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(5)),
    cut=st.integers(0, 5),
    D=st.sampled_from([0.7, 64.0, INF]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_noise_does_not_depend_on_batch_and_order(order, cut, D, dtype):
    y, sigma = inputs((5, 2, 3, 5), dtype)
    at = noise_at(5)
    whole = perturb(y, sigma, D, **at)[list(order)]
    parts = []
    for part in (order[:cut], order[cut:]):
        some = list(part)
        at["sample_index"] = noise_at(5)["sample_index"][some]
        parts.append(perturb(y[some], sigma[some], D, **at))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_batch_of_one_draws_what_the_batch_draws(backend, device):
    y, sigma = inputs((3, 1, 5, 7), device=device)
    at = noise_at(3, device)
    whole = perturb(y, sigma, 1.5, **at, backend=backend)
    at["sample_index"] = at["sample_index"][1:2]
    one = perturb(y[1:2], sigma[1:2], 1.5, **at, backend=backend)
    torch.testing.assert_close(one, whole[1:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=ids)
def test_every_dtype_gets_the_same_noise(dtype):
    _, sigma = inputs((4, 3, 8, 8))
    at = noise_at(4)
    single = perturb(torch.zeros(4, 3, 8, 8), sigma, 16.0, **at)
    other = perturb(torch.zeros(4, 3, 8, 8, dtype=dtype), sigma, 16.0, **at)
    tolerance = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(other.float(), single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_batch(backend, device):
    y = torch.zeros(0, 3, 4, 4, device=device)
    at = noise_at(0, device)
    none = torch.zeros(0, device=device)
    assert perturb(y, none, 128.0, **at, backend=backend).shape == y.shape
    x, scaled = perturb(y, none, 128.0, **at, c_in=none, out_dtype=torch.bfloat16, backend=backend)
    assert (x.shape, scaled.shape, scaled.dtype) == (y.shape, y.shape, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("D", [0.001, 1e7, 1e12])
def test_extreme_dimensions(D, backend, device):
    y = torch.zeros(4, 12, device=device)
    sigma = torch.tensor([0.0, 1.0, 2.5, 80.0], device=device)
    x = perturb(y, sigma, D, **noise_at(4, device), backend=backend).cpu()
    assert not x.isnan().any()
    assert bool((x[0] == 0).all())
    if D > 1:
        gaussian = perturb(y, sigma, INF, **noise_at(4, device), backend=backend).cpu()
        torch.testing.assert_close(x, gaussian, rtol=5e-3, atol=0)
    else:
        assert x.abs().max() > 1e30  # a tail that no float32 holds


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_non_finite_sample_stays_alone(backend, device):
    y, sigma = inputs((3, 10), device=device)
    at = noise_at(3, device)
    clean = perturb(y, sigma, 128.0, **at, backend=backend)
    bad = y.clone()
    bad[1, 4] = math.nan
    got = perturb(bad, sigma, 128.0, **at, backend=backend)
    assert got.isnan().sum() == 1
    assert torch.equal(torch.where(got.isnan(), clean, got), clean)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("D", [1.0, INF])
def test_gradcheck(D):
    y, sigma = inputs((2, 1, 2, 3), torch.float64)
    y.requires_grad_()
    at = noise_at(2, c_in=sigma.double())
    assert torch.autograd.gradcheck(lambda v: perturb(v, sigma, D, **at), y)
    assert torch.autograd.gradgradcheck(lambda v: perturb(v, sigma, D, **at)[1].square(), y)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("used", ["x", "scaled", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_gradients(dtype, used, backend, device):
    y, sigma = inputs((2, 3, 2, 2), dtype, device)
    y.requires_grad_()
    c_in = sigma + 1
    x, scaled = perturb(y, sigma, 8.0, **noise_at(2, device, c_in=c_in, out_dtype=torch.float32), backend=backend)
    gx, gs = torch.randn(2, 2, 3, 2, 2, device=device, generator=torch.Generator(device).manual_seed(0))
    gx = gx.to(dtype)
    wanted = torch.zeros_like(gs)
    total = 0
    if used != "scaled":
        total, wanted = total + (gx * x).sum(), wanted + gx
    if used != "x":
        total, wanted = total + (gs * scaled).sum(), wanted + gs * c_in.view(2, 1, 1, 1)
    (grad,) = torch.autograd.grad(total, y)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ laws


def draws(n: int, N: int, D: float, sigma: float = 2.5) -> np.ndarray:
    at = {"seed": 99, "stream": 1, "step": 4, "sample_index": torch.arange(n)}
    y = torch.zeros(n, N, dtype=torch.float64)
    return perturb(y, torch.full((n,), sigma, dtype=torch.float64), D, **at).numpy()


def radius_law(N: int, D: float, sigma: float = 2.5):
    """The distribution function of R²: R²/r² ~ BetaPrime(N/2, D/2), or R²/σ² ~ χ²_N at D = ∞."""
    if math.isinf(D):
        return lambda q: stats.chi2(N).cdf(q / sigma**2)
    # betainc directly: scipy's betaprime forms q/(1+q), which is 1 long before the law's tail at D = 0.5 ends.
    r2 = sigma**2 * D
    return lambda q: np.where(
        q < r2, special.betainc(N / 2, D / 2, q / (r2 + q)), special.betaincc(D / 2, N / 2, r2 / (r2 + q))
    )


# Every D at one size of images, and some at the others.
LAWS = [(D, N) for D in (0.5, 1.0, 2.0, 8.0, 128.0, 2048.0, 3072000.0, INF) for N in (4, 64, 3072)]


@pytest.mark.parametrize(
    ("D", "N"), parts(LAWS, [(D, N) for D, N in LAWS if N != 64 and D in (1.0, 2.0, 8.0, 2048.0, 3072000.0)])
)
def test_law_of_radius_and_direction(D, N):
    n = 1500 if N == 3072 else 8000
    x = draws(n, N, D)
    radius2 = np.square(x).sum(1)
    assert stats.kstest(radius2, radius_law(N, D)).pvalue > LEVEL

    direction = x / np.sqrt(radius2)[:, None]
    rng = np.random.default_rng(0)
    axes = {"first": np.eye(N)[0], "last": np.eye(N)[-1], "ones": np.ones(N), "random": rng.standard_normal(N)}
    beta = stats.beta((N - 1) / 2, (N - 1) / 2)
    for axis in axes.values():
        cosine = direction @ (axis / np.linalg.norm(axis))
        assert stats.kstest((1 + cosine) / 2, beta.cdf).pvalue > LEVEL
        for function in (cosine, np.abs(cosine)):
            assert stats.spearmanr(radius2, function).pvalue > LEVEL
    if N == 4:
        # All of the direction, not only its projections: signs of the four coordinates fall evenly on 16 orthants.
        orthant = (direction > 0) @ (1 << np.arange(4))
        assert stats.chisquare(np.bincount(orthant, minlength=16)).pvalue > LEVEL


def test_the_law_test_sees_clipping_and_a_wrong_dimension():
    """What the radius test must catch: the clipped Beta of published code, and D off by a factor of two."""
    n, N, D = 8000, 64, 1.0
    beta = stats.beta(N / 2, D / 2).rvs(n, random_state=0).clip(1e-3, 1 - 1e-3)
    clipped = 2.5**2 * D * beta / (1 - beta)
    assert stats.kstest(clipped, radius_law(N, D)).pvalue < LEVEL
    assert stats.kstest(np.square(draws(n, N, 16.0)).sum(1), radius_law(N, 8.0)).pvalue < LEVEL


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": 0}, r"D must be in \(0, inf\]; got 0"),
        ({"D": -1.0}, "got -1.0"),
        ({"D": math.nan}, "got nan"),
        ({"D": 1j}, "D must be a real number; got 1j"),
        ({"D": "inf"}, "D must be a real number; got 'inf'"),
        ({"y": torch.zeros(3, 4, dtype=torch.int32)}, "float64, float32, bfloat16, float16; got int32"),
        ({"y": torch.zeros(3)}, r"\(B, C, H, W\) or \(B, N\) with N > 0; got \(3,\)"),
        ({"y": torch.zeros(3, 0)}, r"got \(3, 0\)"),
        ({"y": [1.0]}, "y must be a tensor; got list"),
        ({"y": torch.zeros(1, 1).expand(3, 2**31)}, "at most"),
        ({"sigma": torch.ones(2)}, r"sigma must be \(B,\) = \(3,\); got \(2,\)"),
        ({"sigma": torch.ones(3, 1)}, r"got \(3, 1\)"),
        ({"sigma": 1.0}, "sigma must be a tensor; got float"),
        ({"sigma": torch.ones(3, dtype=torch.int64)}, "float32 or float64; got int64"),
        ({"sigma": torch.ones(3, device="meta")}, "sigma must be on cpu; got meta"),
        ({"sample_index": torch.arange(2)}, r"sample_index must be \(B,\) = \(3,\); got \(2,\)"),
        ({"sample_index": torch.arange(3).float()}, "int64; got float32"),
        ({"c_in": torch.ones(4)}, r"c_in must be \(B,\) = \(3,\); got \(4,\)"),
        ({"c_in": torch.ones(3), "out_dtype": torch.int8}, "out_dtype must be one of .*; got int8"),
        ({"out_dtype": torch.float16}, "needs c_in"),
        ({"seed": 2**64}, "seed must be"),
        ({"stream": -1}, "stream must be"),
        ({"step": 2**32}, "step must be"),
        ({"backend": "fast"}, "auto, triton, reference; got 'fast'"),
    ],
)
def test_errors(change, message):
    valid = {"y": torch.zeros(3, 4), "sigma": torch.ones(3), "D": 128.0, **noise_at(3)}
    with pytest.raises(ValueError, match=message) as caught:
        perturb(**(valid | change))
    assert str(caught.value).startswith("perturb: ")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("D", [0.001, 0.5, 1.0, 128.0, 1e7, INF])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "sliced"])
def test_compiled(form, D, dtype, no_worse):
    y, sigma = inputs((37, 3, 30, 34), dtype, "cuda")
    y = arranged(y, form)
    at = noise_at(37, "cuda", c_in=sigma)
    truth = reference.perturb(y.double(), sigma, D, **at)
    plain = perturb(y, sigma, D, **at, out_dtype=torch.bfloat16, backend="reference")
    got = perturb(y, sigma, D, **at, out_dtype=torch.bfloat16)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert not g.isnan().any()
        if p.dtype == torch.float64:
            # Two double-precision libraries; below D = 2 the scale is the exponential of a number of the size of 1/D.
            torch.testing.assert_close(g, p, rtol=1e-12 / min(D, 1.0), atol=1e-13)
            continue
        fits = t.abs() < torch.finfo(p.dtype).max / 2
        no_worse(torch.where(fits, g, 0), torch.where(fits, p, 0), torch.where(fits, t, 0))


@pytest.mark.gpu
def test_compiled_does_not_wait_for_the_device():
    y, sigma = inputs((8, 3, 32, 32), device="cuda")
    at = noise_at(8, "cuda")
    perturb(y, sigma, 128.0, **at)
    torch.cuda.set_sync_debug_mode("error")
    try:
        perturb(y, sigma, 128.0, **at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
