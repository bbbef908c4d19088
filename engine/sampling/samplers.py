"""Sampling: the teacher's probability-flow ODE, also stochastically, and generators of one and of a few steps."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ipfm.engine.noise_levels import NoiseLevels, check_sigmas
from ipfm.engine.random_streams import Stream
from ipfm.engine.sampling.denoisers import Denoiser, GuidedDenoiser, RoundsSigma
from ipfm.engine.sampling.own_settings import check_denoiser, check_given, own_D, own_ends, own_labels, own_levels
from ipfm.engine.sampling.seeds import SampleNoise, Seeds
from ipfm.engine.sampling.trajectory import trajectory, trajectory_network

Solver = Literal["heun", "euler"]

# Ends of the sampler's grid [Karras et al. 2022, table 1], where the network supports them.
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def draw_prior(net: Denoiser, sample_index: Tensor, sigma: float, D: float, *, seed: int) -> Tensor:
    """x ~ p_r(. | 0) at r = sigma sqrt(D) [Xu et al. 2023, eq. 4], float32 (B, C, H, W).

    A sample depends on (seed, its index) alone: the batch it is drawn in changes nothing.

    Args:
        net: a network that makes images of the shape wanted; it is not called.
        sample_index: (B,) int64; the result is on its device.
        sigma: noise level, in the units of the data.
        D: auxiliary dimensions, in (0, inf].
        seed: in [0, 2^64).

    Raises:
        ValueError: a number out of its range.
    """
    zeros = torch.zeros(_shape(net, len(sample_index)), device=sample_index.device)
    return _perturbed(SampleNoise(((seed, sample_index),)), zeros, sigma, D, stream=Stream.SAMPLER_LATENT, step=0)


def nfe(steps: int, solver: Solver = "heun") -> int:
    """Network evaluations an image of `heun_sample`: 2 steps - 1, or `steps` with Euler's method; churn adds none.

    Raises:
        ValueError: fewer than one step, or no such solver.
    """
    _check_solver(solver)
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"the number of sampling steps must be an integer >= 1, got {steps!r}")
    return steps if solver == "euler" else 2 * steps - 1


def heun_sample(
    net: Denoiser,
    n: int,
    *,
    D: float | None = None,
    steps: int | None = None,
    seed: Seeds,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = 7.0,
    first_index: int = 0,
    sigmas: tuple[float, ...] | None = None,
    solver: Solver = "heun",
    churn: Churn | None = None,
    guide: Denoiser | None = None,
    guidance: float | None = None,
    override: bool = False,
) -> Tensor:
    """Sampling of the teacher by its ODE, deterministic or stochastic [Karras et al. 2022, algorithms 1 and 2].

    The ODE is dx/dsigma = (x - net(x, sigma)) / sigma at every D. It takes `nfe(steps, solver)` evaluations of
    the network. The state is kept in float64. A network that supports certain noise levels only says so with
    `round_sigma(sigma)`, and is given those.

    With `churn`, noise is added before each step, x_hat = x + churn.noise sqrt(sigma_hat^2 - sigma^2) eps, and the step
    starts from the higher level sigma_hat. At D = inf eps is Gaussian, and exact: noise of level sigma becomes noise of
    level sigma_hat. At finite D eps is drawn from the kernel of that D, as the prior is, and this is an approximation,
    because the sum of two Student t variables is not a Student t variable: above D = 2 it has the right covariance and
    too light tails, below too heavy ones. Karras et al. treat D = inf alone.

    With `guide`, net(x, sigma) is replaced by guide(x, sigma) + guidance (net(x, sigma) - guide(x, sigma)) in every
    evaluation [Ho & Salimans 2022; Karras et al. 2024, eq. 3], which then are twice as many. That is the denoiser of no
    distribution, at any D.

    Args:
        net: denoiser.
        n: number of images, >= 0.
        D: auxiliary dimensions of the prior and of the churn, in (0, inf]; the network's own when None.
        steps: number of steps, >= 1 (18 for CIFAR-10, 40 for 64x64 in the paper).
        seed: images first_index..first_index + n - 1 of this seed are made, whatever the batch; or n seeds, each of
            which makes its image first_index.
        latents: x at the first level, (n, C, H, W); drawn from the prior p_r(. | 0) when None.
        class_labels: (n, label_dim) float32 or None, which draws them, as `ipfm sample` does, for a network that was
            read from disk and knows classes.
        sigma_min: lowest level of the grid, in the units of the data; the usual one is raised to the lowest level that
            the network knows, if it says that it knows less.
        sigma_max: highest level of the grid, where the prior is drawn; the usual one is lowered likewise. PFGM++'s own
            sampler starts at 80 whatever it is told, this one at the level that is given.
        rho: exponent of the grid: sigma^(1/rho) is spaced evenly.
        first_index: index of the first image, >= 0.
        sigmas: noise levels, strictly falling, one a step, in place of `steps` and the grid; 0 follows the last one.
        solver: "heun", or "euler": first order, one evaluation a step.
        churn: noise to add; None adds none.
        guide: a weaker denoiser of such images, which the images are driven away from: one without classes
            (classifier-free guidance), or one that was trained less (autoguidance). It is given the same labels, if it
            knows as many, and none if it knows none.
        guidance: how far, >= 0; 1 is `net` alone, and the guide is not evaluated. It is given with a guide.
        override: sample a network that was read from disk at another D than its own, or a generator as a teacher.

    Returns:
        images (n, C, H, W), float32, about [-1, 1].

    Raises:
        ValueError: a number out of its range, no or two sets of noise levels, a level that the network rounds to 0,
            latents of another shape, what the network was not made with: D, labels, or it is a generator; or a guide
            of other images, of another D, or without a guidance.

    Example:
        >>> import torch
        >>> from ipfm.engine import heun_sample
        >>> from ipfm.models import build_network, presets
        >>> net = build_network(presets.get("digits", D=128)).eval()
        >>> images = heun_sample(net, 4, D=128, steps=3, seed=0)
        >>> images.shape
        torch.Size([4, 1, 8, 8])
        >>> last = heun_sample(net, 1, D=128, steps=3, seed=0, first_index=3)
        >>> torch.allclose(last, images[3:], atol=1e-4)
        True
    """
    _check_solver(solver)
    check_given(net, latents, class_labels)
    if churn is not None and not isinstance(churn, Churn):
        raise ValueError(f"churn must be a Churn, such as Churn(amount=40), got {churn!r}")
    check_denoiser(net, override=override)
    D = own_D(net, D, override=override)
    denoise = _guided(net, guide, guidance)
    grid = _grid(net, steps, sigmas, NoiseLevels(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho))
    levels = supported(net, grid)
    count, churn = len(levels), churn or Churn()
    device = _device(net, latents)
    draws = SampleNoise.of(n, seed, first_index, device)
    class_labels = own_labels(net, class_labels, draws)
    x = _start(net, n, levels[0], D, draws, latents, device).double()
    with torch.no_grad():
        for i, (current, following) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
            raised = churn.raised(current, count)
            if raised > current:
                (raised,) = supported(net, [raised])
                level = churn.noise * math.sqrt(raised**2 - current**2)
                x = _perturbed(draws, x, level, D, stream=Stream.SAMPLER_CHURN, step=i)
            slope = (x - _denoise(denoise, x, raised, class_labels)) / raised
            euler = x + (following - raised) * slope
            if following > 0 and solver == "heun":
                slope_there = (euler - _denoise(denoise, euler, following, class_labels)) / following
                euler = x + (following - raised) * (slope + slope_there) / 2
            x = euler
    return x.float()


def generate(
    net: Denoiser,
    n: int,
    *,
    D: float | None = None,
    sigmas: tuple[float, ...] | None = None,
    seed: Seeds,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    first_index: int = 0,
    override: bool = False,
) -> Tensor:
    """Images of a K-step generator, one evaluation a level [IPFM, section 3.4 and algorithm 2].

    x_1 ~ p_{r_1}(. | 0); y_k = net(x_k, sigma_k); x_{k+1} ~ p_{r_{k+1}}(. | y_k); the output is y_K.

    Args:
        net: generator.
        n: number of images, >= 0.
        D: auxiliary dimensions the generator was trained for, in (0, inf]; the network's own when None.
        sigmas: its noise levels, strictly falling; their number is the number of evaluations. Those stored with a
            generator that was read from disk when None.
        seed: images first_index..first_index + n - 1 of this seed are made, whatever the batch; or n seeds, each of
            which makes its image first_index.
        latents: x_1, (n, C, H, W); drawn from the prior at sigmas[0] when None.
        class_labels: (n, label_dim) float32 or None, which draws them, as `ipfm sample` does, for a network that was
            read from disk and knows classes.
        first_index: index of the first image, >= 0.
        override: draw from a generator that was read from disk with another D, or at other levels, than its own.

    Returns:
        images (n, C, H, W), float32, about [-1, 1].

    Raises:
        ValueError: a number out of its range, latents of another shape, or what the network was not made with: D, noise
            levels, labels.

    Example:
        >>> import torch
        >>> from ipfm.engine import generate
        >>> from ipfm.models import build_network, presets
        >>> net = build_network(presets.get("digits", D=128)).eval()
        >>> images = generate(net, 4, D=128, sigmas=(2.5, 1.25), seed=0)
        >>> images.shape
        torch.Size([4, 1, 8, 8])
        >>> last = generate(net, 1, D=128, sigmas=(2.5, 1.25), seed=0, first_index=3)
        >>> torch.allclose(last, images[3:], atol=1e-4)
        True
    """
    check_given(net, latents, class_labels)
    D, levels = own_D(net, D, override=override), own_levels(net, sigmas, override=override)
    device = _device(net, latents)
    draws = SampleNoise.of(n, seed, first_index, device)
    class_labels = own_labels(net, class_labels, draws)
    x = _start(net, n, levels[0], D, draws, latents, device)
    with torch.no_grad():
        y = _denoise(net, x, levels[0], class_labels)
        for k, sigma in enumerate(levels[1:], start=1):
            x = _perturbed(draws, y, sigma, D, stream=Stream.SAMPLER_NOISE, step=k)
            y = _denoise(net, x, sigma, class_labels)
    return y.float()


def trajectory_sample(
    net: Denoiser,
    n: int,
    *,
    D: float | None = None,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    seed: Seeds,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    first_index: int = 0,
    override: bool = False,
) -> Tensor:
    """Images of a generator that knows the whole trajectory of each latent, in one evaluation [Tee et al.].

    z ~ p_r(. | 0) at level T = sigma_max, which at D = inf is the paper's Gaussian; the image is x_theta(z, sigma_min)
    of `ipfm.engine.sampling.trajectory.trajectory`.

    Args:
        net: generator, a network with EDM's preconditioning.
        n: number of images, >= 0.
        D: auxiliary dimensions the generator was trained for, in (0, inf]; the network's own when None.
        sigma_max: T, where the trajectory that the generator was trained on starts; when None what is stored with a
            generator that was read from disk, else 80.
        sigma_min: where it ends; likewise, else 0.002.
        seed: images first_index..first_index + n - 1 of this seed are made, whatever the batch; or n seeds, each of
            which makes its image first_index.
        latents: z, (n, C, H, W); drawn from the prior at sigma_max when None.
        class_labels: (n, label_dim) float32 or None, which draws them, as `ipfm sample` does, for a network that was
            read from disk and knows classes.
        first_index: index of the first image, >= 0.
        override: draw from a generator that was read from disk with another D, or at other levels, than its own.

    Returns:
        images (n, C, H, W), float32, about [-1, 1].

    Raises:
        ValueError: another preconditioning, a number out of its range, latents of another shape, or what the network
            was not made with: D, ends of the trajectory, labels.
    """
    check_given(net, latents, class_labels)
    network = trajectory_network(net)
    D, (high, low) = own_D(net, D, override=override), own_ends(net, sigma_max, sigma_min, override=override)
    ends = NoiseLevels(sigma_min=low, sigma_max=high)
    device = _device(network, latents)
    draws = SampleNoise.of(n, seed, first_index, device)
    class_labels = own_labels(net, class_labels, draws)
    z = _start(network, n, ends.sigma_max, D, draws, latents, device)
    with torch.no_grad():
        x = trajectory(
            network,
            z,
            torch.full((n,), ends.sigma_min, dtype=torch.float64, device=device),
            sigma_max=ends.sigma_max,
            sigma_data=network.sigma_data,
            input_dtype=network.input_dtype,
            class_labels=class_labels,
        )
    return x.float()


def _guided(net: Denoiser, guide: Denoiser | None, guidance: float | None) -> Denoiser:
    """What is evaluated: the network, or the network with its guide."""
    if guide is None:
        if guidance is not None:
            raise ValueError(f"guidance {guidance!r} was given without a guide: give the network that guides, too")
        return net
    check_given(guide, None, None)
    if guidance is None:
        raise ValueError("a guide was given without guidance: give its factor, such as 1.4")
    return GuidedDenoiser(net, guide, guidance)


def _check_solver(solver: str) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")


def usual_range(net: object) -> tuple[float, float]:
    """The lowest and the highest noise level that a network is sampled at unasked: 0.002, 80, where it knows them."""
    return max(SIGMA_MIN, getattr(net, "sigma_min", 0.0)), min(SIGMA_MAX, getattr(net, "sigma_max", math.inf))


def _grid(net: Denoiser, steps: int | None, sigmas: tuple[float, ...] | None, noise: NoiseLevels) -> list[float]:
    """The levels at which the steps start."""
    if sigmas is None:
        if steps is None:
            raise ValueError("give the number of sampling steps, or their noise levels as sigmas")
        low, high = usual_range(net)
        low = low if noise.sigma_min == SIGMA_MIN else noise.sigma_min
        high = high if noise.sigma_max == SIGMA_MAX else noise.sigma_max
        return replace(noise, sigma_min=low, sigma_max=high).karras(steps)[:-1].tolist()
    if steps is not None or noise != NoiseLevels():
        raise ValueError("sigmas take the place of steps, sigma_min, sigma_max and rho: give one or the other")
    return list(check_sigmas(sigmas))


def supported(net: Denoiser, sigmas: list[float]) -> list[float]:
    """The noise levels nearest to `sigmas` that the network supports.

    Raises:
        ValueError: it rounds one to 0.
    """
    if not isinstance(net, RoundsSigma):
        return sigmas
    levels = [float(net.round_sigma(torch.tensor(sigma, dtype=torch.float64))) for sigma in sigmas]
    for sigma, level in zip(sigmas, levels, strict=True):
        if not level > 0:
            raise ValueError(f"the network rounds noise level {sigma:g} to {level:g}: give no level that low")
    return levels


def _start(
    net: Denoiser, n: int, sigma: float, D: float, draws: SampleNoise, latents: Tensor | None, device: torch.device
) -> Tensor:
    """x at the first level: the latents given, or else the prior."""
    if latents is None:
        zeros = torch.zeros(_shape(net, n), device=device)
        return _perturbed(draws, zeros, sigma, D, stream=Stream.SAMPLER_LATENT, step=0)
    if tuple(latents.shape) != _shape(net, n):
        raise ValueError(f"latents must have shape {_shape(net, n)}, got {tuple(latents.shape)}")
    return latents


def _perturbed(draws: SampleNoise, y: Tensor, sigma: float, D: float, *, stream: Stream, step: int) -> Tensor:
    return draws.perturb(y, torch.full((len(y),), sigma, device=y.device), D, stream=stream, step=step)


def _shape(net: Denoiser, n: int) -> tuple[int, int, int, int]:
    return n, net.img_channels, net.img_resolution, net.img_resolution


def _denoise(net: Denoiser, x: Tensor, sigma: float, class_labels: Tensor | None) -> Tensor:
    level = torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
    return net(x, level, class_labels)


def _device(net: Denoiser, latents: Tensor | None) -> torch.device:
    if latents is not None:
        return latents.device
    if isinstance(net, torch.nn.Module):
        return next((p.device for p in net.parameters()), torch.device("cpu"))
    return torch.device("cpu")


@dataclass(frozen=True)
class Churn:
    """Before step i of N, noise raises sigma_i to (1 + gamma_i) sigma_i, gamma_i = min(amount / N, sqrt(2) - 1).

    That is where sigma_min <= sigma_i <= sigma_max; elsewhere, and with amount 0, the step is deterministic.

    Raises:
        ValueError: a number out of its range, or a range that is empty.
    """

    amount: float = 0.0
    """S_churn, >= 0."""
    sigma_min: float = 0.0
    """S_tmin, >= 0."""
    sigma_max: float = math.inf
    """S_tmax, in [sigma_min, inf]."""
    noise: float = 1.0
    """S_noise, > 0: factor of the noise that is added; a little above 1 makes up for detail that networks lose."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
                raise ValueError(f"churn: {name} must be a number, got {value}")
        for name in ("amount", "sigma_min", "noise"):
            value = getattr(self, name)
            if not (0 <= value < math.inf and (value > 0 or name != "noise")):
                raise ValueError(
                    f"churn: {name} must be a finite number {'>' if name == 'noise' else '>='} 0, got {value}"
                )
        if not self.sigma_min <= self.sigma_max:
            raise ValueError(f"churn: sigma_min must be at most sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def raised(self, sigma: float, steps: int) -> float:
        """The noise level (1 + gamma) sigma from which one of `steps` steps starts; `sigma` itself where gamma = 0."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            return sigma
        return sigma + min(self.amount / steps, math.sqrt(2) - 1) * sigma
