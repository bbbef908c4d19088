"""Samplers against problems with a known answer: Gaussian data, hand-written loops, the prior's law."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.random_streams import Stream, draw_labels
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.sampling.samplers import Churn, draw_prior, generate, heun_sample, nfe
from ipfm.engine.sampling.seeds import SampleNoise, check_seeds, read_numbers
from ipfm.kernels import perturb
from ipfm.models import EDMPrecond, NetworkConfig, VEPrecond, iDDPMPrecond

SPREAD = 0.5
COUNT = 6


class Gaussian:
    """The exact denoiser of data ~ N(0, SPREAD^2): x SPREAD^2 / (SPREAD^2 + sigma^2), elementwise; notes its calls.

    Its ODE has the solution x(sigma) = x(sigma_max) sqrt((SPREAD^2 + sigma^2) / (SPREAD^2 + sigma_max^2)).
    """

    img_channels = 2
    img_resolution = 4

    def __init__(self) -> None:
        self.calls: list[tuple[float, torch.dtype, Tensor | None]] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert sigma.shape == (len(x),) and len(set(sigma.tolist())) <= 1
        self.calls.append((sigma[0].item() if len(sigma) else math.nan, x.dtype, class_labels))
        gain = SPREAD**2 / (SPREAD**2 + sigma**2)
        return x * gain.to(x.dtype)[:, None, None, None]


def latents(dtype: torch.dtype = torch.float64) -> Tensor:
    return 80 * torch.randn(COUNT, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="module")
def network() -> EDMPrecond:
    torch.manual_seed(0)
    net = EDMPrecond(
        NetworkConfig(
            img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channel_mult=(1,), num_blocks=1,
            attn_resolutions=(), dropout=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():  # as built, its last layers are nearly zero
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


# -- Heun's method ---------------------------------------------------------------------------------------------------


def gain(sigma: float) -> float:
    return SPREAD**2 / (SPREAD**2 + sigma**2)


@pytest.mark.quick
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
def test_order_of_convergence(solver, order):
    """Halving the steps divides the error by four or two.

    The last step, from sigma_min to 0, is the denoiser's own value.
    """
    x, sigma_min = latents(), 0.2
    exact = x * math.sqrt((SPREAD**2 + sigma_min**2) / (SPREAD**2 + 80**2)) * gain(sigma_min)
    errors = []
    for steps in (33, 65, 129, 257):
        images = heun_sample(
            Gaussian(), COUNT, D=math.inf, steps=steps, seed=0, latents=x, sigma_min=sigma_min, solver=solver
        )
        errors.append(((images - exact).abs().max() / exact.abs().max()).item())
    assert errors[-1] < (1e-3 if solver == "heun" else 0.05)
    ratio = 2**order
    assert all(0.9 * ratio < coarse / fine < 1.15 * ratio for coarse, fine in pairwise(errors)), errors


@pytest.mark.quick
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_heun_is_algorithm_1(steps):
    """On a linear problem each step multiplies x by a number, here worked out in Python's floats."""
    factor = 1.0
    for current, following in pairwise(NoiseLevels().karras(steps).tolist()):
        slope = (1 - gain(current)) / current
        step = 1 + (following - current) * slope
        if following > 0:
            slope_there = step * (1 - gain(following)) / following
            step = 1 + (following - current) * (slope + slope_there) / 2
        factor *= step
    images = heun_sample(Gaussian(), COUNT, D=math.inf, steps=steps, seed=0, latents=latents())
    torch.testing.assert_close(images, (latents() * factor).float(), rtol=1e-6, atol=0)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_evaluations(steps):
    """2 steps - 1 evaluations: one at the first level, two at each one between, in float64; one at sigma_min."""
    net = Gaussian()
    heun_sample(net, COUNT, D=128.0, steps=steps, seed=0, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    grid = NoiseLevels(sigma_min=0.01, sigma_max=50.0, rho=5.0).karras(steps).tolist()
    expected = [grid[0]] + [sigma for sigma in grid[1:-1] for _ in range(2)]
    assert [call[0] for call in net.calls] == expected
    assert len(net.calls) == nfe(steps) == 2 * steps - 1
    assert {call[1] for call in net.calls} == {torch.float64}
    for solver in ("heun", "euler"):
        net = Gaussian()
        heun_sample(net, 1, D=128.0, steps=steps, seed=0, solver=solver, churn=Churn(8.0))
        assert len(net.calls) == nfe(steps, solver)


def test_levels_of_the_callers_own():
    """Those of the grid give the grid's images; others are where the network is called."""
    grid = tuple(NoiseLevels().karras(7)[:-1].tolist())
    images = heun_sample(Gaussian(), 3, D=128.0, seed=1, sigmas=grid)
    assert torch.equal(images, heun_sample(Gaussian(), 3, D=128.0, seed=1, steps=7))
    net = Gaussian()
    heun_sample(net, 1, D=128.0, seed=1, sigmas=(40, 3.5, 0.25), solver="euler")
    assert [call[0] for call in net.calls] == [40.0, 3.5, 0.25]


def plain_heun(net, x: Tensor, levels: list[float], labels: Tensor | None, noises=None) -> Tensor:
    """Algorithms 1 and 2 of Karras et al. as they are printed; noises: i -> (sigma_hat, noise to add before step i)."""
    x = x.double()
    for i, (sigma, following) in enumerate(pairwise([*levels, 0.0])):
        higher, noise = (sigma, None) if noises is None else noises(i, x)
        x_hat = x if noise is None else x + noise
        level = torch.full((len(x),), higher, dtype=torch.float64)
        d = (x_hat - net(x_hat, level, labels)) / higher
        x = x_hat + (following - higher) * d
        if following != 0:
            d_there = (x - net(x, torch.full((len(x),), following, dtype=torch.float64), labels)) / following
            x = x_hat + (following - higher) * (d + d_there) / 2
    return x.float()


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_no_churn_is_algorithm_1_bit_for_bit(network, D):
    """With a real network; an amount of 0, or a range without a level, is no churn."""
    labels, levels = torch.eye(3), NoiseLevels().karras(5)[:-1].tolist()
    with torch.no_grad():
        expected = plain_heun(network, draw_prior(network, torch.arange(4, 7), 80.0, D, seed=11), levels, labels)
    for churn in (None, Churn(), Churn(9.0, sigma_min=100.0), Churn(9.0, sigma_max=0.001, noise=2.0)):
        images = heun_sample(network, 3, D=D, steps=5, seed=11, class_labels=labels, first_index=4, churn=churn)
        assert torch.equal(images, expected)


# -- churn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
@pytest.mark.parametrize(
    "churn", [Churn(3.0), Churn(30.0, sigma_min=0.05, sigma_max=50.0, noise=1.007)], ids=["3", "30 within 0.05 to 50"]
)
def test_churn_is_algorithm_2(network, churn, D):
    """gamma = min(S_churn / N, sqrt(2) - 1) in [S_tmin, S_tmax]; the kernel of D, a step of the stream each."""
    levels, index, raised = NoiseLevels().karras(6)[:-1].tolist(), torch.arange(4, 7), []

    def noises(i: int, x: Tensor) -> tuple[float, Tensor | None]:
        gamma = min(churn.amount / 6, math.sqrt(2) - 1) if churn.sigma_min <= levels[i] <= churn.sigma_max else 0.0
        if gamma == 0:
            return levels[i], None
        raised.append(i)
        higher = levels[i] * (1 + gamma)
        level = torch.full((3,), churn.noise * math.sqrt(higher**2 - levels[i] ** 2), dtype=torch.float64)
        zeros = torch.zeros_like(x)
        return higher, perturb(zeros, level, D, seed=11, stream=Stream.SAMPLER_CHURN, step=i, sample_index=index)

    with torch.no_grad():
        expected = plain_heun(network, draw_prior(network, index, 80.0, D, seed=11), levels, None, noises)
    images = heun_sample(network, 3, D=D, steps=6, seed=11, first_index=4, churn=churn)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert raised == (list(range(6)) if churn.amount == 3 else [1, 2, 3, 4])
    assert not torch.allclose(images, heun_sample(network, 3, D=D, steps=6, seed=11, first_index=4), atol=1e-2)


def test_churned_samples_have_the_datas_marginal():
    """On Gaussian data everything is linear, so that the samples are exactly N(0, v) with v worked out step by step.

    v is within 1 % of the data's, as far as 128 steps come. The samples' mean square and law are compared with v; the
    seed is fixed, on fresh ones the two tests together fail once in 5 million runs.
    """
    steps, count, churn = 128, 1500, Churn(10.0, sigma_min=0.02, sigma_max=60.0)

    def variance(noise: float) -> float:
        v = 80.0**2
        for current, following in pairwise(NoiseLevels().karras(steps).tolist()):
            raised = current * (1 + 10 / steps) if 0.02 <= current <= 60 else current
            slope = (1 - gain(raised)) / raised
            factor = 1 + (following - raised) * slope
            if following > 0:
                slope_there = factor * (1 - gain(following)) / following
                factor = 1 + (following - raised) * (slope + slope_there) / 2
            v = (v + noise**2 * (raised**2 - current**2)) * factor**2
        return v

    images = heun_sample(Gaussian(), count, D=math.inf, steps=steps, seed=2, churn=churn).double().flatten()
    assert variance(1.0) == pytest.approx(SPREAD**2, rel=0.01)
    chi_square = scipy.stats.chi2(len(images))
    total = (images.square().sum() / variance(1.0)).item()
    assert 2 * min(chi_square.cdf(total), chi_square.sf(total)) > 1e-7
    assert scipy.stats.kstest(images.numpy(), scipy.stats.norm(scale=math.sqrt(variance(1.0))).cdf).pvalue > 1e-7
    # The test has the power to tell noise that is 5 % too strong.
    assert chi_square.cdf(total * variance(1.0) / variance(1.05)) < 1e-20
    # The noise makes samples of its own: little of what deterministic ones are remains.
    plain = heun_sample(Gaussian(), count, D=math.inf, steps=steps, seed=2).double().flatten()
    assert abs(torch.corrcoef(torch.stack([plain, images]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": -1.0}, "amount must be a finite number >= 0, got -1.0"),
        ({"amount": math.inf}, "amount must be a finite number >= 0, got inf"),
        ({"sigma_min": math.nan}, "sigma_min must be a number, got nan"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min must be at most sigma_max, got 2.0 and 1.0"),
        ({"noise": 0.0}, "noise must be a finite number > 0, got 0.0"),
        ({"noise": True}, "noise must be a number, got True"),
        ({"sigma_max": None}, "sigma_max must be a number, got None"),
    ],
)
def test_refused_churn(options, message):
    with pytest.raises(ValueError, match=f"^churn: {message}$"):
        Churn(**options)


# -- both samplers ---------------------------------------------------------------------------------------------------


def sample(kind: str, net, n: int, **options) -> Tensor:
    if kind != "generate":
        return heun_sample(net, n, steps=4, churn=Churn(2.0) if kind == "churn" else None, **options)
    return generate(net, n, sigmas=(2.5, 1.0, 0.5), **options)


@pytest.mark.parametrize("kind", ["heun", "churn", "generate"])
@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_an_image_does_not_depend_on_its_batch(kind, D):
    whole = sample(kind, Gaussian(), 7, D=D, seed=3)
    parts = [sample(kind, Gaussian(), n, D=D, seed=3, first_index=i) for i, n in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 7
    assert not torch.equal(sample(kind, Gaussian(), 7, D=D, seed=4), whole)


@pytest.mark.parametrize("kind", ["heun", "churn", "generate"])
@pytest.mark.parametrize("D", [0.7, 128.0, math.inf])
def test_a_list_of_seeds_makes_the_first_image_of_each(kind, D):
    """Bit for bit, latents and noise, in whatever batches, whatever the order and however often."""
    seeds = [3, 2**64 - 1, 0, 3, 17]
    whole = sample(kind, Gaussian(), 5, D=D, seed=seeds)
    assert torch.equal(whole, torch.cat([sample(kind, Gaussian(), 1, D=D, seed=seed) for seed in seeds]))
    parts = [sample(kind, Gaussian(), 2, D=D, seed=seeds[:2]), sample(kind, Gaussian(), 3, D=D, seed=tuple(seeds[2:]))]
    assert torch.equal(whole, torch.cat(parts))
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 4
    third = sample(kind, Gaussian(), 2, D=D, seed=range(3, 5), first_index=2)
    assert torch.equal(third[:1], sample(kind, Gaussian(), 3, D=D, seed=3)[2:])
    assert sample(kind, Gaussian(), 0, D=D, seed=[]).shape == (0, 2, 4, 4)
    with pytest.raises(ValueError, match=r"^seed must be one number or one for each of 5 images, got 2$"):
        sample(kind, Gaussian(), 5, D=D, seed=[1, 2])
    with pytest.raises(ValueError, match=r"perturb: seed must be an integer in .*; got -1"):
        sample(kind, Gaussian(), 2, D=D, seed=[1, -1])


def test_labels_of_a_list_of_seeds():
    labels = SampleNoise.of(4, [5, 6, 5, 9], 0, torch.device("cpu")).labels(10)
    position = {"stream": Stream.SAMPLER_LABEL, "step": 0}
    assert torch.equal(
        labels, torch.cat([draw_labels(10, torch.tensor([0]), seed=s, **position) for s in (5, 6, 5, 9)])
    )
    assert SampleNoise.of(4, [5, 6, 5, 9], 0, torch.device("cpu")).labels(0) is None


def test_lists_of_numbers():
    assert read_numbers("seeds", "0,3,7-12") == (0, 3, 7, 8, 9, 10, 11, 12)
    assert read_numbers("seeds", " 5 , 2 - 2,5") == (5, 2, 5)
    for text in ("", "a", "1,", "-3", "1-", "1.5", "1-2-3", "٣", "1 2", "9" * 21):
        with pytest.raises(ValueError, match=r"^seeds must be whole numbers and ranges like 0,3,7-12, got '"):
            read_numbers("seeds", text)
    with pytest.raises(ValueError, match=r"^seeds: a range must rise, got 12-7$"):
        read_numbers("seeds", "1,12-7")
    with pytest.raises(ValueError, match=r"^seeds must be at most 10,000,000 numbers, got more$"):
        read_numbers("seeds", "0-99999999999999999999")
    check_seeds("seed", [0, 2**64 - 1])
    with pytest.raises(ValueError, match=r"^seed must lie in \[0, 2\^64\), got 18446744073709551616$"):
        check_seeds("seed", [0, 2**64])


@pytest.mark.parametrize("kind", ["heun", "generate"])
def test_an_image_of_a_real_network_does_not_depend_on_its_batch(kind, network):
    whole = sample(kind, network, 5, D=128.0, seed=3)
    assert whole.shape == (5, 1, 8, 8) and whole.dtype == torch.float32 and not whole.requires_grad
    parts = [sample(kind, network, n, D=128.0, seed=3, first_index=i) for i, n in ((0, 2), (2, 3))]
    # Convolutions sum in another order for another batch size.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["heun", "generate"])
def test_class_labels_reach_every_evaluation(kind, network):
    net, labels = Gaussian(), torch.eye(3)
    sample(kind, net, 3, D=128.0, seed=0, class_labels=labels)
    assert len(net.calls) == (7 if kind == "heun" else 3) and all(call[2] is labels for call in net.calls)
    with_labels = sample(kind, network, 3, D=128.0, seed=0, class_labels=labels)
    assert not torch.allclose(with_labels, sample(kind, network, 3, D=128.0, seed=0), atol=1e-3)


@pytest.mark.parametrize("kind", ["heun", "generate"])
def test_latents_replace_the_prior(kind):
    x = latents(torch.float32)
    before = x.clone()
    images = sample(kind, Gaussian(), COUNT, D=128.0, seed=3, latents=x)
    assert torch.equal(x, before)
    twice = sample(kind, Gaussian(), COUNT, D=128.0, seed=3, latents=2 * x)
    if kind == "heun":
        torch.testing.assert_close(twice, 2 * images)
    else:
        # Linear, but the noise between the steps is added: the latents' share is the product of the three gains.
        share = math.prod(gain(sigma) for sigma in (2.5, 1.0, 0.5))
        torch.testing.assert_close(twice - images, x * share, rtol=1e-4, atol=1e-5)
    # The prior's own latents give what is drawn without any.
    index = torch.arange(COUNT)
    prior = draw_prior(Gaussian(), index, 80.0 if kind == "heun" else 2.5, 128.0, seed=3)
    drawn = sample(kind, Gaussian(), COUNT, D=128.0, seed=3)
    torch.testing.assert_close(sample(kind, Gaussian(), COUNT, D=128.0, seed=3, latents=prior), drawn)


@pytest.mark.parametrize("kind", ["heun", "generate"])
def test_no_images(kind, network):
    assert sample(kind, network, 0, D=128.0, seed=0).shape == (0, 1, 8, 8)
    assert sample(kind, Gaussian(), 0, D=128.0, seed=0).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("kind", ["heun", "generate"])
def test_a_network_without_parameters(kind):
    class Shrink(nn.Module):
        img_channels, img_resolution = 1, 2

        def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return x / 2

    assert sample(kind, Shrink(), 3, D=math.inf, seed=0).shape == (3, 1, 2, 2)


@pytest.mark.parametrize("kind", ["heun", "generate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "the number of images must be an integer >= 0, got -1"),
        ({"n": 1.5}, "the number of images must be an integer >= 0, got 1.5"),
        ({"first_index": -1}, "the index of the first image must be an integer >= 0, got -1"),
        ({"latents": torch.zeros(2, 2, 4, 4)}, r"latents must have shape \(3, 2, 4, 4\), got \(2, 2, 4, 4\)"),
        ({"latents": torch.zeros(3, 32)}, r"latents must have shape \(3, 2, 4, 4\), got \(3, 32\)"),
        ({"D": 0.0}, r"perturb: D must be in \(0, inf\]; got 0.0"),
        ({"D": math.nan}, r"perturb: D must be in \(0, inf\]; got nan"),
        ({"seed": -1}, "perturb: seed must be an integer in .*; got -1"),
    ],
)
def test_refusals(kind, options, message):
    given = {"n": 3, "D": 128.0, "seed": 0, **options}
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample(kind, Gaussian(), given.pop("n"), **given)


def test_refused_grids():
    with pytest.raises(ValueError, match=r"^the number of sampling steps must be an integer >= 1, got 0$"):
        heun_sample(Gaussian(), 1, D=1.0, steps=0, seed=0)
    with pytest.raises(ValueError, match=r"^sigma_min must be below sigma_max, got 90.0 and 80.0$"):
        heun_sample(Gaussian(), 1, D=1.0, steps=2, seed=0, sigma_min=90.0)
    with pytest.raises(ValueError, match=r"^rho must be a finite number > 0, got 0.0$"):
        heun_sample(Gaussian(), 1, D=1.0, steps=2, seed=0, rho=0.0)
    with pytest.raises(ValueError, match=r"^sigmas must fall strictly, got 1, 2$"):
        generate(Gaussian(), 1, D=1.0, sigmas=(1.0, 2.0), seed=0)
    with pytest.raises(ValueError, match=r"^sigmas must fall strictly, got 1, 2$"):
        heun_sample(Gaussian(), 1, D=1.0, sigmas=(1.0, 2.0), seed=0)
    with pytest.raises(ValueError, match=r"^sigmas must be finite and > 0, got 1, 0$"):
        heun_sample(Gaussian(), 1, D=1.0, sigmas=(1.0, 0.0), seed=0)
    with pytest.raises(ValueError, match=r"^give the number of sampling steps, or their noise levels as sigmas$"):
        heun_sample(Gaussian(), 1, D=1.0, seed=0)
    for options in ({"steps": 2}, {"sigma_min": 0.1}, {"sigma_max": 70.0}, {"rho": 5.0}):
        with pytest.raises(
            ValueError, match=r"^sigmas take the place of steps, sigma_min, sigma_max and rho: give one"
        ):
            heun_sample(Gaussian(), 1, D=1.0, sigmas=(2.0, 1.0), seed=0, **options)
    with pytest.raises(ValueError, match=r"^solver must be one of heun, euler, got 'rk4'$"):
        heun_sample(Gaussian(), 1, D=1.0, steps=2, seed=0, solver="rk4")
    with pytest.raises(ValueError, match=r"^solver must be one of heun, euler, got 'rk4'$"):
        nfe(2, "rk4")
    with pytest.raises(ValueError, match=r"^the number of sampling steps must be an integer >= 1, got 0$"):
        nfe(0)


# -- the few-step generator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [128.0, math.inf])
@pytest.mark.parametrize("sigmas", [(2.5,), (2.5, 1.25), (2.5, 1.875, 1.25, 0.625)], ids=lambda s: f"K={len(s)}")
def test_generate_is_algorithm_2(sigmas, D, network):
    """x_1 ~ p_{r_1}(. | 0); y_k = G(x_k, sigma_k); x_{k+1} ~ p_{r_{k+1}}(. | y_k), a step of the stream each."""
    index, labels = torch.arange(4, 8), torch.eye(3)[[0, 1, 2, 0]]
    with torch.no_grad():
        y, streams = torch.zeros(4, 1, 8, 8), [Stream.SAMPLER_LATENT] + [Stream.SAMPLER_NOISE] * 3
        for k, sigma in enumerate(sigmas):
            level = torch.full((4,), sigma)
            x = perturb(y, level, D, seed=11, stream=streams[k], step=k, sample_index=index)
            y = network(x, level, labels)
    images = generate(network, 4, D=D, sigmas=sigmas, seed=11, class_labels=labels, first_index=4)
    assert torch.equal(images, y)


def test_a_float64_network_is_sampled_in_its_precision(network):
    images = generate(network.double(), 2, D=128.0, sigmas=(2.5, 1.25), seed=0)
    heun = heun_sample(network, 2, D=128.0, steps=3, seed=0)
    network.float()
    assert images.dtype == heun.dtype == torch.float32
    torch.testing.assert_close(images, generate(network, 2, D=128.0, sigmas=(2.5, 1.25), seed=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(heun, heun_sample(network, 2, D=128.0, steps=3, seed=0), rtol=1e-3, atol=1e-4)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_the_number_of_the_churns_stream_is_fixed():
    """Renumbering would change what every seed means."""
    assert Stream.SAMPLER_CHURN == 18


# -- the prior ---------------------------------------------------------------------------------------------------------


def radii(D: float) -> Tensor:
    """|x| of 4000 samples with 3 x 16 x 16 elements at sigma = 80."""
    net = Gaussian()
    net.img_channels, net.img_resolution = 3, 16
    x = draw_prior(net, torch.arange(4000), 80.0, D, seed=1)
    assert x.shape == (4000, 3, 16, 16) and x.dtype == torch.float32
    return x.double().flatten(1).norm(dim=1)


def test_the_prior_has_the_heavy_tail():
    """R^2 / r^2 ~ BetaPrime(N/2, D/2) with r = sigma sqrt(D) [Xu et al. 2023]; chi^2 for R / sigma at D = inf.

    The seed is fixed; on fresh ones the two laws together fail once in 5 million runs.
    """
    N, D = 768, 128.0
    ratio = (radii(D) / (80.0 * math.sqrt(D))).square().numpy()
    assert scipy.stats.kstest(ratio, scipy.stats.betaprime(N / 2, D / 2).cdf).pvalue > 1e-7
    gaussian = scipy.stats.chi2(N).cdf
    assert scipy.stats.kstest((radii(math.inf) / 80).square().numpy(), gaussian).pvalue > 1e-7
    # The test has the power to tell one from the other.
    assert scipy.stats.kstest(ratio * D, gaussian).pvalue < 1e-50


def test_networks_of_discrete_time_are_sampled_at_the_levels_they_know():
    net = iDDPMPrecond(
        img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), dropout=0.0, M=50,
    ).eval()  # fmt: skip
    seen = []
    net.register_forward_pre_hook(lambda _module, inputs: seen.append(float(inputs[1][0])))
    sample_teacher(net, 0, 2, D=math.inf, steps=5, seed=0)
    assert len(seen) == 9
    assert {torch.tensor(sigma).item() for sigma in seen} <= set(net.u.tolist())
    assert max(seen) <= 80 * 1.5 and min(seen) >= net.sigma_min
    # Churn raises to levels that the network knows, too; levels that it would take for 0 are refused.
    calm, seen[:] = set(seen), []
    assert heun_sample(net, 2, D=math.inf, steps=5, seed=0, sigma_min=net.sigma_min, churn=Churn(5.0)).isfinite().all()
    assert {torch.tensor(sigma).item() for sigma in seen} <= set(net.u.tolist()) and set(seen) - calm
    assert heun_sample(net, 2, D=math.inf, steps=5, seed=0).isfinite().all()  # the usual ends are those that it knows
    with pytest.raises(ValueError, match=r"^the network rounds noise level 0.0015 to 0: give no level that low$"):
        heun_sample(net, 2, D=math.inf, steps=5, seed=0, sigma_min=0.0015)


def test_a_teacher_is_sampled_within_its_range():
    net = VEPrecond(
        img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), dropout=0.0,
    ).eval()  # fmt: skip
    seen = []
    net.register_forward_pre_hook(lambda _module, inputs: seen.append(float(inputs[1][0])))
    sample_teacher(net, 0, 2, D=math.inf, steps=4, seed=0)
    assert (max(seen), min(seen)) == pytest.approx((80.0, 0.02))
