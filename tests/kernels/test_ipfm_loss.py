"""ipfm_loss: against float64 autograd of the formula, both backends, layouts, non-finite samples, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipfm.kernels import ipfm_loss, reference

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # NumPy's, in the interpreter, about the non-finite samples that the tests feed it.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
ALPHAS = [0.0, 0.5, 1.0, 1.2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 1, 5, 7), (2, 3, 4), (1, 3, 8, 8), (4, 1), (2, 3, 40, 40)]
GRADIENTS = ("dt", "ds", "dy")


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"):
    generator = torch.Generator().manual_seed(2)
    return [v.to(device, dtype) for v in torch.randn(3, *shape, generator=generator, dtype=torch.float64)]


def formula(t: torch.Tensor, s: torch.Tensor, y: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L(α) and λ as the method prints them: the difference of squares, λ without gradient."""
    t, s, y = t.flatten(1), s.flatten(1), y.flatten(1)
    weight = 1 / (t - y).abs().mean(1).clamp(min=1e-5).detach()

    def square(v: torch.Tensor) -> torch.Tensor:
        return v.square().sum(1)

    return weight * (square(t - y) - square(s - y) - 2 * (alpha - 0.5) * square(t - s)), weight


# --------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_autograd_of_the_formula(alpha, backend, device):
    t, s, y = (v.requires_grad_() for v in inputs((3, 2, 5, 7), device=device))
    loss, weight = formula(t, s, y, alpha)
    wanted = torch.autograd.grad(loss.sum(), (t, s, y))
    got = ipfm_loss(t, s, y, alpha=alpha, backend=backend)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.weight, weight, rtol=1e-9, atol=0)
    assert got.valid.all()
    for name, gradient in zip(GRADIENTS, wanted, strict=True):
        torch.testing.assert_close(getattr(got, name), gradient, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(alpha=st.floats(-3, 3), scale=st.floats(1e-6, 1e3), seed=st.integers(0, 999))
def test_is_twice_the_sid_loss(alpha, scale, seed):
    t, s, y = scale * torch.randn(3, 2, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = ipfm_loss(t, s, y, alpha=alpha)
    sid = got.weight * ((t - s) * ((t - y) - alpha * (t - s))).sum(1)
    torch.testing.assert_close(got.loss, 2 * sid, rtol=1e-9, atol=1e-12 * scale)


def test_the_loss_does_not_cancel_when_the_student_is_close(device):
    """‖T-y‖² - ‖S-y‖² in float32 loses every digit at |T-S| ~ 1e-7; the factored sum does not."""
    t, _, y = inputs((2, 3000))
    s = t + 1e-5 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t32, s32, y32 = t.float(), s.float(), y.float()
    truth, _ = formula(t32.double(), s32.double(), y32.double(), 1.0)
    for backend in ("reference", "triton"):
        got = ipfm_loss(t32.to(device), s32.to(device), y32.to(device), alpha=1.0, backend=backend)
        torch.testing.assert_close(got.loss.cpu().double(), truth, rtol=2e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_weight_floor(backend, device):
    _, s, y = inputs((2, 40), device=device)
    t = y.clone()
    t[1] += 3e-6
    got = ipfm_loss(t, s, y, alpha=1.0, backend=backend)
    torch.testing.assert_close(got.weight, torch.full_like(got.weight, 1e5), rtol=1e-9, atol=0)
    assert got.valid.all()


# --------------------------------------------------------------------------------------------------- both backends


@pytest.mark.pairs
@pytest.mark.quick
@pytest.mark.parametrize("alpha", [0.5, 1.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_triton_is_no_worse_than_pytorch(shape, dtype, alpha, device, no_worse):
    t, s, y = inputs(shape, dtype, device)
    truth = reference.ipfm_loss(t.double(), s.double(), y.double(), alpha=alpha)
    plain = ipfm_loss(t, s, y, alpha=alpha, backend="reference")
    got = ipfm_loss(t, s, y, alpha=alpha, backend="triton")
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.dt.dtype == got.ds.dtype == got.dy.dtype == dtype


def test_a_row_longer_than_the_registers_hold(device, no_worse):
    t, s, y = inputs((2, 4100), torch.float32, device)  # two full tiles and a partial one
    truth = reference.ipfm_loss(t.double(), s.double(), y.double(), alpha=1.0)
    plain = ipfm_loss(t, s, y, alpha=1.0, backend="reference")
    for g, p, r in zip(ipfm_loss(t, s, y, alpha=1.0, backend="triton"), plain, truth, strict=True):
        no_worse(g, p, r)


def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_batch(device):
    t, s, y = inputs((3, 4, 9), torch.float32, device)
    first = ipfm_loss(t, s, y, alpha=1.0, backend="triton")
    again = ipfm_loss(t, s, y, alpha=1.0, backend="triton")
    alone = ipfm_loss(t[1:2], s[1:2], y[1:2], alpha=1.0, backend="triton")
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["channels_last", "mixed", "sliced", "batch sliced", "batch inside"])
def test_memory_layouts(form, inplace, backend, device):
    def arranged(position: int, v: torch.Tensor) -> torch.Tensor:
        if form == "channels_last" or (form == "mixed" and position == 1):
            return v.to(memory_format=torch.channels_last)
        if form == "sliced":
            return torch.stack([v, v], -1).flatten(-2)[..., ::2]
        if form == "batch sliced":
            return torch.stack([v, v], 1).flatten(0, 1)[::2]
        if form == "batch inside":
            return v.movedim(0, -1).contiguous().movedim(-1, 0)
        return v.clone()

    plain = inputs((3, 2, 4, 5), torch.float32, device)
    wanted = ipfm_loss(*plain, alpha=1.2)
    t, s, y = (arranged(i, v) for i, v in enumerate(plain))
    assert form == "mixed" or not t.is_contiguous()
    got = ipfm_loss(t, s, y, alpha=1.2, inplace=inplace, backend=backend)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-6)
    assert torch.equal(y, plain[2])
    if inplace:
        assert got.dt is t
        assert got.ds is s
    elif form in ("channels_last", "mixed"):
        assert got.dt.stride() == got.ds.stride() == got.dy.stride() == t.stride()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("elements", [35, 4100])
def test_inplace(elements, backend, device):
    t, s, y = inputs((2, elements), torch.float32, device)
    wanted = ipfm_loss(t, s, y, alpha=1.0, backend=backend)
    got = ipfm_loss(t, s, y, alpha=1.0, inplace=True, backend=backend)
    assert got.dt is t
    assert got.ds is s
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autograd_notices_what_inplace_overwrites(backend, device):
    t, s, y = inputs((2, 6), torch.float32, device)
    leaf = s.clone().requires_grad_()
    out = leaf * 1
    loss = (out * out).sum()  # saves out
    ipfm_loss(t, out, y, alpha=1.0, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_batch(backend, device):
    t, s, y = (torch.zeros(0, 3, 4, 4, device=device) for _ in range(3))
    got = ipfm_loss(t, s, y, alpha=1.0, backend=backend)
    assert [v.shape for v in got] == [(0,), (0,), t.shape, t.shape, t.shape, (0,)]


# ---------------------------------------------------------------------------------------------- non-finite samples


def assert_isolated(got, clean, bad: int) -> None:
    """Sample `bad` is exactly zero and invalid; the others are bit for bit what they are without it."""
    batch = len(got.valid)
    assert got.valid.tolist() == [i != bad for i in range(batch)]
    for name in ("loss", "weight", *GRADIENTS):
        value, other = getattr(got, name), getattr(clean, name)
        assert torch.equal(value[bad], torch.zeros_like(value[bad])), name
        keep = [i for i in range(batch) if i != bad]
        assert torch.equal(value[keep], other[keep]), name


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["t", "s", "y"])
@pytest.mark.parametrize(("sample", "element", "inplace"), [(0, 0, False), (1, 17, True), (2, 34, False)])
def test_non_finite_sample_is_isolated(sample, element, inplace, which, value, backend, device):
    tensors = inputs((3, 1, 5, 7), torch.float32, device)
    clean = ipfm_loss(*tensors, alpha=0.5, backend=backend)
    tensors[which].view(3, -1)[sample, element] = value
    assert_isolated(ipfm_loss(*tensors, alpha=0.5, inplace=inplace, backend=backend), clean, sample)


@pytest.mark.parametrize("element", [0, 2500, 4099])
def test_non_finite_sample_is_isolated_in_a_long_row(element, device):
    tensors = inputs((2, 4100), torch.float32, device)
    clean = ipfm_loss(*tensors, alpha=1.0, backend="triton")
    tensors[1][1, element] = math.nan
    assert_isolated(ipfm_loss(*tensors, alpha=1.0, backend="triton"), clean, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("which", [(0,), (0, 1), (0, 1, 2)], ids=ids)
def test_infinities_that_meet_in_a_difference(which, backend, device):
    tensors = inputs((2, 35), torch.float32, device)
    clean = ipfm_loss(*tensors, alpha=1.0, backend=backend)
    for i in which:
        tensors[i][0, 3] = math.inf
    assert_isolated(ipfm_loss(*tensors, alpha=1.0, backend=backend), clean, 0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", ["squares", "sum of |T-y| with T = S", "half-precision gradient"])
def test_overflow_of_finite_inputs_is_isolated(case, backend, device):
    dtype = torch.float16 if "half" in case else torch.float32
    t, s, y = inputs((2, 35), dtype, device)
    if case == "half-precision gradient":
        t[1], y[1] = 0, 0
        s[1, :] = 2.0  # lambda = 1e5: gradients of 4e5 do not fit float16
    elif case == "squares":
        s[1, 3] = 1e30
    clean = ipfm_loss(t, s, y, alpha=1.0, backend=backend)
    if case.startswith("sum"):
        t[1], s[1] = 1e37, 1e37
        y[1] = 0
    assert_isolated(ipfm_loss(t, s, y, alpha=1.0, backend=backend), clean, 1)
    assert clean.loss.isfinite().all()


# -------------------------------------------------------------------------------- raw outputs, with preconditioning

# The dtypes of the networks' outputs and of x and y.
PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float64, torch.float64), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16),
]  # fmt: skip
RAW = ("x", "c_skip", "c_out")


def raw_inputs(shape, raw=torch.float64, clean=torch.float64, device="cpu", numbers=None) -> dict[str, torch.Tensor]:
    """What `ipfm_loss` takes: raw outputs, x and y of the size of data, EDM's coefficients."""
    t, s, y = inputs(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    sigma = torch.linspace(0.3, 5, shape[0], dtype=torch.float64)
    numbers = numbers or torch.promote_types(clean, torch.float32)
    vectors = {"c_skip": 0.25 / (sigma**2 + 0.25), "c_out": 0.5 * sigma / (sigma**2 + 0.25).sqrt()}
    tensors = {"y": y, "x": y + column(sigma, y) * noise}
    return {
        "t": t.to(device, raw),
        "s": s.to(device, raw),
        **{name: v.to(device, clean) for name, v in tensors.items()},
        **{name: v.to(device, numbers) for name, v in vectors.items()},
    }


def doubled(arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.double() for name, v in arguments.items()}


def column(v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("alpha", [0.5, 1.2])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 4100)], ids=ids)
def test_raw_equals_autograd_of_the_formula(shape, alpha, backend, device):
    """y has two ways into the loss: its own, and that through x = y + noise."""
    a = raw_inputs(shape, device=device)
    noise = a["x"] - a["y"]
    t, s, y = (a[name].requires_grad_() for name in "tsy")
    skipped = column(a["c_skip"], y) * (y + noise)
    T, S = (skipped + column(a["c_out"], y) * f for f in (t, s))
    loss, weight = formula(T, S, y, alpha)
    wanted = torch.autograd.grad(loss.sum(), (t, s, y))
    got = ipfm_loss(**a, alpha=alpha, backend=backend)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.weight, weight, rtol=1e-9, atol=0)
    assert got.valid.all()
    for name, gradient in zip(GRADIENTS, wanted, strict=True):
        torch.testing.assert_close(getattr(got, name), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.pairs
@pytest.mark.parametrize("alpha", [0.5, 1.2])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(ids, pair)))
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (1, 3, 8, 8), (2, 4100)], ids=ids)
def test_raw_triton_is_no_worse_than_pytorch(shape, pair, alpha, device, no_worse):
    a = raw_inputs(shape, *pair, device=device)
    truth = reference.ipfm_loss(**doubled(a), alpha=alpha)
    plain = ipfm_loss(**a, alpha=alpha, backend="reference")
    got = ipfm_loss(**a, alpha=alpha, backend="triton")
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r, hair=2)
    assert (got.dt.dtype, got.ds.dtype, got.dy.dtype) == (pair[0], pair[0], pair[1])
    assert got.loss.dtype == got.weight.dtype == torch.promote_types(pair[1], torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_raw_outputs_that_are_close_do_not_cancel(backend, device):
    a = raw_inputs((2, 3000), torch.float32, torch.float32, device)
    a["s"] = a["t"] + 1e-5 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(3)).to(device)
    truth = reference.ipfm_loss(**doubled(a), alpha=1.0)
    got = ipfm_loss(**a, alpha=1.0, backend=backend)
    torch.testing.assert_close(got.loss.double(), truth.loss, rtol=2e-4, atol=0)
    torch.testing.assert_close(got.dy.double(), truth.dy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("other", ["t", "s", "y", "x"])
def test_raw_memory_layouts(other, inplace, backend, device):
    """All in channels_last, and one of them in another format than the rest."""
    a = raw_inputs((3, 2, 4, 5), torch.bfloat16, torch.float32, device, numbers=torch.float64)
    wanted = ipfm_loss(**a, alpha=1.2, backend="reference")
    last = {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in a.items()}
    mixed = last | {other: torch.stack([a[other]] * 2, -1).flatten(-2)[..., ::2]}
    for arranged in (last, mixed):
        a = {n: v.clone() if v.is_contiguous(memory_format=torch.channels_last) else v for n, v in arranged.items()}
        got = ipfm_loss(**a, alpha=1.2, inplace=inplace, backend=backend)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2 if g.dtype == torch.bfloat16 else 5e-6, atol=1e-6)
        assert all(torch.equal(a[n], last[n]) for n in ("y", *RAW))
        if inplace:
            assert got.dt is a["t"]
            assert got.ds is a["s"]
        elif arranged is last:
            assert got.dt.stride() == got.ds.stride() == got.dy.stride() == a["t"].stride()


