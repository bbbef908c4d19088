"""The operations of EDM2's blocks: mp_sum, mp_silu, mp_cat_silu, pixel_norm_silu, qkv_norm.

Their formulas against PyTorch's, gradients, Triton against float64, memory formats, options, errors.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from parts import is_chosen, parts
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import mp_cat_silu, mp_silu, mp_sum, pixel_norm_silu, qkv_norm, reference
from ipfm.kernels._dispatch import head_config, pixel_config
from ipfm.kernels.mp_silu import unchecked_mp_silu

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAST = torch.channels_last
BACKENDS = ["reference", "triton"]
SEED = torch.tensor(-(2**62) - 7)


@dataclass(frozen=True)
class Operation:
    """An operation on tensors of these shapes, with options."""

    name: str
    function: object
    shapes: tuple[tuple[int, ...], ...]
    options: dict = field(default_factory=dict)

    def __call__(self, tensors, backend=None):
        """All results; without a backend the oracle's."""
        function = getattr(reference, self.function.__name__) if backend is None else self.function
        there = {n: v.to(tensors[0].device) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        found = function(*tensors, **there, **({} if backend is None else {"backend": backend}))
        return list(found) if isinstance(found, tuple) else [found]

    def inputs(self, dtype=torch.float64, device="cpu", layout=torch.contiguous_format, seed=3):
        """Tensors that require gradients; a range cuts none so near its end that 16 bits would tell another story."""
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in self.shapes]
        if "clip" in self.options:
            a, b, t = *made, self.options["t"]
            total, end = reference.mp_sum(a, b, t).abs(), self.options["clip"]
            for tensor in made:
                tensor[(total - end).abs() < 0.1] = 0
        return [
            v.to(device, dtype).contiguous(memory_format=layout if v.ndim == 4 else torch.contiguous_format)
            .requires_grad_() for v in made
        ]  # fmt: skip

    def differentiated(self, tensors, backend=None, only=None, layout=None):
        """Results and the gradients of tensors, `only` of the results with these numbers."""
        results = self(tensors, backend)
        gradients = []
        for i, r in enumerate(results):
            noise = torch.randn(r.shape, generator=torch.Generator().manual_seed(i)).to(r.device, tensors[0].dtype)
            gradients.append(
                noise.to(r.dtype) if layout is None else noise.to(r.dtype).contiguous(memory_format=layout)
            )
        chosen = range(len(results)) if only is None else only
        found = torch.autograd.grad([results[i] for i in chosen], tensors, [gradients[i] for i in chosen])
        return [*(r.detach() for r in results), *found]


def image_operations(shape, further):
    """Operations on images of this shape; `further`: channels of what is joined with them."""
    batch, channels, *sides = shape
    second = (batch, further, *sides)
    return [
        Operation("mp_sum", mp_sum, (shape, shape), {"t": 0.3}),
        Operation("mp_sum clip", mp_sum, (shape, shape), {"t": 0.3, "clip": 1.5}),
        Operation("mp_silu", mp_silu, (shape,)),
        Operation("mp_silu scaled", mp_silu, (shape, (batch, channels))),
        Operation("mp_silu one for all", mp_silu, (shape, (1, channels))),
        Operation("mp_silu dropout", mp_silu, (shape, (batch, channels)), {"dropout": 0.25, "seed": SEED}),
        Operation("mp_cat_silu", mp_cat_silu, (shape, second), {"t": 0.4}),
        Operation("pixel_norm_silu", pixel_norm_silu, (shape,)),
    ]


def token_operations(batch, tokens, heads, width):
    return [Operation("qkv_norm", qkv_norm, ((batch, tokens, 3 * heads * width),), {"heads": heads, "k_scale": 0.3})]


