"""group_norm_silu: gradcheck of the formula, Triton and the recomputing form against float64, layouts, errors."""

import pytest
import torch
from torch.nn import functional as F

from ipfm.kernels import group_norm, group_norm_reference, group_norm_silu, reference
from ipfm.kernels._dispatch import group_config, lane_config
from ipfm.kernels.group_norm import branching_group_norm_silu, unchecked_group_norm_silu

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty", "nothing_is_small"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, C, H, W), groups: whole powers, odd sizes, one pixel, groups of six channels, one that does not stay in registers
SHAPES = [((2, 8, 4, 4), 4), ((3, 6, 5, 7), 3), ((2, 4, 1, 1), 2), ((1, 12, 3, 5), 2), ((1, 4, 47, 53), 2)]
FORMS = ["plain", "scaled", "one for all"]


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference treats these little inputs as it does large ones."""
    monkeypatch.setattr(group_norm_reference, "SMALL", 0)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(shape, dtype=torch.float64, form="scaled", device="cpu", layout=torch.contiguous_format):
    """x, weight, bias, scale, shift, gradient of y; the means of x are far from 0, where one pass would lose digits."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = (draw(*shape) + 3 * draw(shape[0], shape[1], 1, 1)).to(device, dtype).contiguous(memory_format=layout)
    weight, bias = (1 + 0.5 * draw(shape[1])).to(device, dtype), draw(shape[1]).to(device, dtype)
    rows = 1 if form == "one for all" else shape[0]
    # Two halves of one tensor, as a network's embedding gives them.
    both = (0.5 * draw(rows, 2 * shape[1], 1, 1)).to(device, dtype)
    scale, shift = (None, None) if form == "plain" else both.chunk(2, dim=1)
    return [x, weight, bias, scale, shift], draw(*shape).to(device, dtype)


def differentiated(function, tensors, gradient, groups, **options):
    """[y, ∂x, ∂weight, ∂bias, ∂scale, ∂shift], as far as there are such."""
    x, weight, bias, scale, shift = (None if t is None else t.detach().requires_grad_() for t in tensors)
    y = function(x, groups, weight, bias, scale=scale, shift=shift, **options)
    wanted = [t for t in (x, weight, bias, scale, shift) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, gradient.to(y.dtype))]


def together(results, truth):
    """The parameters' gradients in one: of the few numbers of each, either side's may be lucky."""
    sizes = [r.square().mean().sqrt() for r in truth[2:]]
    return torch.cat([(v / size.to(v.dtype)).flatten() for v, size in zip(results[2:], sizes, strict=True)])


@pytest.mark.parametrize("form", FORMS)
def test_the_formula_is_pytorchs(form):
    tensors, gradient = inputs((3, 6, 4, 5), form=form)

    def plain(x, groups, weight, bias, *, scale, shift):
        n = F.group_norm(x, groups, weight, bias, 1e-5)
        return F.silu(n if scale is None else n * (scale + 1) + shift)

    ours, theirs = (differentiated(function, tensors, gradient, 3) for function in (reference.group_norm_silu, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    tensors, _ = inputs((2, 4, 2, 3), form=form)
    given = [t.detach().requires_grad_() for t in tensors if t is not None]

    def run(backend):
        def call(x, weight, bias, scale=None, shift=None):
            if backend is None:
                return reference.group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)
            return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, backend=backend)

        return call

    for backend in (None, "reference"):
        assert torch.autograd.gradcheck(run(backend), given)


@pytest.mark.pairs
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=ids)
def test_triton_is_no_worse_than_pytorch(shape, groups, dtype, form, device, no_worse):
    """Value and all gradients, on a grid of shapes, dtypes and options."""
    tensors, gradient = inputs(shape, dtype, form, device)
    doubled = [None if t is None else t.double() for t in tensors]
    truth = differentiated(reference.group_norm_silu, doubled, gradient.double(), groups)
    plain = differentiated(group_norm_silu, tensors, gradient, groups, backend="reference")
    got = differentiated(group_norm_silu, tensors, gradient, groups, backend="triton")
    assert {g.dtype for g in got} == {dtype}
    for g, p, r in zip(got[:2], plain, truth, strict=False):
        no_worse(g, p, r, hair=2)
    no_worse(together(got, truth), together(plain, truth), together(truth, truth), hair=2)


