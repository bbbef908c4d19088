"""Both losses with real data beside: the printed numbers, the formula by autograd, both backends, refusals."""

import math

import pytest
import torch
from preconditioned import preconditioned

from ipfm.kernels import denoising_loss, ipfm_loss, reference

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # NumPy's, in the interpreter, about the sample that is not finite.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
WEIGHTS = (0.92, 0.94)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
# (a, b), k, alpha -> L, dL/dT, dL/dS, dL/dy at T = 0.3, S = 0.1, y = 0.5, x = 0.9 with a weight of 1.
SCALARS = [
    ((1.0, 1.0), 0.0, 1.0, (-0.16, -0.8, 1.2, -0.4)),
    ((0.92, 0.94), 0.0, 0.5, (-0.1144, -0.388, 0.756, -0.376)),
    ((0.92, 0.94), 0.2, 0.5, (-0.11296, -0.3808, 0.7488, -0.3744)),
    ((0.92, 0.94), 0.2, 1.0, (-0.14976, -0.7488, 1.1168, -0.3744)),
    ((0.98, 0.96), 0.2, 1.2, (-0.16992, -0.928, 1.32, -0.3856)),
]


@BACKENDS
@pytest.mark.parametrize(("weights", "k", "alpha", "wanted"), SCALARS)
def test_one_scalar(weights, k, alpha, wanted, backend, device):
    """The weight is that of |y - T|, 1 / 0.2 here; with an offset the raw outputs are those of c_out = 2."""
    T, S, y, x = (torch.tensor([[v]], dtype=torch.float64, device=device) for v in (0.3, 0.1, 0.5, 0.9))
    given = {"alpha": alpha, "real_weights": weights, "backend": backend}
    if k == 0:
        got = ipfm_loss(T, S, y, **given)
        found = (got.loss, got.dt, got.ds, got.dy)
    else:
        skip, out = torch.full((1,), k, dtype=torch.float64, device=device), 2.0
        raw = ((v - k * x) / out for v in (T, S))
        got = ipfm_loss(*raw, y, x=x, c_skip=skip, c_out=torch.full_like(skip, out), **given)
        dt, ds = got.dt / out, got.ds / out
        # What it gives for y has the way through T and S too.
        found = (got.loss, dt, ds, got.dy - k * (dt + ds))
    values = torch.stack([v.flatten()[0] for v in found]).cpu() * 0.2
    torch.testing.assert_close(values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert got.weight.item() == pytest.approx(5.0, rel=1e-14)


@BACKENDS
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 4100)])
def test_gradients_are_those_of_the_formula(shape, backend, device):
    """By autograd, y with all of its parts: its own, the offset, and T and S."""
    a, b = WEIGHTS
    t, s, y, sigma, known = preconditioned(shape, device=device)
    leaves = [v.requires_grad_() for v in (t, s, y)]
    column = [-1, *[1] * (y.ndim - 1)]
    skip, out = known["c_skip"].view(column), known["c_out"].view(column)
    x = y + (known["x"] - y).detach()
    T, S, c = skip * x + out * t, skip * x + out * s, skip * x
    dims = tuple(range(1, y.ndim))
    weight = 1 / (T - y).detach().abs().mean(dims)
    e, delta = a * (T - c) - b * (y - c), T - S
    loss = 2 * weight * (delta * (e - 1.2 * a * delta)).sum(dims)
    wanted = torch.autograd.grad(loss.sum(), leaves)
    got = ipfm_loss(
        t.detach(), s.detach(), y.detach(), alpha=1.2, real_weights=WEIGHTS, backend=backend,
        **{n: v.detach() for n, v in known.items()},
    )  # fmt: skip
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-10, atol=1e-10)
    for gradient, expected in zip((got.dt, got.ds, got.dy), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    # a times the loss without real data at the shifted target, weighed by the target that is not shifted.
    shifted = c + b / a * (y - c)
    plain = ipfm_loss(T.detach(), S.detach(), shifted.detach(), alpha=1.2)
    torch.testing.assert_close(got.loss, a * plain.loss * (weight / plain.weight), rtol=1e-10, atol=1e-10)

    pred = t.detach().requires_grad_()
    for stretch, share in ((b / a, a), ((1 - b) / (1 - a), 1 - a)):
        target = c + stretch * (y - c)
        w = share * (4 + 1 / sigma**2)
        expected = w * (skip * x + out * pred - target).square().sum(dims)
        (gradient,) = torch.autograd.grad(expected.sum(), pred, retain_graph=True)
        found = denoising_loss(
            pred.detach(), y.detach(), sigma, stretch=stretch, share=share, backend=backend,
            **{n: v.detach() for n, v in known.items()},
        )  # fmt: skip
        torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-11, atol=0)
        torch.testing.assert_close(found.grad, gradient, rtol=1e-11, atol=1e-11)
        bare = denoising_loss(t.detach(), y.detach(), sigma, stretch=stretch, share=share, backend=backend)
        scaled = denoising_loss(t.detach(), stretch * y.detach(), sigma)
        torch.testing.assert_close(bare.loss, share * scaled.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("raw", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_is_no_worse_than_pytorch(raw, inplace, device, no_worse):
    t, s, y, sigma, known = preconditioned((2, 3, 8, 8), torch.float32, device, raw)
    wide = {name: v.double() for name, v in known.items()}
    arguments = {"alpha": 1.0, "real_weights": WEIGHTS}
    truth = reference.ipfm_loss(t.double(), s.double(), y.double(), **wide, **arguments)
    plain = ipfm_loss(t, s, y, **known, **arguments, backend="reference")
    got = ipfm_loss(t.clone(), s.clone(), y, **known, **arguments, inplace=inplace, backend="triton")
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r)
    given = {"stretch": 0.94 / 0.92, "share": 0.92}
    truth = reference.denoising_loss(t.double(), y.double(), sigma, **wide, **given)
    plain = denoising_loss(t, y, sigma, **known, **given, backend="reference")
    for g, p, r in zip(denoising_loss(t, y, sigma, **known, **given, backend="triton"), plain, truth, strict=True):
        no_worse(g, p, r)


@BACKENDS
def test_weights_of_one_are_the_losses_without_real_data_bit_for_bit(backend, device):
    t, s, y, sigma, known = preconditioned((3, 2, 4, 5), torch.float32, device)
    for form in ({}, known):
        plain = ipfm_loss(t, s, y, alpha=1.2, backend=backend, **form)
        same = ipfm_loss(t, s, y, alpha=1.2, real_weights=(1, 1), backend=backend, **form)
        assert all(torch.equal(p, q) for p, q in zip(plain, same, strict=True))
        one = denoising_loss(t, y, sigma, backend=backend, **form)
        other = denoising_loss(t, y, sigma, stretch=1, share=1, backend=backend, **form)
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@BACKENDS
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_nothing_moves_where_teacher_and_student_agree(alpha, backend, device):
    """dT = -dS, so that together with equal networks they cancel, and dy and the loss are 0 exactly."""
    t, _, y, _, known = preconditioned((3, 2, 4, 5), torch.float32, device)
    got = ipfm_loss(t, t.clone(), y, alpha=alpha, real_weights=WEIGHTS, backend=backend, **known)
    assert not got.loss.any() and not got.dy.any() and torch.equal(got.dt, -got.ds) and bool(got.dt.any())


@BACKENDS
def test_a_sample_that_is_not_finite_is_alone(backend, device):
    t, s, y, sigma, known = preconditioned((3, 35), torch.float32, device)
    arguments = {"alpha": 1.0, "real_weights": WEIGHTS, "backend": backend}
    clean = ipfm_loss(t, s, y, **known, **arguments)
    bad = y.clone()
    bad[1, 3] = math.inf
    got = ipfm_loss(t, s, bad, **known, **arguments)
    found = denoising_loss(t, bad, sigma, stretch=1.02, share=0.92, backend=backend, **known)
    assert got.valid.tolist() == found.valid.tolist() == [True, False, True]
    assert not found.grad[1].any()
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g[[0, 2]], c[[0, 2]]) and not g[1].any()


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0), (1.5, 1.0), (1.0, 0.9), (0.9, -1.0), (0.9, math.nan), (0.9,), 0.9, None]
)
def test_refuses_weights_that_make_no_loss(weights):
    y = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="real_weights"):
        ipfm_loss(y, y, y, alpha=1.0, real_weights=weights)


def test_refuses_other_stretches_and_shares():
    y, sigma = torch.zeros(1, 4), torch.ones(1)
    for wrong in ({"stretch": math.inf}, {"stretch": 1e7}, {"share": 0.0}, {"share": 1e7}, {"share": "a"}):
        with pytest.raises(ValueError, match=f"denoising_loss: .*{next(iter(wrong))}"):
            denoising_loss(y, y, sigma, **wrong)