SMALL = [*image_operations((2, 3, 1, 2), 2), *token_operations(2, 2, 2, 3)]
# whole powers; odd sizes; one pixel; several blocks of pixels or of channels, that no power of two divides
OPERATIONS = {
    "powers": [*image_operations((2, 8, 4, 4), 8), *token_operations(2, 4, 2, 8)],
    "odd": [*image_operations((3, 6, 5, 7), 9), *token_operations(3, 5, 3, 7)],
    "one pixel": [*image_operations((2, 4, 1, 1), 4), *token_operations(1, 1, 1, 4)],
    "many": [*image_operations((1, 72, 17, 13), 24), *token_operations(1, 41, 3, 24)],
}
# The interpreter takes long, so that large ones and contiguous ones are left to one dtype.
CASES = [
    (size, operation, dtype, layout)
    for size, operations in OPERATIONS.items()
    for operation in operations
    for layout, dtypes in ((LAST, DTYPES), (torch.contiguous_format, DTYPES[:1]))
    for dtype in (dtypes if size != "many" else [torch.float32 if layout != LAST else torch.bfloat16])
]
# Of those that are left of every dtype a part in which every two of size, operation and dtype meet.
LATER = [
    (size, operation, dtype, LAST)
    for s, (size, operations) in enumerate(list(OPERATIONS.items())[:3])
    for o, operation in enumerate(operations)
    for d, dtype in enumerate(DTYPES)
    if not is_chosen((s, o, d), (3, len(operations), len(DTYPES)))
]
each_operation = pytest.mark.parametrize("operation", OPERATIONS["odd"], ids=lambda o: o.name)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def ids(value: object) -> str:
    return getattr(value, "name", str(value)).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- the mathematics


def test_formulas_by_pytorchs_operations():
    """What the paper writes down, of PyTorch's operations, and not of the reference's."""
    a, b, c = (torch.randn(2, n, 3, 3, dtype=torch.float64) for n in (4, 4, 6))
    torch.testing.assert_close(reference.mp_sum(a, b, 0.3), torch.lerp(a, b, 0.3) / math.sqrt(0.7**2 + 0.3**2))
    assert reference.mp_sum(a, b, 0.3, clip=0.5).abs().max() == 0.5
    torch.testing.assert_close(reference.mp_silu(a), F.silu(a) / 0.596)
    joined, activated = reference.mp_cat_silu(a, c, 0.5)
    torch.testing.assert_close(joined, torch.cat([a * (5 / 4) ** 0.5, c * (5 / 6) ** 0.5], 1))
    torch.testing.assert_close(activated, F.silu(joined) / 0.596)
    normed, activated = reference.pixel_norm_silu(a)
    torch.testing.assert_close(normed, a / (1e-4 + a.square().mean(1, keepdim=True).sqrt()))
    torch.testing.assert_close(activated, F.silu(normed) / 0.596)
    q, k, v = reference.qkv_norm(torch.cat([x.flatten(2).mT for x in (a, b, a)], 2), 2, k_scale=0.5**0.5)
    for got, x in ((q, a), (k, b), (v, a)):
        heads = x.view(2, 2, 2, 9)
        wanted = heads / (1e-4 + heads.square().mean(2, keepdim=True).sqrt())
        torch.testing.assert_close(got, wanted.permute(0, 3, 1, 2) * (0.5**0.5 if got is k else 1))


