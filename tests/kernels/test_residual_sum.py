"""residual_sum: gradcheck, Triton against float64, layouts, options, errors."""

import itertools

import pytest
import torch

from ipfm.kernels import reference, residual, residual_sum
from ipfm.kernels._dispatch import residual_config
from ipfm.kernels.residual import _dense, unchecked_residual_sum

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, C, H, W): whole powers, odd sizes, one pixel, many blocks, channels that no power of two divides
SHAPES = [(2, 8, 4, 4), (3, 6, 5, 7), (2, 4, 1, 1), (1, 48, 17, 13), (2, 9, 3, 3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
BACKENDS = ["reference", "triton"]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(shape, dtype=torch.float64, device="cpu", layout=torch.contiguous_format, biased=True):
    """[a, b, bias] and the gradient of the result."""
    generator = torch.Generator().manual_seed(3)
    a, b, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64) if biased else None
    made = [t.to(device, dtype).contiguous(memory_format=layout) for t in (a, b)]
    return [*made, None if bias is None else bias.to(device, dtype)], gradient.to(device, dtype)


def differentiated(function, tensors, gradient, **options):
    """[y, ∂a, ∂b, ∂bias]."""
    a, b, bias = (None if t is None else t.detach().requires_grad_() for t in tensors)
    y = function(a, b, bias, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (a, b, bias) if t is not None], gradient.to(y.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_gradcheck(scale, backend):
    """First and second derivatives, which are those of a linear function."""
    (a, b, bias), _ = inputs((2, 3, 1, 2))
    given = [t.requires_grad_() for t in (a, b, bias)]

    def call(a, b, bias):
        return residual_sum(a, b, bias, scale=scale, backend=backend)

    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.pairs
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_triton_is_no_worse_than_pytorch(shape, dtype, layout, device, no_worse):
    for scale, biased in ((0.7, True), (1.0, True), (-3.0, False), (1.0, False)):
        tensors, gradient = inputs(shape, dtype, device, layout, biased)
        doubled = [None if t is None else t.double() for t in tensors]
        truth = differentiated(reference.residual_sum, doubled, gradient.double(), scale=scale)
        plain, got = (differentiated(residual_sum, tensors, gradient, scale=scale, backend=b) for b in BACKENDS)
        assert {g.dtype for g in got} == {dtype} and got[0].stride() == tensors[0].stride()
        for g, p, r in zip(got, plain, truth, strict=True):
            no_worse(g, p, r)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 8, 4, 3), (2, 4, 1, 3), (2, 4, 3, 1), (1, 3, 1, 1), (2, 1, 4, 3)], ids=ids)
def test_the_gradient_of_a_part_of_concatenated_channels_is_read_where_it_lies(shape, layout, device, monkeypatch):
    """It has gaps; the gradients have none, in the memory format of the whole."""
    tensors, gradient = inputs(shape, torch.float64, device, layout)
    batch, channels, *sides = shape
    whole = torch.randn(batch, channels + 5, *sides, dtype=torch.float64, device=device)
    whole = whole.contiguous(memory_format=layout)
    part = whole[:, 2 : 2 + channels].copy_(gradient)
    copied = []
    monkeypatch.setattr(residual, "_dense", lambda t: (copied.append(t) if t is part else None, _dense(t))[1])
    got = differentiated(residual_sum, tensors, part, scale=0.7, backend="triton")
    wanted = differentiated(reference.residual_sum, tensors, gradient, scale=0.7)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert got[1].is_contiguous(memory_format=layout) and not copied