@pytest.mark.pairs
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["t", "s", "y", *RAW])
@pytest.mark.parametrize("shape", [(3, 35), (2, 4100)], ids=ids)
def test_raw_non_finite_sample_is_isolated(shape, which, value, backend, device):
    a = raw_inputs(shape, torch.bfloat16, torch.float32, device)
    clean = ipfm_loss(**a, alpha=0.5, backend=backend)
    a[which].view(shape[0], -1)[1, -1] = value
    assert_isolated(ipfm_loss(**a, alpha=0.5, backend=backend), clean, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_raw_gradient_that_its_dtype_does_not_hold(backend, device):
    """Each gradient has its own limit: that of float16 for the outputs', none that matters for y's in float32."""
    a = raw_inputs((2, 35), torch.float16, torch.float32, device)
    a["c_skip"][1] = 0
    a["y"][1], a["t"][1], a["s"][1] = 0, 0, 2.0  # λ = 1e5: gradients of some 1e5
    got = ipfm_loss(**a, alpha=1.0, backend=backend)
    assert_isolated(got, got, 1)
    wide = ipfm_loss(**(a | {"t": a["t"].float(), "s": a["s"].float()}), alpha=1.0, backend=backend)
    assert wide.valid.all()
    assert wide.ds[1].abs().max() > 65504
    a["c_out"][1] = 1e-3  # the outputs' gradients get small, y's stays
    a["s"][1] = 500.0
    got = ipfm_loss(**a, alpha=1.0, backend=backend)
    assert got.valid.all()
    assert got.dy[1].abs().max() > 65504


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_raw_empty_batch(backend, device):
    a = {n: v[:0] for n, v in raw_inputs((2, 3, 4, 4), torch.bfloat16, torch.float32, device).items()}
    got = ipfm_loss(**a, alpha=1.0, backend=backend)
    assert [v.shape for v in got] == [(0,), (0,), *[(0, 3, 4, 4)] * 3, (0,)]


# ---------------------------------------------------------------------------------------------------------- errors

ONES = torch.ones(2, 4)
COEFFICIENTS = {"x": ONES, "c_skip": torch.ones(2), "c_out": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.ones(2)}, r"t must be \(B, C, H, W\) or \(B, N\) with N > 0; got \(2,\)"),
        ({"t": ONES.int()}, "t's dtype must be one of .*; got int32"),
        ({"t": 3}, "t must be a tensor; got int"),
        ({"s": torch.ones(2, 5)}, r"s must have t's shape \(2, 4\); got \(2, 5\)"),
        ({"y": ONES.double()}, "y must have t's dtype torch.float32; got torch.float64"),
        ({"y": ONES.to("meta")}, "y must have t's device cpu; got meta"),
        ({"alpha": math.nan}, "alpha must be finite; got nan"),
        ({"alpha": math.inf}, "alpha must be finite; got inf"),
        ({"alpha": 1e7}, r"alpha must be in \[-1e6, 1e6\]"),
        ({"alpha": "1"}, "alpha must be a real number; got '1'"),
        ({"inplace": True, "t": ONES, "s": ONES}, "share memory"),
        ({"backend": "cpu"}, "auto, triton, reference; got 'cpu'"),
        ({"c_skip": torch.ones(2)}, "x, c_skip and c_out go together; got c_skip alone"),
        (COEFFICIENTS | {"x": torch.ones(2, 5)}, r"x must have y's shape \(2, 4\); got \(2, 5\)"),
        (COEFFICIENTS | {"x": ONES.double()}, "x must have y's dtype torch.float32; got torch.float64"),
        (COEFFICIENTS | {"c_out": torch.ones(2).half()}, "c_out must be float32 or float64; got float16"),
        (COEFFICIENTS | {"s": ONES.half()}, "s must have t's dtype torch.float32; got torch.float16"),
        (
            COEFFICIENTS | {"y": ONES.half(), "x": ONES.half()},
            "t's dtype must be y's or one that it holds; got float32 beside float16",
        ),
        (COEFFICIENTS | {"inplace": True, "t": ONES}, "share memory"),
    ],
)
def test_errors(change, message):
    valid = {"t": torch.ones(2, 4), "s": torch.ones(2, 4), "y": torch.ones(2, 4), "alpha": 1.0}
    with pytest.raises(ValueError, match=message) as caught:
        ipfm_loss(**(valid | change))
    assert str(caught.value).startswith("ipfm_loss: ")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(37, 3, 32, 32), (9, 3, 64, 64), (5, 3, 31, 29)], ids=ids)
