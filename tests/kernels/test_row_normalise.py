"""row_normalise: the formula, its gradient, Triton against float64, layouts, what is not finite, errors."""

import math

import pytest
import torch
from torch import Tensor

from ipfm.kernels import reference, row_normalise
from ipfm.models.forced_weight_norm import plain_weight

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "triton"]
# convolutions, linear layers, one row, rows that wait in no registers (of one element little is left but rounding)
SHAPES = [(4, 8, 3, 3), (5, 7, 3, 3), (3, 11), (6, 2), (1, 5, 1, 1), (2, 4100)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of sizes from 0.1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (made * torch.logspace(-1, 0.5, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))).to(dtype)


def differentiated(function, master: Tensor, **options) -> list[Tensor]:
    """The weight and dL/dM for a drawn dL/dw."""
    m = master.detach().requires_grad_()
    w = function(m, **options)
    noise = drawn(tuple(w.shape), seed=1).to(m.device, options.get("out_dtype") or master.dtype)
    (dm,) = torch.autograd.grad(w, m, noise.to(w.dtype))
    return [w.detach(), dm]


def test_the_formula_is_that_of_edm2s_layers() -> None:
    m = drawn((5, 7, 3, 3))
    size = m.square().flatten(1).mean(1).sqrt()[:, None, None, None]
    wanted = m / (1e-4 + size) * (1.5 / math.sqrt(63))
    for backend in ("oracle", "reference"):
        made = reference.row_normalise if backend == "oracle" else row_normalise
        torch.testing.assert_close(made(m, gain=1.5), wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(row_normalise(m), plain_weight(m), rtol=1e-14, atol=0)
    large = row_normalise(torch.randn(8, 512) * 1e3)
    torch.testing.assert_close(large.norm(dim=1), torch.ones(8), rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("shape", [(3, 2, 1, 2), (2, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], backend: str) -> None:
    m = drawn(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: row_normalise(m, gain=0.7, eps=0.1, backend=backend), m, fast_mode=True)
    assert torch.autograd.gradcheck(lambda m: reference.row_normalise(m, gain=0.7, eps=0.1), m, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_no_worse_than_pytorch(shape, dtype, device, no_worse) -> None:
    m = drawn(shape, dtype=dtype).to(device)
    truth = differentiated(reference.row_normalise, m.double(), gain=1.3)
    # The upstream gradient is that of the weight's dtype.
    noise = drawn(shape, seed=1).to(device, dtype).double()
    (truth[1],) = torch.autograd.grad(
        reference.row_normalise(leaf := m.double().requires_grad_(), gain=1.3), leaf, noise
    )
    plain, got = (differentiated(row_normalise, m, gain=1.3, backend=backend) for backend in BACKENDS)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert g.dtype == dtype
        no_worse(g, p, t, hair=2)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_backend
def test_the_weight_may_have_another_dtype_than_its_master(backend, out_dtype, device, no_worse) -> None:
    """As a master in float32 whose layer computes in 16 bits: rounded once; the gradient is in the master's dtype."""
    m = drawn((4, 6, 3, 3), dtype=torch.float32).to(device)
    plain, got = (differentiated(row_normalise, m, out_dtype=out_dtype, backend=b) for b in ("reference", backend))
    assert (got[0].dtype, got[1].dtype) == (out_dtype, torch.float32)
    truth = reference.row_normalise(m.double())
    no_worse(got[0], plain[0], truth)
    torch.testing.assert_close(got[1], plain[1], rtol=1e-5, atol=1e-6)


@each_backend
def test_layouts(backend, device) -> None:
    """Those whose rows have no gaps are kept, others are copied; a gradient may have any."""
    m = drawn((4, 6, 3, 3), dtype=torch.float32).to(device)
    wanted = differentiated(row_normalise, m, backend=backend)
    last = m.contiguous(memory_format=torch.channels_last)
    turned = m.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.stack([m, m], -1).flatten(-2)[..., ::2]
    for given in (last, turned, sliced):
        got = differentiated(row_normalise, given, backend=backend)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)
        kept = row_normalise(given, backend=backend)
        assert kept.stride() == (last if given is last else m).stride()
    leaf = last.requires_grad_()
    (dm,) = torch.autograd.grad(row_normalise(leaf, backend=backend), leaf, torch.ones(1, device=device).expand_as(m))
    (dw,) = torch.autograd.grad(row_normalise(other := m.requires_grad_(), backend=backend), other, torch.ones_like(m))
    torch.testing.assert_close(dm, dw, rtol=1e-6, atol=1e-7)


@each_backend
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(number, backend, device) -> None:
    for shape in ((3, 11), (2, 4100)):
        m = drawn(shape, dtype=torch.float32).to(device)
        clean = differentiated(row_normalise, m, backend=backend)
        m[1, 3] = number
        found = differentiated(row_normalise, m, backend=backend)
        for f, c in zip(found, clean, strict=True):
            assert torch.equal(f[0], c[0]) and not f[1].isfinite().all()
    # A gradient that is not finite shows in the row of its own, too.
    m = drawn((3, 11), dtype=torch.float32).to(device).requires_grad_()
    noise = torch.ones_like(m)
    noise[2, 0] = number
    (dm,) = torch.autograd.grad(row_normalise(m, backend=backend), m, noise)
    assert dm[:2].isfinite().all() and not dm[2].isfinite().any()


@each_backend
def test_a_row_of_zeros_and_no_row(backend, device) -> None:
    m = torch.zeros(2, 4, device=device)
    m[1] = 2
    w, dm = differentiated(row_normalise, m, backend=backend)
    assert not w[0].any()
    torch.testing.assert_close(dm[0], drawn((2, 4), seed=1, dtype=torch.float32).to(device)[0] / (2 * 1e-4))
    assert [t.shape for t in differentiated(row_normalise, m[:0], backend=backend)] == [(0, 4), (0, 4)]


@each_backend
def test_the_rows_own_direction_is_what_the_gradient_leaves_out(backend, device) -> None:
    """M·dL/dM is eps/s of what it would be: the scale of a row does not matter to the result."""
    m = drawn((4, 50), dtype=torch.float64).to(device)
    _, dm = differentiated(row_normalise, m, backend=backend)
    along = (m * dm).sum(1) / m.norm(dim=1) / dm.norm(dim=1)
    assert along.abs().max() < 1e-2


@each_backend
def test_autograd_keeps_the_master_alone_and_refuses_a_second_derivative(backend, device) -> None:
    m, kept = drawn((3, 11), dtype=torch.float32).to(device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        w = row_normalise(m, out_dtype=torch.bfloat16, backend=backend)
    assert kept == [m.nbytes]
    with pytest.raises(RuntimeError, match="row_normalise has no second derivative"):
        torch.autograd.grad(w.float().square().sum(), m, create_graph=True)
    with torch.no_grad():
        assert torch.equal(row_normalise(m, out_dtype=torch.bfloat16, backend=backend), w)


@pytest.mark.parametrize(
    ("master", "options", "message"),
    [
        ([1.0], {}, "master must be a tensor; got list"),
        (torch.zeros(2, 3, dtype=torch.int64), {},
         "master's dtype must be one of float64, float32, bfloat16, float16; got int64"),
        (torch.zeros(4), {}, r"master must be \(rows, ...\) with an element a row; got \(4,\)"),
        (torch.zeros(4, 0), {}, r"master must be \(rows, ...\) with an element a row; got \(4, 0\)"),
        (torch.zeros(4, 2), {"gain": math.inf}, "gain must be finite; got inf"),
        (torch.zeros(4, 2), {"gain": torch.ones(())}, r"gain must be a real number; got tensor\(1.\)"),
        (torch.zeros(4, 2), {"eps": 0}, r"eps must be in \(0, inf\); got 0"),
        (torch.zeros(4, 2), {"out_dtype": torch.int8},
         "out_dtype must be one of float64, float32, bfloat16, float16; got int8"),
        (torch.zeros(4, 2), {"backend": "cuda"}, "backend must be one of auto, triton, reference; got 'cuda'"),
    ],
)  # fmt: skip
def test_refusals(master, options, message) -> None:
    with pytest.raises(ValueError, match=f"^row_normalise: {message}$"):
        row_normalise(master, **options)


def test_tensors_without_values_give_such() -> None:
    found = row_normalise(torch.empty(4, 6, 3, 3, device="meta"), out_dtype=torch.bfloat16)
    assert (found.shape, found.dtype, found.device.type) == ((4, 6, 3, 3), torch.bfloat16, "meta")