@pytest.mark.parametrize("shape", [(2, 8, 4, 3), (2, 64, 17, 17)], ids=["whole-samples", "parts-of-samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_rows_of_biases_get_the_gradients_of_each_sample(shape, dtype, device):
    """As a network joins its small vectors: in float32, one row for all samples."""
    (a, b, bias), gradient = inputs(shape, dtype, device, torch.channels_last)

    def run(bias, gradient):
        bias = bias.detach().requires_grad_()
        y = unchecked_residual_sum(a[: len(gradient)], b[: len(gradient)], bias, scale=0.7, triton_runs=True)
        return y.detach(), torch.autograd.grad(y, bias, gradient)[0]

    y, by_sample = run(bias.float().expand(len(a), -1), gradient)
    expected, whole = run(bias, gradient)
    assert torch.equal(y, expected) and by_sample.dtype == torch.float32
    torch.testing.assert_close(by_sample.sum(0).to(dtype), whole)
    torch.testing.assert_close(by_sample[0], run(bias.float(), gradient[:1])[1], rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:  # by PyTorch's operations
        bias = bias.expand(len(a), -1).requires_grad_()
        y = unchecked_residual_sum(a, b, bias, scale=0.7, triton_runs=True)
        (again,) = torch.autograd.grad(y, bias, gradient, create_graph=True)
        torch.testing.assert_close(again, by_sample, rtol=1e-5, atol=1e-4)


def test_a_gradient_of_any_strides(device):
    tensors, gradient = inputs((2, 4, 4, 3), torch.float64, device)
    wanted = differentiated(reference.residual_sum, tensors, gradient, scale=0.7)
    turned = gradient.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.zeros(2, 8, 4, 6, dtype=torch.float64, device=device)[:, ::2, :, ::2].copy_(gradient)
    for given in (turned, spread, gradient[:1].expand(2, -1, -1, -1)):
        if given.stride(0) == 0:
            wanted = differentiated(reference.residual_sum, tensors, given, scale=0.7)
        for g, w in zip(differentiated(residual_sum, tensors, given, scale=0.7, backend="triton"), wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_pytorchs_own_operations_to_the_bit():
    """What a residual block computed before there was this operation, in 16 bits too."""
    for dtype in DTYPES:
        (a, b, _), gradient = inputs((2, 6, 3, 5), dtype, biased=False)
        got = differentiated(residual_sum, [a, b, None], gradient, scale=0.7)
        wanted = differentiated(lambda a, b, _: (a + b).mul_(0.7), [a, b, None], gradient)
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layouts(backend, device):
    """The result has the layout of the first tensor; other layouts of the second and of gradients fit too."""
    tensors, gradient = inputs((2, 8, 3, 5), torch.float32, device)
    wanted = differentiated(residual_sum, tensors, gradient, scale=0.5, backend=backend)
    a, b, bias = tensors
    sliced = torch.cat([a, a], dim=3)[..., :5]
    last = [t.to(memory_format=torch.channels_last) for t in (a, b, gradient)]
    for x, y, dy in itertools.product((a, sliced, last[0]), (b, last[1]), (gradient, last[2])):
        got = differentiated(residual_sum, [x, y, bias], dy, scale=0.5, backend=backend)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)
        if backend == "triton":
            kept = torch.channels_last if x is last[0] else torch.contiguous_format
            assert got[0].is_contiguous(memory_format=kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_where_it_is(backend, device):
    (a, b, bias), _ = inputs((2, 4, 3, 3), torch.float32, device)
    a[0, 1, 2, 0], b[1, 2, 0, 0] = torch.inf, torch.nan
    y = residual_sum(a, b, bias, scale=0.5, backend=backend)
    assert y[0, 1, 2, 0] == torch.inf and y[1, 2, 0, 0].isnan()
    assert int(y.isfinite().logical_not().sum()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_differentiated(backend, device):
    tensors, gradient = inputs((2, 4, 3, 3), torch.float32, device)
    full = differentiated(residual_sum, tensors, gradient, scale=0.5, backend=backend)
    for i, one in enumerate(tensors):
        one.requires_grad_()
        y = residual_sum(*tensors, scale=0.5, backend=backend)
        (got,) = torch.autograd.grad(y, one, gradient)
        assert torch.equal(got, full[i + 1])
        one.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_branch_that_is_added_to_itself(backend, device):
    """Both gradients are one tensor: their sum must not be taken in place of one of them."""
    (a, _, bias), gradient = inputs((2, 4, 3, 3), torch.float32, device)
    a.requires_grad_()
    kept = gradient.clone()
    (got,) = torch.autograd.grad(residual_sum(a, a, bias, backend=backend), a, gradient)
    torch.testing.assert_close(got, 2 * kept)
    assert torch.equal(gradient, kept)


def test_autograd_keeps_nothing(device):
    (a, b, bias), _ = inputs((2, 8, 4, 4), torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        residual_sum(a.requires_grad_(), b, bias.requires_grad_(), scale=0.5, backend="triton")
    assert kept == []


def test_the_same_bits_every_time(device):
    tensors, gradient = inputs((2, 48, 7, 5), torch.float32, device)
    first, again = (differentiated(residual_sum, tensors, gradient, scale=0.5, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_no_images(device):
    (a, b, bias), _ = inputs((2, 4, 3, 3), torch.float32, device)
    a, bias = a[:0].requires_grad_(), bias.requires_grad_()
    y = residual_sum(a, b[:0], bias, scale=0.5, backend="triton")
    assert y.shape == (0, 4, 3, 3)
    da, to_bias = torch.autograd.grad(y.sum(), (a, bias))
    assert da.shape == a.shape and torch.equal(to_bias, torch.zeros_like(bias))


def test_no_lane_is_idle():
    assert residual_config(256, 1024, True) == (64, 32, 8, 4)
    assert residual_config(192, 4096, False) == (16, 128, 8, 4)
    assert residual_config(1344, 256, True)[0] == 64  # 21 times 64
    assert residual_config(36, 256, True)[0] == 64  # 4 are too few for a sector
    assert residual_config(3, 4096, False)[:2] == (4, 512)
    assert residual_config(64, 4, True) == (64, 4, 1, 1)


A, ONES = torch.zeros(2, 4, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((A[0, 0], A[0, 0]), {}, r"a must be \(B, C, H, W\); got \(3, 3\)"),
        ((A.int(), A), {}, r"a's dtype must be one of float64, float32, bfloat16, float16; got int32"),
        ((A, A[:1]), {}, r"b must have a's shape \(2, 4, 3, 3\); got \(1, 4, 3, 3\)"),
        ((A, A.half()), {}, r"b must have a's dtype torch.float32; got torch.float16"),
        ((A, A, ONES[:3]), {}, r"bias must be \(4,\); got \(3,\)"),
        ((A, A, ONES.double()), {}, r"bias must have a's dtype torch.float32; got torch.float64"),
        ((A, A, 1.0), {}, r"bias must be a tensor; got float"),
        ((A, A), {"scale": float("inf")}, r"scale must be finite; got inf"),
        ((A, A), {"scale": ONES}, r"scale must be a real number; got tensor.*"),
        ((A, A), {"backend": "cuda"}, r"backend must be one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=f"^residual_sum: {message}$"):
        residual_sum(*arguments, **options)