def test_compiled(shape, dtype, alpha, no_worse):
    t, s, y = inputs(shape, dtype, "cuda")
    t.view(len(t), -1)[2, 5] = math.nan
    truth = reference.ipfm_loss(t.double(), s.double(), y.double(), alpha=alpha)
    plain = ipfm_loss(t, s, y, alpha=alpha, backend="reference")
    got = ipfm_loss(t, s, y, alpha=alpha)
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r)
    again = ipfm_loss(t, s, y, alpha=alpha, inplace=True)
    assert torch.equal(again.dt, got.dt)
    assert torch.equal(again.ds, got.ds)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(ids, pair)))
@pytest.mark.parametrize("shape", [(37, 3, 32, 32), (9, 3, 64, 64), (5, 3, 31, 29)], ids=ids)
def test_raw_compiled(shape, pair, no_worse):
    a = raw_inputs(shape, *pair, device="cuda")
    a["x"].view(shape[0], -1)[2, 5] = math.nan
    truth = reference.ipfm_loss(**doubled(a), alpha=1.0)
    plain = ipfm_loss(**a, alpha=1.0, backend="reference")
    got = ipfm_loss(**a, alpha=1.0)
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r, hair=2)
    again = ipfm_loss(**a, alpha=1.0, inplace=True)
    assert torch.equal(again.dt, got.dt)
    assert torch.equal(again.ds, got.ds)


@pytest.mark.gpu
def test_compiled_does_not_wait_for_the_device():
    t, s, y = inputs((4, 3, 32, 32), torch.float32, "cuda")
    ipfm_loss(t, s, y, alpha=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ipfm_loss(t, s, y, alpha=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
