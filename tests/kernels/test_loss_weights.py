"""Weights of the generator's loss by a number of each sample, or by sums that the loss's own pass makes."""

import math

import pytest
import torch
from preconditioned import preconditioned

from ipfm.kernels import ipfm_loss, reference

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    # NumPy's, in the interpreter, about the sample that is not finite.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
D = 16.0


def samples(shape, dtype=torch.float64, device="cpu", raw=None):
    """t, s, y, sigma, a factor, and x, c_skip and c_out."""
    t, s, y, sigma, known = preconditioned(shape, dtype, device, raw, seed=7)
    return t, s, y, sigma, sigma.sqrt(), known


def arguments(weight, sigma, factor):
    return {"weight": weight, "factor": factor, **({"sigma": sigma, "D": D} if weight == "score" else {})}


@BACKENDS
@pytest.mark.parametrize("weight", ["sid", "given", "score", "unsquared"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 4100)], ids=["small", "row read twice"])
def test_loss_and_gradients_are_those_of_the_formula(weight, shape, backend, device):
    """By autograd, the weight held still; with real data beside it is the same weight."""
    t, s, y, sigma, factor, known = samples(shape, device=device)
    dims, N = tuple(range(1, y.ndim)), y[0].numel()
    leaves = [v.requires_grad_() for v in (t, s, y)]
    skip, out = (known[name].view(-1, *[1] * (y.ndim - 1)) for name in ("c_skip", "c_out"))
    x = y + (known["x"] - y).detach()
    T, S = skip * x + out * t, skip * x + out * s
    own = factor * {
        "sid": lambda: 1 / (T - y).abs().mean(dims),
        "given": lambda: torch.ones_like(sigma),
        "score": lambda: (N + D) / ((x - T).square().sum(dims) + D * sigma**2),
        "unsquared": lambda: ((T - S).square().sum(dims) + 1e-6 * N) ** -0.5,
    }[weight]().detach()  # fmt: skip
    given = [v.detach() for v in (t, s, y)]
    known = {name: v.detach() for name, v in known.items()}
    for a, b in ((1.0, 1.0), (0.92, 0.94)):
        c = skip * x
        e, delta = a * (T - c) - b * (y - c), T - S
        if (a, b) == (1.0, 1.0):
            e = T - y
        loss = 2 * own * (delta * (e - 1.2 * a * delta)).sum(dims)
        wanted = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
        got = ipfm_loss(
            *given, alpha=1.2, **known, real_weights=(a, b), **arguments(weight, sigma, factor), backend=backend
        )
        torch.testing.assert_close(got.weight, own, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-10, atol=1e-10)
        for gradient, expected in zip((got.dt, got.ds, got.dy), wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("weight", "raw"), [("score", torch.bfloat16), ("unsquared", torch.float32)], ids=str)
def test_triton_is_no_worse_than_pytorch(weight, raw, device, no_worse):
    t, s, y, sigma, factor, known = samples((2, 3, 8, 8), torch.float32, device, raw)
    given = {**arguments(weight, sigma, factor), "alpha": 1.0}
    wide = {name: v.double() for name, v in known.items()}
    truth = ipfm_loss(t.double(), s.double(), y.double(), **wide, **given, backend="reference")
    plain = ipfm_loss(t, s, y, **known, **given, backend="reference")
    got = ipfm_loss(t.clone(), s.clone(), y, **known, **given, inplace=True, backend="triton")
    for g, p, r in zip(got, plain, truth, strict=True):
        no_worse(g, p, r)


@BACKENDS
def test_a_factor_that_is_no_weight_leaves_its_sample_out(backend, device):
    t, s, y, sigma, factor, known = samples((4, 2, 3, 3), torch.float32, device)
    clean = ipfm_loss(t, s, y, alpha=1.0, **known, **arguments("score", sigma, factor), backend=backend)
    assert clean.valid.all()
    factor[0], factor[1], factor[2] = math.nan, math.inf, 0.0
    found = ipfm_loss(t, s, y, alpha=1.0, **known, **arguments("score", sigma, factor), backend=backend)
    assert found.valid.tolist() == [False, False, False, True]
    for one, other in zip(found, clean, strict=True):
        assert not one[:3].any() and torch.equal(one[3], other[3])
    # T = S at one sample: the root has a floor.
    t[3] = s[3]
    found = ipfm_loss(t, s, y, alpha=1.0, **known, weight="unsquared", backend=backend)
    assert found.valid.all() and found.weight[3].item() == pytest.approx((1e-6 * 18) ** -0.5, rel=1e-6)


def test_a_factor_of_one_is_the_loss_without_it():
    t, s, y, _, _, known = samples((3, 35), torch.float32)
    one, other = (ipfm_loss(t, s, y, alpha=1.0, **known, factor=f) for f in (None, torch.ones(3)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # At a large D the score's weight is 1 / sigma^2.
    sigma = torch.tensor([0.1, 1.0, 30.0])
    found = reference.ipfm_loss(t, s, y, alpha=1.0, **known, weight_by="score", sigma=sigma, by_D=1e-30)
    torch.testing.assert_close(found.weight, sigma**-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": "field"}, "weight must be sid, given, score, unsquared; got 'field'"),
        ({"weight": "score"}, "sigma goes with weight score, which needs x, .* got weight score without sigma"),
        ({"sigma": torch.ones(1)}, "sigma goes with weight score, .* got weight sid with sigma"),
        ({"weight": "score", "sigma": torch.ones(1)}, "which needs x, c_skip and c_out too"),
        ({"factor": torch.ones(2)}, "factor"),
        ({"D": 0.0}, "D must "),
    ],
)
def test_refusals(given, message):
    y = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=f"^ipfm_loss: .*{message}"):
        ipfm_loss(y, y, y, alpha=1.0, **given)
