"""The two objectives against autograd of their formulas, and samples that overflow; what a step measures of itself."""

import math

import pytest
import torch
from torch import Tensor, nn

from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.losses import (
    GeneratorGradient,
    Noisy,
    Raw,
    add_noise,
    along,
    bind,
    denoising_objective,
    generator_gradient,
    isolate,
)
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics
from ipfm.kernels import perturb
from ipfm.models import EDMPrecond, NetworkConfig

BATCH = 5
SIGMA = torch.tensor([0.05, 0.3, 1.0, 4.0, 20.0])
ALPHAS = [0.0, 0.5, 1.0, 1.2]
NETWORKS = {
    "ddpm++ with attention": {"attn_resolutions": (4,)},
    "ncsn++": {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)},
}


def network(seed: int, **changes) -> EDMPrecond:
    """A small frozen network with random values everywhere: as built, its last layers are nearly zero."""
    torch.manual_seed(seed)
    shape = {"img_resolution": 4, "img_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    net = EDMPrecond(NetworkConfig(**{"attn_resolutions": (), "dropout": 0.0, **shape, **changes}))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, noise) with noise of the level of each sample."""
    generator = torch.Generator().manual_seed(7)
    y, noise = (torch.randn(BATCH, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return (y / 2).to(dtype), (noise * SIGMA.view(-1, 1, 1, 1)).to(dtype)


def noisy(x: Tensor, sigma: Tensor = SIGMA) -> Noisy:
    """x as `add_noise` gives it, by the preconditioning that all networks here share."""
    c_skip, c_out, c_in, _ = network(0).coefficients(sigma.to(x.dtype))
    return Noisy(x, c_in.view(-1, 1, 1, 1) * x, sigma, c_skip, c_out, c_in)


def gradient_of(teacher: nn.Module, student: nn.Module, y: Tensor, x: Tensor, **options) -> GeneratorGradient:
    return generator_gradient(bind(teacher, None), bind(student, None), y, noisy(x), **options)


def written_out(teacher: nn.Module, student: nn.Module, y: Tensor, noise: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """(dL/dy, L, lambda) by autograd of L = lambda [|T-y|^2 - |S-y|^2 - 2(alpha-1/2)|T-S|^2] at x = y + noise."""
    y = y.clone().requires_grad_()
    t, s = teacher(y + noise, SIGMA), student(y + noise, SIGMA)
    weight = 1 / (t - y).detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
    squares = [(a - b).square().sum((1, 2, 3)) for a, b in ((t, y), (s, y), (t, s))]
    loss = weight * (squares[0] - squares[1] - 2 * (alpha - 0.5) * squares[2])
    loss.sum().backward()
    return y.grad, loss.detach(), weight


@pytest.mark.quick
@pytest.mark.parametrize("phased", [False, True], ids=["joint", "phased"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_generator_gradient_is_autograd_of_the_formula(kind, alpha, phased):
    teacher, student = (network(seed, **NETWORKS[kind]).double() for seed in (0, 1))
    y, noise = samples(torch.float64)
    result = gradient_of(teacher, student, y, y + noise, alpha=alpha, phased=phased)
    gradient, loss, weight = written_out(teacher, student, y, noise, alpha)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(result.gradient, gradient, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(result.loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.weight, weight, rtol=1e-12, atol=0)
    assert result.valid.all()
    assert result.gradient.abs().amax((1, 2, 3)).min() > 1e-3  # every sample has a gradient to compare


@pytest.mark.quick
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_phased_equals_joint(kind, alpha):
    teacher, student = network(0, **NETWORKS[kind]), network(1, **NETWORKS[kind])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        y, noise = samples(dtype)
        nets = teacher.to(dtype), student.to(dtype)
        joint, phased = (gradient_of(*nets, y, y + noise, alpha=alpha, phased=p) for p in (False, True))
        for a, b in zip(joint, phased, strict=True):
            assert a.dtype == b.dtype
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * a.abs().max().item())
        assert torch.equal(joint.valid, phased.valid)


def test_single_precision_is_near_the_truth():
    teacher, student = network(0), network(1)
    y, noise = samples(torch.float32)
    result = gradient_of(teacher, student, y, y + noise, alpha=1.0, phased=True)
    truth, *_ = written_out(teacher.double(), student.double(), y.double(), noise.double(), 1.0)
    torch.testing.assert_close(result.gradient.double(), truth, rtol=0, atol=1e-4 * truth.abs().max().item())


def test_half_is_the_pure_objective():
    """At alpha = 1/2 equal networks give no gradient at all; T = y gives the weight its floor, and no division by 0."""
    net = network(0).double()
    y, noise = samples(torch.float64)
    result = gradient_of(net, net, y, y + noise, alpha=0.5, phased=True)
    assert torch.equal(result.loss, torch.zeros(BATCH, dtype=torch.float64))
    assert result.gradient.abs().max() < 1e-12
    given = noisy(y + noise)
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in (given.c_skip, given.c_out))
    exact: Raw = lambda scaled, _: (y - c_skip * given.x) / c_out + 0 * scaled  # noqa: E731
    result = generator_gradient(exact, bind(net, None), y, given, alpha=0.5, phased=True)
    assert result.valid.all() and result.weight.tolist() == pytest.approx([1e5] * BATCH)


@pytest.mark.parametrize("phased", [False, True], ids=["joint", "phased"])
def test_no_gradient_is_left_behind(phased):
    """Frozen or not, neither network's parameters get a gradient, nor do the inputs, and nothing holds a graph."""
    teacher, student = network(0), network(1).requires_grad_(True)
    y, noise = samples(torch.float32)
    x = y + noise
    with torch.no_grad():  # the caller's grad mode does not matter
        result = gradient_of(teacher, student, y, x, alpha=1.0, phased=phased)
    assert all(p.grad is None for net in (teacher, student) for p in net.parameters())
    assert x.grad is None and y.grad is None and not x.requires_grad and not y.requires_grad
    assert not any(part.requires_grad for part in result)
    assert [p.requires_grad for p in teacher.parameters()] == [False] * len(list(teacher.parameters()))


class Counting(nn.Module):
    """Notes each evaluation: with a graph or without, and what its batch held."""

    def __init__(self, inner: nn.Module, log: list[str], name: str) -> None:
        super().__init__()
        self.inner, self.log, self.name = inner, log, name

    def forward(self, scaled: Tensor, *others: Tensor | None, raw: bool) -> Tensor:
        assert torch.isfinite(scaled).all(), "a non-finite sample reached the network"
        self.log.append(self.name + (" with graph" if torch.is_grad_enabled() and scaled.requires_grad else ""))
        return self.inner(scaled, *others, raw=raw)


def test_order_of_evaluations():
    """Phased holds one graph at a time, and needs one more forward pass of the teacher."""
    log: list[str] = []
    teacher, student = Counting(network(0), log, "T"), Counting(network(1), log, "S")
    y, noise = samples(torch.float32)
    gradient_of(teacher, student, y, y + noise, alpha=1.0, phased=True)
    assert log == ["T", "S with graph", "T with graph"]
    log.clear()
    gradient_of(teacher, student, y, y + noise, alpha=1.0, phased=False)
    assert log == ["T with graph", "S with graph"]


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("phased", [False, True], ids=["joint", "phased"])
@pytest.mark.parametrize("where", ["y", "x", "both"])
@pytest.mark.parametrize("value", BAD)
def test_a_non_finite_sample_is_isolated(value, where, phased):
    """It reaches no network and contributes nothing; the other samples are bit-identical to those of a clean batch."""
    log: list[str] = []
    teacher, student = Counting(network(0), log, "T"), Counting(network(1), log, "S")
    y, noise = samples(torch.float32)
    x = y + noise
    clean = gradient_of(teacher, student, y, x, alpha=1.0, phased=phased)
    assert clean.valid.all()
    y, x = y.clone(), x.clone()
    if where != "x":
        y[2, 1, 3, 0] = value
    if where != "y":
        x[2, 0, 0, 1] = value
    result = gradient_of(teacher, student, y, x, alpha=1.0, phased=phased)
    good = torch.tensor([True, True, False, True, True])
    assert torch.equal(result.valid, good)
    for got, expected in zip(result, clean, strict=True):
        assert torch.equal(got[good], expected[good])
        assert not got[2].any()


class Broken(nn.Module):
    """A network that turns the samples of one noise level into `value`, forward or backward."""

    def __init__(self, inner: nn.Module, sigma: float, value: float, backward: bool) -> None:
        super().__init__()
        self.inner, self.sigma, self.value, self.backward = inner, sigma, value, backward

    def forward(self, scaled: Tensor, sigma: Tensor, *labels: None, raw: bool) -> Tensor:
        hit = (sigma == self.sigma).view(-1, 1, 1, 1)
        if self.backward:
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: torch.where(hit, grad + self.value, grad))
            return self.inner(scaled, sigma, raw=raw)
        # Multiplied in, so that 0 times it comes back as NaN.
        return self.inner(scaled, sigma, raw=raw) * torch.where(hit, self.value, 1.0)


@pytest.mark.parametrize("phased", [False, True], ids=["joint", "phased"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("value", BAD)
def test_a_network_that_overflows_costs_that_sample_alone(value, which, backward, phased):
    teacher, student = network(0), network(1)
    y, noise = samples(torch.float32)
    clean = gradient_of(teacher, student, y, y + noise, alpha=1.0, phased=phased)
    broken = {"teacher": teacher, "student": student}
    broken[which] = Broken(broken[which], float(SIGMA[1]), value, backward)
    result = gradient_of(broken["teacher"], broken["student"], y, y + noise, alpha=1.0, phased=phased)
    good = torch.tensor([True, False, True, True, True])
    assert torch.equal(result.valid, good)
    for got, expected in zip(result, clean, strict=True):
        assert torch.equal(got[good], expected[good])
        assert not got[1].any()


def test_a_batch_of_bad_samples_is_nothing():
    y, noise = samples(torch.float32)
    result = gradient_of(network(0), network(1), y * math.nan, y + noise, alpha=1.0, phased=True)
    assert not result.valid.any() and not result.gradient.any() and not result.loss.any()


def test_generator_gradient_refuses():
    y, noise = samples(torch.float32)
    with pytest.raises(ValueError, match="alpha must be finite; got nan"):
        gradient_of(network(0), network(1), y, y + noise, alpha=math.nan, phased=False)
    with pytest.raises(ValueError, match=r"x must have y's dtype torch.float64; got torch.float32"):
        gradient_of(network(0), network(1), y.double(), y + noise, alpha=1.0, phased=False)


# -- the denoising objective -------------------------------------------------------------------------------------------


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("sigma_data", [0.5, 0.7])
@pytest.mark.parametrize("kind", NETWORKS)
def test_denoising_objective_is_autograd_of_the_formula(kind, sigma_data):
    """w |net(x) - y|^2 summed over elements and samples, w = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2."""
    net = network(0, **NETWORKS[kind]).double().requires_grad_(True)
    y, noise = samples(torch.float64)
    result = denoising_objective(bind(net, None), y, noisy(y + noise), sigma_data=sigma_data)
    result.surrogate.backward()
    got = [g.clone() for g in gradients(net)]
    net.zero_grad()
    sigma = SIGMA.double()
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    loss = weight * (net(y + noise, SIGMA) - y).square().sum((1, 2, 3))
    loss.sum().backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    assert result.valid.all() and len(got) == len(gradients(net)) > 20
    for a, b in zip(got, gradients(net), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("where", ["y", "x"])
@pytest.mark.parametrize("value", BAD)
def test_denoising_isolates_a_non_finite_sample(value, where):
    """The weights' gradient is that of the batch without the sample."""
    net = network(0).double().requires_grad_(True)
    log: list[str] = []
    y, noise = samples(torch.float64)
    x = y + noise
    good = torch.tensor([True, True, False, True, True])
    denoising_objective(bind(net, None), y[good], noisy(x[good], SIGMA[good]), sigma_data=0.5).surrogate.backward()
    expected = [g.clone() for g in gradients(net)]
    net.zero_grad()
    (y if where == "y" else x)[2, 0, 1, 1] = value
    result = denoising_objective(bind(Counting(net, log, "S"), None), y, noisy(x), sigma_data=0.5)
    result.surrogate.backward()
    assert torch.equal(result.valid, good) and result.loss[2] == 0
    for a, b in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, b.abs().max().item()))


def test_isolate():
    x = torch.ones(5, 1, 2, 2)
    x[0, 0, 1, 1], x[2, 0, 0, 0] = math.inf, math.nan
    given = noisy(x)
    before = given.scaled.clone()
    out = isolate(given)
    good = torch.tensor([False, True, False, True, True])
    assert torch.equal(out.scaled[good], given.scaled[good]) and not out.scaled[~good].any()
    assert torch.equal(out.c_skip[good], given.c_skip[good]) and out.c_skip[~good].isnan().all()
    assert out.x is x and torch.equal(given.scaled.nan_to_num(5), before.nan_to_num(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_along(dtype):
    """The gradient of (out * gradient).sum(), for any factor that follows, in the tensors' own dtype."""
    out = torch.linspace(-1, 1, 12).view(3, 4).to(dtype).requires_grad_()
    gradient = torch.linspace(2, 5, 12).view(3, 4).to(dtype)
    value = along(out, gradient)
    assert value.shape == () and value == 0 and value.dtype == torch.promote_types(dtype, torch.float32)
    (value / 3).backward()
    assert out.grad.dtype == dtype
    torch.testing.assert_close(out.grad, (gradient.double() / 3).to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("D", [16.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_comes_ready_for_the_network(D, dtype):
    """D(x, sigma) = c_skip x + c_out F(scaled), to the last bit of the compute dtype."""
    net = network(0)
    if dtype == torch.float64:
        net.double()
    else:
        net.compute_dtype = dtype
    y = samples(net.wide_dtype)[0]
    position = {"seed": 3, "stream": 1, "step": 2, "sample_index": torch.arange(BATCH)}
    given = add_noise(y, SIGMA, D, net, **position)
    assert torch.equal(given.x, perturb(y, SIGMA, D, **position))
    assert given.scaled.dtype == net.input_dtype == dtype
    raw = bind(net, None)(given.scaled, given.sigma)
    assert raw.dtype == dtype
    c_skip, c_out = (c.view(-1, 1, 1, 1) for c in (given.c_skip, given.c_out))
    expected = net(given.x, SIGMA)
    torch.testing.assert_close(c_skip * given.x + c_out * raw.to(y.dtype), expected, rtol=1e-6, atol=1e-6)


# -- what a step measures ----------------------------------------------------------------------------------------------

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def test_tally():
    tally = LossSum("student", WORLD)
    tally.add(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([True, False, True]))
    tally.add(torch.tensor([4.0]), torch.tensor([True]))
    assert tally.grad_scale(4) == torch.tensor(4 / 3)
    measured = tally.measured(torch.tensor(True))
    assert (measured.sums["student_loss"], measured.counts["student_loss"], measured.bad["student"]) == (8, 3, 1)
    assert tally.measured(torch.tensor(False)).bad["student"] == 2  # the step that was skipped counts too
    other = LossSum("student", World(rank=1, size=1, device=torch.device("cpu")))
    assert other.measured(torch.tensor(False)).bad["student"] == 0  # but once, not on every process


def test_tally_of_bad_samples_alone():
    tally = LossSum("student", WORLD)
    tally.add(torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert tally.grad_scale(2) == 2
    assert tally.measured(torch.tensor(True)).bad["student"] == 2


def test_measurements_add_up():
    def one(**sums: float) -> StepMetrics:
        tensors = {name: torch.tensor(value) for name, value in sums.items()}
        return StepMetrics(tensors, {name: torch.tensor(1.0) for name in sums}, {"a": torch.tensor(2.0)})

    total = StepMetrics.merged([one(x=1.0), one(x=2.0, y=5.0)])
    assert {k: v.item() for k, v in total.sums.items()} == {"x": 3.0, "y": 5.0}
    assert {k: v.item() for k, v in total.counts.items()} == {"x": 2.0, "y": 1.0}
    assert total.bad["a"] == 4