@pytest.mark.parametrize("form", ["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize(("shape", "groups"), [SHAPES[1], SHAPES[4]], ids=ids)
def test_without_silu(shape, groups, dtype, form, device, no_worse):
    """What goes into it, and its gradients."""
    tensors, gradient = inputs(shape, dtype, form, device)
    doubled = [None if t is None else t.double() for t in tensors]
    truth = differentiated(reference.group_norm_silu, doubled, gradient.double(), groups, activation=False)
    plain, got = (
        differentiated(group_norm_silu, tensors, gradient, groups, activation=False, backend=backend)
        for backend in ("reference", "triton")
    )
    x, weight, bias, scale, shift = doubled
    written = F.group_norm(x, groups, weight, bias, 1e-5)
    written = written if scale is None else written * (scale + 1) + shift
    torch.testing.assert_close(truth[0], written, rtol=1e-10, atol=1e-10)
    for g, p, r in zip(got[:2], plain, truth, strict=False):
        no_worse(g, p, r, hair=2)
    no_worse(together(got, truth), together(plain, truth), together(truth, truth), hair=2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "mixed"])
def test_memory_layouts(layout, backend, device):
    """channels_last in, channels_last out; what is neither is copied; a gradient of the other format fits too."""
    (x, *rest), gradient = inputs((2, 8, 3, 5), torch.float32, device=device)
    expected = differentiated(group_norm_silu, [x, *rest], gradient, 4, backend=backend)
    if layout == "sliced":
        x = torch.cat([x, x], dim=3)[..., :5]
    else:
        x = x.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        gradient = gradient.to(memory_format=torch.channels_last)
    got = differentiated(group_norm_silu, [x, *rest], gradient, 4, backend=backend)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    last = layout != "sliced"
    assert got[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------- the addend

ADDENDS = {"of each image": (3,), "of all images": (1,), "a bias": ()}


def with_addend(function, tensors, gradient, groups, **options):
    """[y, ∂x, ∂weight, ∂bias, ∂scale, ∂shift, ∂addend], as far as there are such."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, bias, scale, shift, addend = tensors
    y = function(x, groups, weight, bias, scale=scale, shift=shift, addend=addend, **options)
    wanted = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, gradient.to(y.dtype))]


def addend_inputs(shape, rows, dtype=torch.float64, form="scaled", device="cpu", **options):
    tensors, gradient = inputs(shape, dtype, form, device, **options)
    generator = torch.Generator().manual_seed(5)
    addend = 0.5 * torch.randn(*rows, shape[1], generator=generator, dtype=torch.float64)
    return [*tensors, addend.to(device, dtype)], gradient


@pytest.mark.parametrize("rows", ADDENDS.values(), ids=ADDENDS)
def test_an_addend_is_added_before_it_is_normalised(rows):
    tensors, gradient = addend_inputs((3, 6, 4, 5), rows)

    def written_out(x, groups, weight, bias, *, scale, shift, addend):
        n = F.group_norm(x + addend[..., None, None], groups, weight, bias, 1e-5)
        return F.silu(n * (scale + 1) + shift)

    wanted = with_addend(written_out, tensors, gradient, 3)
    for function, options in ((reference.group_norm_silu, {}), (group_norm_silu, {"backend": "reference"})):
        for a, b in zip(with_addend(function, tensors, gradient, 3, **options), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rows", [(2,), ()], ids=["of each image", "a bias"])
def test_gradcheck_of_an_addend(rows, backend):
    tensors, _ = addend_inputs((2, 4, 1, 2), rows)
    given = [t.detach().requires_grad_() for t in tensors]

    def call(x, weight, bias, scale, shift, addend):
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, addend=addend, backend=backend)

    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@pytest.mark.pairs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("shape", "groups", "rows", "form"),
    [((3, 6, 5, 7), 3, (3,), "plain"), ((3, 12, 2, 5), 2, (1,), "scaled"), ((1, 4, 47, 53), 2, (), "one for all")],
    ids=ids,
)
def test_triton_with_an_addend_is_no_worse_than_pytorch(shape, groups, rows, form, dtype, layout, device, no_worse):
    """Odd sizes, in registers and not, with and without scale and shift."""
    tensors, gradient = addend_inputs(shape, rows, dtype, form, device, layout=layout)
    doubled = [None if t is None else t.double() for t in tensors]
    truth = with_addend(reference.group_norm_silu, doubled, gradient.double(), groups)
    plain, got = (
        with_addend(group_norm_silu, tensors, gradient, groups, backend=backend) for backend in ("reference", "triton")
    )
    assert {g.dtype for g in got} == {dtype} and got[0].stride() == tensors[0].stride()
    for g, p, r in zip(got[:2], plain, truth, strict=False):
        no_worse(g, p, r, hair=2)
    # The gradient of the addend is a sum in which all but the rounding of its terms may cancel.
    worst, theirs = ((r[-1].double() - truth[-1]).abs().max() for r in (got, plain))
    terms = truth[1].abs().sum((2, 3)).sum_to_size((*rows, shape[1]) if len(rows) else (1, shape[1]))
    assert worst <= theirs + 2 * torch.finfo(dtype).eps * terms.max()
    no_worse(together(got[:-1], truth[:-1]), *(together(r[:-1], truth[:-1]) for r in (plain, truth)), hair=2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_addend_that_is_a_part_of_a_larger_tensor(backend, device):
    """A column of all projections of an embedding, in which neither rows nor channels need be dense."""
    tensors, gradient = addend_inputs((3, 4, 3, 3), (3,), torch.float32, device=device)
    wanted = with_addend(group_norm_silu, tensors, gradient, 2, backend=backend)
    for parts in (torch.cat([tensors[5]] * 3, dim=1)[:, 4:8], tensors[5].repeat_interleave(2, dim=1)[:, ::2]):
        assert not parts.is_contiguous()
        (x, weight, bias, scale, shift), leaf = tensors[:5], parts.detach().requires_grad_()
        y = group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, addend=leaf, backend=backend)
        (got,) = torch.autograd.grad(y, leaf, gradient)
        assert torch.equal(y, wanted[0]) and torch.equal(got, wanted[-1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_addend_that_is_not_finite_spoils_its_group_alone(backend, device):
    (x, weight, bias, *_), _ = inputs((2, 4, 3, 3), torch.float32, device=device)
    for value in (torch.inf, torch.nan):
        addend = torch.zeros(2, 4, device=device)
        addend[0, 1] = value
        y = group_norm_silu(x, 2, weight, bias, addend=addend, backend=backend)
        assert y[0, :2].isnan().all()
        assert y[0, 2:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=ids)
@pytest.mark.parametrize(
    ("shape", "groups"), [SHAPES[0], SHAPES[4], ((2, 24, 4, 4), 4)], ids=["resident", "not-resident", "lanes"]
)
def test_the_gradient_of_what_else_is_made_of_x_is_added(shape, groups, dtype, layout, device, no_worse):
    """Where that of the normalisation is stored, which both are no worse for than PyTorch's sum of the two."""
    (x, weight, bias, _, _), gradient = inputs(shape, dtype, "plain", device, layout)
    other = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(device, dtype)

    def run(x, weight, bias, dtype, branching):
        x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
        if branching:
            y, same = branching_group_norm_silu(x, groups, weight, bias, eps=1e-5, activation=True)
            assert torch.equal(same, x)
        else:
            y, same = F.silu(F.group_norm(x, groups, weight, bias, 1e-5)), x
        total = (y * gradient.to(dtype)).sum() + (same * other.to(dtype)).sum()
        return [y.detach(), *torch.autograd.grad(total, (x, weight, bias))]

    truth = run(x, weight, bias, torch.float64, False)
    for g, p, r in zip(run(x, weight, bias, dtype, True), run(x, weight, bias, dtype, False), truth, strict=True):
        no_worse(g, p, r, hair=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("form", ["plain", "scaled"])
def test_rows_of_parameters_get_the_gradients_of_each_sample(form, dtype, device):
    """As a network joins its small vectors: in float32, one row for all samples."""
    (x, weight, bias, scale, shift), gradient = inputs(SHAPES[0][0], dtype, form, device)
    given = {"scale": scale, "shift": shift, "eps": 1e-5, "activation": True, "triton_runs": True}

    def run(x, gradient, weight, bias, **given):
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        y = unchecked_group_norm_silu(x, 4, weight, bias, **given)
        return y.detach(), *torch.autograd.grad(y, (weight, bias), gradient)

    def rows(vector):
        return vector.float().expand(len(x), -1)

    y, to_weight, to_bias = run(x, gradient, rows(weight), rows(bias), **given)
    expected, whole_weight, whole_bias = run(x, gradient, weight, bias, **given)
    assert torch.equal(y, expected)
    assert to_weight.dtype == to_bias.dtype == torch.float32
    torch.testing.assert_close(to_weight.sum(0).to(dtype), whole_weight)
    torch.testing.assert_close(to_bias.sum(0).to(dtype), whole_bias)
    for i in range(len(x)):
        one = {name: v[i : i + 1] if name in ("scale", "shift") and v is not None else v for name, v in given.items()}
        _, alone, alone_bias = run(x[i : i + 1], gradient[i : i + 1], weight.float(), bias.float(), **one)
        assert torch.equal(to_weight[i], alone) and torch.equal(to_bias[i], alone_bias)


def test_branches_of_which_one_is_not_used(device):
    (x, weight, bias, _, _), gradient = inputs(SHAPES[0][0], form="plain", device=device)
    x.requires_grad_()
    y, same = branching_group_norm_silu(x, 4, weight, bias, eps=1e-5, activation=True)
    (alone,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    torch.testing.assert_close(alone, torch.autograd.grad(group_norm_silu(x, 4, weight, bias), x, gradient)[0])
    assert torch.equal(torch.autograd.grad(same, x, gradient, retain_graph=True)[0], gradient)
    # A gradient with gaps, as a part of concatenated channels has it.
    part = gradient.repeat(1, 2, 1, 1)[:, ::2]
    both = torch.autograd.grad((y, same), x, (gradient, part), retain_graph=True)[0]
    torch.testing.assert_close(both, alone + part)
    with pytest.raises(RuntimeError, match=r"^group_norm_silu has no second derivative"):
        torch.autograd.grad(y, x, gradient, create_graph=True)
    with torch.no_grad():
        assert branching_group_norm_silu(x, 4, weight, bias, eps=1e-5, activation=True)[1] is not None


@pytest.mark.parametrize("channels", [8, 12], ids=["tiles", "lanes"])
def test_a_factor_of_what_the_backward_pass_stores(channels, device):
    """Of the gradient of x and what is added to it, and of nothing else."""
    (x, weight, bias, _, _), gradient = inputs((1, channels, 3, 3), torch.float32, "plain", device, torch.channels_last)
    more = gradient.flip(0, 1)
    parameters = (weight, bias, None, None, None)
    _, statistics = group_norm.forward_pass(x, 2, parameters, eps=1e-5, activation=True)
    asked = (True, True, False, False, False)
    plain = group_norm.backward_pass(gradient, x, parameters, statistics, asked, True, more)
    halved = group_norm.backward_pass(gradient, x, parameters, statistics, asked, True, more, 0.5)
    assert torch.equal(halved[0], plain[0] / 2)
    assert torch.equal(halved[1], plain[1]) and torch.equal(halved[2], plain[2])


def test_without_autograd_the_values_are_the_same(device):
    tensors, _ = addend_inputs((2, 8, 3, 3), (2,), torch.float32, device=device)
    x, weight, bias, scale, shift, addend = tensors

    def run():
        return group_norm_silu(x, 4, weight, bias, scale=scale, shift=shift, addend=addend, backend="triton")

    plain = run()
    x.requires_grad_()
    with torch.no_grad():
        assert torch.equal(run(), plain) and not run().requires_grad
    with torch.inference_mode():
        assert torch.equal(run(), plain)
    assert torch.equal(run(), plain) and run().requires_grad


# ------------------------------------------------------------------------------------------------------- situations


def test_a_variance_that_one_pass_would_lose(device):
    """Mean 1000, deviation 1: the squares' difference in float32 has no digit left of it."""
    generator = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(1, 4, 8, 8, generator=generator)).to(device)
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    truth = reference.group_norm_silu(x.double(), 2, ones.double(), zeros.double())
    got = group_norm_silu(x, 2, ones, zeros, backend="triton")
    torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_group_keeps_its_infinities_to_itself(backend, device):
    (x, weight, bias, *_), _ = inputs((2, 4, 3, 3), torch.float32, device=device)
    x[0, 1, 2, 0] = torch.inf
    y = group_norm_silu(x, 2, weight, bias, backend=backend)
    assert not y[0, :2].isfinite().any()
    assert y[0, 2:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_only_what_is_asked_for_is_differentiated(backend, device):
    tensors, gradient = inputs((2, 4, 3, 3), torch.float32, device=device)
    x, weight, bias, scale, shift = tensors
    full = differentiated(group_norm_silu, tensors, gradient, 2, backend=backend)
    for i, one in enumerate(tensors):
        one.requires_grad_()
        y = group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, backend=backend)
        (got,) = torch.autograd.grad(y, one, gradient)
        assert torch.equal(got, full[i + 1])
        one.requires_grad_(False)


def test_the_same_bits_every_time(device):
    tensors, gradient = inputs((2, 8, 5, 5), torch.float32, device=device)
    first, again = (differentiated(group_norm_silu, tensors, gradient, 4, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_no_images(device):
    (x, weight, bias, *_), _ = inputs((2, 4, 3, 3), torch.float32, device=device)
    x = x[:0].requires_grad_()
    y = group_norm_silu(x, 2, weight.requires_grad_(), bias, backend="triton")
    assert y.shape == (0, 4, 3, 3)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros_like(weight))


def test_autograd_keeps_the_input_alone(device):
    (x, *rest), _ = inputs((2, 8, 16, 16), torch.float32, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_norm_silu(x.requires_grad_(), 4, *rest[:2], scale=rest[2], shift=rest[3], backend="triton")
    large = [t for t in kept if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def test_blocks_fill_registers_and_sectors():
    assert group_config(8, 32, 1024, 2, False)[:3] == (1, 8, 256)  # read twice
    assert group_config(8, 32, 256, 2, False)[:3] == (1, 8, 256)  # once
    assert group_config(8, 32, 256, 2, True)[:2] == (4, 8)  # 64 bytes of bf16
    assert group_config(8, 32, 256, 4, True)[:2] == (2, 8)
    assert group_config(6, 32, 4096, 4, True)[:2] == (4, 8)
    assert group_config(8, 1, 256, 2, True)[0] == 1


def test_many_warps_hold_what_is_wide_in_channels_last():
    assert group_config(8, 32, 256, 2, True) == (4, 8, 256, 16)
    assert group_config(8, 32, 1024, 2, True) == (4, 8, 1024, 16)
    assert group_config(8, 32, 1024, 4, True) == (2, 8, 1024, 32)
    assert group_config(8, 32, 256, 2, True, backward=True) == (4, 8, 256, 32)
    # 32 bytes of a pixel, on the way back in 16 bits: twice the registers for half of the groups.
    assert group_config(8, 32, 1024, 2, True, backward=True) == (2, 8, 1024, 16)
    assert group_config(16, 32, 1024, 2, True, backward=True) == (1, 16, 1024, 16)
    assert group_config(4, 32, 1024, 2, True, backward=True)[2:] == (64, 8)
    # Read again: with scale and shift, on the way back in 32, in float64, and groups larger than all registers.
    assert group_config(8, 32, 1024, 2, True, scaled=True)[2:] == (64, 8)
    assert group_config(8, 32, 1024, 4, True, backward=True)[2:] == (128, 8)
    assert group_config(8, 32, 1024, 8, True)[2] < 1024
    assert group_config(8, 32, 4096, 2, True)[2:] == (64, 8)


@pytest.mark.parametrize(("side", "scaled", "dtype"), [(16, True, torch.float32), (32, False, torch.bfloat16)], ids=ids)
def test_large_groups_in_registers_are_no_worse_than_pytorch(side, scaled, dtype, device, no_worse):
    form = "scaled" if scaled else "plain"
    tensors, gradient = inputs((1, 32, side, side), dtype, form, device, torch.channels_last)
    assert group_config(8, 4, side * side, dtype.itemsize, True, scaled=scaled)[2] == side * side
    doubled = [None if t is None else t.double() for t in tensors]
    truth = differentiated(reference.group_norm_silu, doubled, gradient.double(), 4)
    plain, got = (differentiated(group_norm_silu, tensors, gradient, 4, backend=b) for b in ("reference", "triton"))
    for g, p, r in zip(got[:2], plain, truth, strict=False):
        no_worse(g, p, r, hair=2)
    no_worse(together(got, truth), together(plain, truth), together(truth, truth), hair=2)


# ------------------------------------------------------------------- channels that are no power of two, channels_last


def test_no_lane_is_idle_for_the_channel_counts_of_adm():
    """Channels a group of every level, and of what is concatenated: at least 85 % of the lanes, in whole sectors."""
    levels = {6: [64], 12: [64, 32], 18: [64], 24: [32, 16, 8], 30: [32], 36: [16], 42: [16], 48: [8]}
    for channels, sides in levels.items():
        for side in sides:
            together, lanes, warps = lane_config(channels, 32, side * side, 2)
            width, pixels = together * channels, side * side
            steps = -(-pixels // (lanes // width))
            assert pixels * width / (steps * lanes) > 0.85, (channels, side)
            assert width * 2 % 32 == 0 and lanes == 256 * warps and 32 % together == 0
    assert lane_config(8, 32, 1024, 2) is None  # a tile has no idle lane either
    assert lane_config(3, 1, 64, 2) is None  # nothing is aligned
    assert lane_config(6, 32, 4096, 8)[0] == 2
    assert lane_config(5000, 2, 16, 4) is None  # a pixel alone is too wide


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("shape", "groups", "rows", "form"),
    [
        ((2, 48, 5, 7), 8, (2,), "scaled"),
        ((1, 24, 9, 9), 2, (1,), "plain"),
        ((2, 48, 3, 1), 1, (), "one for all"),
        ((1, 336, 4, 4), 8, (1,), "scaled"),
        ((1, 48, 23, 19), 4, (), "plain"),
    ],
    ids=ids,
)
def test_lanes_are_no_worse_than_pytorch(shape, groups, rows, form, dtype, device, no_worse):
    """Groups of 6, 12, 48 and 42 channels, one step and many, one group and several a program."""
    if lane_config(shape[1] // groups, groups, shape[2] * shape[3], dtype.itemsize) is None:
        pytest.fail("this shape would go by tiles")
    tensors, gradient = addend_inputs(shape, rows, dtype, form, device, layout=torch.channels_last)
    doubled = [None if t is None else t.double() for t in tensors]
    truth = with_addend(reference.group_norm_silu, doubled, gradient.double(), groups)
    plain, got = (with_addend(group_norm_silu, tensors, gradient, groups, backend=b) for b in ("reference", "triton"))
    assert {g.dtype for g in got} == {dtype}
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for g, p, r in zip(got[:2], plain, truth, strict=False):
        no_worse(g, p, r, hair=2)
    worst, theirs = ((r[-1].double() - truth[-1]).abs().max() for r in (got, plain))
    terms = truth[1].abs().sum((2, 3)).sum_to_size((*rows, shape[1]) if len(rows) else (1, shape[1]))
    assert worst <= theirs + 2 * torch.finfo(dtype).eps * terms.max()
    no_worse(together(got[:-1], truth[:-1]), *(together(r[:-1], truth[:-1]) for r in (plain, truth)), hair=2)


def test_lanes_without_options(device):
    """No addend, no SiLU, and one group whose infinity stays in it."""
    (x, weight, bias, *_), gradient = inputs((2, 24, 3, 5), torch.float32, "plain", device, torch.channels_last)
    assert lane_config(6, 4, 15, 4) is not None
    for activation in (True, False):
        truth, got = (
            differentiated(f, [t, *more, None, None], gradient.to(t.dtype), 4, activation=activation, **options)
            for f, t, more, options in (
                (reference.group_norm_silu, x.double(), (weight.double(), bias.double()), {}),
                (group_norm_silu, x, (weight, bias), {"backend": "triton"}),
            )
        )
        for g, r in zip(got, truth, strict=True):
            torch.testing.assert_close(g.double(), r, rtol=1e-4, atol=1e-4)
    x[0, 7, 1, 2] = torch.inf
    y = group_norm_silu(x, 4, weight, bias, backend="triton")
    assert y[0, 6:12].isfinite().logical_not().all()
    assert y[0, :6].isfinite().all() and y[0, 12:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_silu_where_its_exponential_ends(backend, device):
    """Far from 0 on both sides: no NaN, and gradients of 1 and 0."""
    u = torch.tensor([-1e4, -200.0, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4], dtype=torch.float32)
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, 10, 1, 2).to(device).contiguous()
    weight, bias = torch.zeros(10, device=device), u.to(device).requires_grad_()
    y = group_norm_silu(x, 10, weight, bias, backend=backend)
    (slope,) = torch.autograd.grad(y[..., 0].sum(), bias)
    wide = u.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    torch.testing.assert_close(y[0, :, 0, 0].double().cpu(), F.silu(wide).detach(), rtol=1e-5, atol=1e-35)
    torch.testing.assert_close(slope.double().cpu(), wanted, rtol=1e-5, atol=1e-35)


X = torch.zeros(2, 4, 3, 3)
C, P = torch.ones(4), torch.zeros(2, 4, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 4), 2, C, C), {}, r"x must be \(B, C, H, W\); got \(2, 4\)"),
        ((X.int(), 2, C, C), {}, r"x's dtype must be one of float64, float32, bfloat16, float16; got int32"),
        ((X, 3, C, C), {}, r"groups must be a divisor of the 4 channels; got 3"),
        ((X, 0, C, C), {}, r"groups must be a divisor of the 4 channels; got 0"),
        ((X, True, C, C), {}, r"groups must be a divisor of the 4 channels; got True"),
        ((X, 2, C[:3], C), {}, r"weight must be \(4,\); got \(3,\)"),
        ((X, 2, C, C.double()), {}, r"bias must have x's dtype torch.float32; got torch.float64"),
        ((X, 2, C, C), {"scale": P}, r"scale and shift go together; got scale alone"),
        ((X, 2, C, C), {"shift": P}, r"scale and shift go together; got shift alone"),
        (
            (X, 2, C, C),
            {"scale": P[..., 0], "shift": P},
            r"scale must be \(2, 4, 1, 1\) or \(1, 4, 1, 1\); got \(2, 4, 1\)",
        ),
        ((X, 2, C, C), {"addend": P}, r"addend must be \(2, 4\) or \(1, 4\) or \(4,\); got \(2, 4, 1, 1\)"),
        ((X, 2, C, C), {"addend": C.half()}, r"addend must have x's dtype torch.float32; got torch.float16"),
        ((X, 2, C, C), {"addend": 1.0}, r"addend must be a tensor; got float"),
        ((X, 2, C, C), {"eps": 0.0}, r"eps must be in \(0, inf\); got 0.0"),
        ((X, 2, C, C), {"backend": "cuda"}, r"backend must be one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=f"^group_norm_silu: {message}$"):
        group_norm_silu(*arguments, **options)