def test_sizes_are_kept():
    """Of standard normals every result has a root mean square of one."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, 64, 64, generator=generator) for n in (32, 96))
    tokens = torch.randn(2, 64, 3 * 64, generator=generator) * 5
    made = [mp_silu(a), mp_sum(a, a.flip(0), 0.3), *mp_cat_silu(a, b), *pixel_norm_silu(a * 3), *qkv_norm(tokens, 2)]
    for result in made:
        assert float(result.square().mean().sqrt()) == pytest.approx(1, abs=0.02)


@each_backend
@pytest.mark.parametrize("operation", SMALL, ids=ids)
def test_gradcheck(operation, backend):
    def call(*tensors):
        return tuple(operation(tensors, backend))

    assert torch.autograd.gradcheck(call, operation.inputs(), fast_mode=True)


@pytest.mark.parametrize("operation", SMALL, ids=ids)
def test_gradcheck_of_the_oracle(operation):
    assert torch.autograd.gradcheck(lambda *tensors: tuple(operation(tensors)), operation.inputs())


@pytest.mark.parametrize(("size", "operation", "dtype", "layout"), parts(CASES, LATER), ids=ids)
def test_triton_is_no_worse_than_pytorch(size, operation, dtype, layout, device, no_worse):
    """Results and all gradients."""
    tensors = operation.inputs(dtype, device, layout)
    truth = operation.differentiated([t.detach().double().requires_grad_() for t in tensors])
    plain, got = (operation.differentiated(tensors, backend) for backend in BACKENDS)
    assert {g.dtype for g in got} == {dtype}
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r, hair=3)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS["odd"] if len(o.shapes[0]) == 4], ids=ids)
@each_backend
def test_memory_formats(operation, backend, device):
    """The result has the format of the first tensor; others are copied, and a gradient may have any."""
    tensors = operation.inputs(torch.float32, device)
    wanted = operation.differentiated(tensors, backend)
    results = len(wanted) - len(tensors)

    def laid_out(make):
        return [(make(t.detach()) if t.ndim == 4 else t.detach()).requires_grad_() for t in tensors]

    last = laid_out(lambda t: t.contiguous(memory_format=LAST))
    sliced = laid_out(lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2])
    turned = laid_out(lambda t: t.transpose(2, 3).contiguous().transpose(2, 3))
    for given, layout in ((last, LAST), (last, torch.contiguous_format), (sliced, None), (turned, LAST)):
        got = operation.differentiated(given, backend, layout=layout)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        if backend == "triton":
            kept = LAST if given is last else torch.contiguous_format
            assert all(g.is_contiguous(memory_format=kept) for g in got[:results])
    if len(tensors) == 2 and tensors[1].ndim == 4:
        for mixed in ([tensors[0], last[1]], [last[0], tensors[1]], [last[0], sliced[1]]):
            for g, w in zip(operation.differentiated(mixed, backend), wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_rows_of_a_scale_that_are_parts_of_others(device):
    """Or that lie apart: as an embedding's projection for all blocks gives them."""
    x, both = torch.randn(2, 6, 3, 3, device=device), torch.randn(2, 12, device=device)
    for scale in (both[:, 3:9], both[:, ::2], both[:1, ::2].expand(2, -1)):
        scale = scale.detach().requires_grad_()
        plain, got = (mp_silu(x, scale, backend=backend) for backend in BACKENDS)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
        to, wanted = (torch.autograd.grad(y.square().sum(), scale)[0] for y in (got, plain))
        torch.testing.assert_close(to, wanted, rtol=1e-5, atol=1e-4)


def test_a_projection_whose_tokens_lie_apart(device):
    whole = torch.randn(2, 4, 40, device=device)
    for given in (whole[:, :, 2:38], whole[:, :, 2:38].transpose(0, 1)):
        plain, got = (qkv_norm(given, 3, backend=backend) for backend in BACKENDS)
        for g, p in zip(got, plain, strict=True):
            torch.testing.assert_close(g, p, rtol=1e-6, atol=1e-6)
            assert g.is_contiguous()


# ------------------------------------------------------------------------------------------------------- one by one


@each_backend
def test_the_ends_of_the_range_belong_to_it(backend, device):
    """The gradient is 1 inside and at the ends, 0 outside: EDM2's clamp."""
    values = [256.0, -256.0, 255.9375, 256.0625, -256.0625, 1e30, -math.inf, math.inf, 3.0]
    a = torch.tensor(values, dtype=torch.float64, device=device)[None].requires_grad_()
    y = mp_sum(a, torch.zeros_like(a), 0.0, clip=256.0, backend=backend)
    assert y.tolist() == [[256, -256, 255.9375, 256, -256, 256, -256, 256, 3]]
    (da,) = torch.autograd.grad(y.sum(), a)
    assert da.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 1]]


@pytest.mark.pairs
@each_backend
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@each_operation
def test_what_is_not_finite_stays_where_it_is(operation, number, backend, device):
    """In its element, its pixel or its vector of a head; none is lost but what is infinite, where a range cuts it."""
    tensors = [t.detach() for t in operation.inputs(torch.float32, device)]
    clean = operation(tensors, backend)
    x = tensors[0]
    at = (1, 2, 3, 4) if x.ndim == 4 else (1, 2, 30)
    x[at] = number
    if operation.name == "mp_silu dropout":
        assert reference.dropout_mask(x.shape, 0.25, SEED)[at]
    found = operation(tensors, backend)
    changed = sum(int((~f.isfinite()).sum()) for f in found)
    lost = operation.name == "mp_sum clip" and not math.isnan(number)
    # silu of a large negative number is 0, of -inf not a number.
    assert changed == 0 if lost else changed >= 1
    for f, c in zip(found, clean, strict=True):
        same = torch.isclose(f, c, rtol=1e-6, atol=1e-6)
        # Besides the place itself nothing but the channels of its pixel, or of its head, may differ.
        assert int((~same).sum()) <= (6 if operation.name == "pixel_norm_silu" else 7 if "qkv" in operation.name else 1)


@each_backend
def test_where_all_is_zero_there_is_no_direction(backend, device):
    x = torch.zeros(1, 3, 1, 2, device=device)
    x[0, :, 0, 1] = 1
    x.requires_grad_()
    (dx,) = torch.autograd.grad(pixel_norm_silu(x, backend=backend)[0].sum(), x)
    torch.testing.assert_close(dx[..., 0], torch.full((1, 3, 1), 1e4, device=device))
    qkv = torch.zeros(1, 1, 6, device=device, requires_grad=True)
    (dqkv,) = torch.autograd.grad(sum(map(torch.sum, qkv_norm(qkv, 1, k_scale=0.5, backend=backend))), qkv)
    torch.testing.assert_close(dqkv, torch.tensor([[[1e4, 1e4, 5e3, 5e3, 1e4, 1e4]]], device=device))


@each_operation
@each_backend
def test_only_what_is_asked_for_is_differentiated(operation, backend, device):
    tensors = operation.inputs(torch.float32, device)
    full = operation.differentiated(tensors, backend)
    results = len(full) - len(tensors)
    for i, one in enumerate(tensors):
        alone = [t.detach().requires_grad_(t is one) for t in tensors]
        found = operation(alone, backend)
        noise = [
            torch.randn(r.shape, generator=torch.Generator().manual_seed(n)).to(device) for n, r in enumerate(found)
        ]
        (got,) = torch.autograd.grad(found, alone[i], noise)
        torch.testing.assert_close(got, full[results + i], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mp_cat_silu", "pixel_norm_silu", "qkv_norm"])
@each_backend
def test_results_that_nobody_used_have_no_gradient(name, backend, device, no_worse):
    operation = next(o for o in OPERATIONS["odd"] if o.name == name)
    tensors = operation.inputs(torch.float32, device)
    doubled = [t.detach().double().requires_grad_() for t in tensors]
    for i in range(len(operation(tensors, "reference"))):
        truth = operation.differentiated(doubled, only=[i])
        plain, got = (operation.differentiated(tensors, b, only=[i]) for b in ("reference", backend))
        for g, p, r in zip(got[-len(tensors) :], plain[-len(tensors) :], truth[-len(tensors) :], strict=True):
            no_worse(g, p, r, hair=2)


KEPT = {
    "mp_sum": 0,
    "mp_sum clip": 3 * 6 * 5 * 7 // 8 + 1,  # a bit an element
    "mp_silu": 4 * 3 * 6 * 5 * 7,
    "mp_silu scaled": 4 * 3 * 6 * (5 * 7 + 1),
    "mp_cat_silu": 4 * 3 * 15 * 5 * 7,  # the concatenation, which a trained convolution keeps too
    "pixel_norm_silu": 4 * 3 * 6 * 5 * 7,
    "qkv_norm": 4 * 3 * 5 * 3 * 3 * (7 + 1),  # the results, which attention keeps too, and a size of each
}


@pytest.mark.parametrize("operation", [o for o in OPERATIONS["odd"] if o.name in KEPT], ids=ids)
@each_backend
def test_what_autograd_keeps(operation, backend, device):
    """The same on every backend: what is planned on the reference is what a GPU needs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        operation(operation.inputs(torch.float32, device), backend)
    assert sum(kept) == KEPT[operation.name]


@each_operation
def test_the_same_bits_every_time(operation, device):
    tensors = operation.inputs(torch.float32, device)
    first, again = (operation.differentiated(tensors, "triton") for _ in range(2))
    assert all(map(torch.equal, first, again))


@each_operation
@each_backend
def test_no_images(operation, backend, device):
    tensors = [
        (t[:0] if t.shape[0] == operation.shapes[0][0] else t).detach().requires_grad_()
        for t in operation.inputs(torch.float32, device)
    ]
    results = operation(tensors, backend)
    gradients = torch.autograd.grad(sum(r.sum() for r in results), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
    assert all(not g.numel() or not g.any() for g in gradients)


@each_operation
@each_backend
def test_no_second_derivative(operation, backend):
    tensors = operation.inputs(torch.float32)
    total = sum(r.square().sum() for r in operation(tensors, backend))
    with pytest.raises(RuntimeError, match=r"mp_|norm"):
        torch.autograd.grad(total, tensors, create_graph=True)


@pytest.mark.parametrize("operation", [o for o in SMALL if not o.options.get("dropout")], ids=ids)
def test_forward_mode_as_consistency_models_take_it(operation):
    """torch.func.jvp: the derivative along a direction, of the reference."""
    tensors = tuple(t.detach() for t in operation.inputs())
    along = tuple(map(torch.cos, tensors))
    _, got = torch.func.jvp(lambda *given: tuple(operation(given, "auto")), tensors, along)
    step = 1e-6
    ahead, behind = (operation([t + sign * step * d for t, d in zip(tensors, along, strict=True)]) for sign in (1, -1))
    for g, a, b in zip(got, ahead, behind, strict=True):
        torch.testing.assert_close(g, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)


@each_operation
@each_backend
def test_without_autograd_the_same(operation, backend, device):
    tensors = operation.inputs(torch.float32, device)
    wanted = operation(tensors, backend)
    with torch.no_grad():
        assert all(map(torch.equal, operation(tensors, backend), wanted))


# ---------------------------------------------------------------------------------------------------------- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    """Masks differ by seed, sample and place, and not by memory format."""
    ones = torch.ones(4, 30, 40, 40)
    mask = reference.dropout_mask(ones.shape, 0.2, SEED)
    assert float((~mask).double().mean()) == pytest.approx(0.2, abs=0.003)
    for axis in ((0, 2, 3), (1, 2, 3), (0, 1, 2), (0, 1, 3)):
        assert (~mask).double().mean(axis).sub(0.2).abs().max() < 0.03
    for other in (reference.dropout_mask(ones.shape, 0.2, SEED + 1), mask.roll(1, 0), mask.roll(1, 1), mask.roll(1, 3)):
        assert float((mask != other).double().mean()) == pytest.approx(0.32, abs=0.02)
    kept = mp_silu(ones, dropout=0.2, seed=SEED)
    assert float(kept.mean()) == pytest.approx(float(mp_silu(ones).mean()), rel=0.01)
    assert torch.equal(kept, mp_silu(ones.contiguous(memory_format=LAST), dropout=0.2, seed=SEED))


@each_backend
def test_pytorchs_generator_says_what_is_dropped(backend, device):
    """Where no seed is given: the same after the same seed, as the engine gives one for each micro-batch."""
    x = torch.randn(2, 6, 5, 7, device=device)

    def drawn(seed):
        torch.manual_seed(seed)
        return [mp_silu(x, dropout=0.5, backend=backend) for _ in range(2)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    share = float((first[0] == 0).double().mean())
    assert 0.3 < share < 0.7
    torch.testing.assert_close(first[0], torch.where(first[0] == 0, 0, 2 * mp_silu(x)))


def test_dropout_is_computed_again_and_not_kept(device):
    """Autograd keeps x and a number that the mask is made of, and the backward pass drops the same elements."""
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = unchecked_mp_silu(x, dropout=0.5, triton_runs=True)
    assert sorted(kept) == [8, x.nbytes]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, y == 0) and 0 < int((y == 0).sum()) < y.numel()


# ------------------------------------------------------------------------------------------------------- programs


def test_what_a_program_takes():
    assert pixel_config(192, 4096, True) == (256, 8, 4)
    assert pixel_config(1792, 64, True) == (2048, 1, 4)
    assert pixel_config(576, 256, False) == (1024, 8, 16)
    assert pixel_config(3, 4, True) == (16, 4, 1)
    assert head_config(64) == (64, 32, 4)
    assert head_config(35) == (64, 32, 8)


A = torch.zeros(2, 4, 3, 3)
TOKENS = torch.zeros(2, 5, 12)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (mp_sum, (A.int(), A, 0.3), {}, "a's dtype must be one of float64, float32, bfloat16, float16; got int32"),
        (mp_sum, (A, A[:1], 0.3), {}, r"b must have a's shape \(2, 4, 3, 3\); got \(1, 4, 3, 3\)"),
        (mp_sum, (A, A.half(), 0.3), {}, "b must have a's dtype torch.float32; got torch.float16"),
        (mp_sum, (A, A, 1.5), {}, r"t must be in \[0, 1\]; got 1.5"),
        (mp_sum, (A, A, math.nan), {}, r"t must be in \[0, 1\]; got nan"),
        (mp_sum, (A, A, "0.3"), {}, "t must be a real number; got '0.3'"),
        (mp_sum, (A, A, 0.3), {"clip": 0.0}, r"clip must be in \(0, inf\]; got 0.0"),
        (mp_sum, (A, A, 0.3), {"backend": "cuda"}, "backend must be one of auto, triton, reference; got 'cuda'"),
        (mp_silu, (A[0],), {}, r"x must be \(B, C, H, W\); got \(4, 3, 3\)"),
        (mp_silu, (A, A[:, :, 0, 0].double()), {}, "scale must be float32 or float32; got float64"),
        (mp_silu, (A, torch.zeros(3, 4)), {}, r"scale must be \(2, 4\) or \(1, 4\); got \(3, 4\)"),
        (mp_silu, (A, A), {}, r"scale must be \(2, 4\) or \(1, 4\); got \(2, 4, 3, 3\)"),
        (mp_silu, (A, 2.0), {}, "scale must be a tensor; got float"),
        (mp_silu, (A,), {"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        (mp_silu, (A,), {"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\); got -1"),
        (mp_silu, (A,), {"seed": A}, r"seed must be an integer or a 0-d int64 tensor; got float32 \(2, 4, 3, 3\)"),
        (mp_silu, (A,), {"seed": torch.zeros((), dtype=torch.int64, device="meta")}, "seed must be on cpu; got meta"),
        (mp_cat_silu, (A, A[..., 1:]), {}, r"b must be \(2, C, 3, 3\); got \(2, 4, 3, 2\)"),
        (mp_cat_silu, (A, A.double()), {}, "b must have a's dtype torch.float32; got torch.float64"),
        (mp_cat_silu, (A, TOKENS), {}, r"b must be \(B, C, H, W\); got \(2, 5, 12\)"),
        (mp_cat_silu, (A, A, -0.1), {}, r"t must be in \[0, 1\]; got -0.1"),
        (pixel_norm_silu, (TOKENS,), {}, r"x must be \(B, C, H, W\); got \(2, 5, 12\)"),
        (pixel_norm_silu, (A,), {"eps": 0}, r"eps must be in \(0, inf\); got 0"),
        (qkv_norm, (A, 1), {}, r"qkv must be \(B, L, 3·heads·d\); got \(2, 4, 3, 3\)"),
        (qkv_norm, (TOKENS, 3), {}, "3·heads must divide the 12 channels of qkv; got heads=3"),
        (qkv_norm, (TOKENS, 2.0), {}, "3·heads must divide the 12 channels of qkv; got heads=2.0"),
        (qkv_norm, (TOKENS, 2), {"k_scale": 0}, "k_scale must not be 0"),
        (qkv_norm, (TOKENS, 2), {"k_scale": math.inf}, "k_scale must be finite; got inf"),
    ],
)  # fmt: skip
def test_refusals(function, arguments, options, message):
    with pytest.raises(ValueError, match=f"^{function.__name__}: {message}$"):
        function(*arguments, **options)


def test_tensors_without_values_give_such():
    for operation in OPERATIONS["odd"]:
        if "dropout" in operation.options:
            continue
        tensors = operation.inputs(torch.float32)
        wanted = operation(tensors, "reference")
        got: list[Tensor] = operation([t.to("meta") for t in tensors], "auto")
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in wanted]
