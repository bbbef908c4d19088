"""Sampling: the teacher's probability-flow ODE and the few-step generator."""

from __future__ import annotations

import itertools
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ipfm.engine.noise_levels import NoiseLevels, check_sigmas
from ipfm.engine.streams import Stream
from ipfm.kernels import perturb


class Denoiser(Protocol):
    """What the samplers need of a network: `net(x, sigma, class_labels)` and the shape of its images."""

    img_channels: int
    img_resolution: int

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class RoundsSigma(Protocol):
    """A network that knows which noise levels it supports."""

    def round_sigma(self, sigma: Tensor) -> Tensor: ...


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
    shape = (len(sample_index), net.img_channels, net.img_resolution, net.img_resolution)
    zeros = torch.zeros(shape, device=sample_index.device)
    sigmas = torch.full((len(sample_index),), sigma, device=sample_index.device)
    x = perturb(zeros, sigmas, D, seed=seed, stream=Stream.SAMPLER_LATENT, step=0, sample_index=sample_index)
    assert isinstance(x, Tensor)
    return x


def heun_sample(
    net: Denoiser,
    n: int,
    *,
    D: float,
    steps: int,
    seed: int,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    first_index: int = 0,
) -> Tensor:
    """Deterministic second-order sampling of the teacher [Karras et al. 2022, algorithm 1].

    The ODE is dx/dsigma = (x - net(x, sigma)) / sigma at every D. It takes 2 steps - 1 evaluations of the network. The
    state is kept in float64. A network that supports certain noise levels only says so with `round_sigma(sigma)`, and
    is given those.

    Args:
        net: denoiser.
        n: number of images, >= 0.
        D: auxiliary dimensions of the prior, in (0, inf].
        steps: number of Heun steps, >= 1 (18 for CIFAR-10, 40 for 64x64 in the paper).
        seed: images first_index..first_index + n - 1 of this seed are made, whatever the batch.
        latents: x at sigma_max, (n, C, H, W); drawn from the prior p_r(. | 0) when None.
        class_labels: (n, label_dim) float32 or None.
        sigma_min, sigma_max, rho: the grid.
        first_index: index of the first image, >= 0.

    Returns:
        images (n, C, H, W), float32, about [-1, 1].

    Raises:
        ValueError: a number out of its range, or latents of another shape.
    """
    sigmas = _supported(net, NoiseLevels(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).karras(steps))
    device = _device(net, latents)
    x = _start(net, n, sigmas[0], D, seed, latents, first_index, device).double()
    with torch.no_grad():
        for current, following in itertools.pairwise(sigmas):
            slope = (x - _denoise(net, x, current, class_labels)) / current
            euler = x + (following - current) * slope
            if following > 0:
                slope_there = (euler - _denoise(net, euler, following, class_labels)) / following
                euler = x + (following - current) * (slope + slope_there) / 2
            x = euler
    return x.float()


def generate(
    net: Denoiser,
    n: int,
    *,
    D: float,
    sigmas: tuple[float, ...],
    seed: int,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    first_index: int = 0,
) -> Tensor:
    """Images of a K-step generator, one evaluation a level [IPFM, section 3.4 and algorithm 2].

    x_1 ~ p_{r_1}(. | 0); y_k = net(x_k, sigma_k); x_{k+1} ~ p_{r_{k+1}}(. | y_k); the output is y_K.

    Args:
        net: generator.
        n: number of images, >= 0.
        D: auxiliary dimensions the generator was trained for, in (0, inf].
        sigmas: its noise levels, strictly falling; their number is the number of evaluations.
        seed: images first_index..first_index + n - 1 of this seed are made, whatever the batch.
        latents: x_1, (n, C, H, W); drawn from the prior at sigmas[0] when None.
        class_labels: (n, label_dim) float32 or None.
        first_index: index of the first image, >= 0.

    Returns:
        images (n, C, H, W), float32, about [-1, 1].

    Raises:
        ValueError: a number out of its range, or latents of another shape.
    """
    levels = check_sigmas(sigmas)
    device = _device(net, latents)
    x = _start(net, n, levels[0], D, seed, latents, first_index, device)
    index = torch.arange(first_index, first_index + n, device=device)
    with torch.no_grad():
        y = _denoise(net, x, levels[0], class_labels)
        for k, sigma in enumerate(levels[1:], start=1):
            noise_level = torch.full((n,), sigma, device=device)
            x = perturb(y, noise_level, D, seed=seed, stream=Stream.SAMPLER_NOISE, step=k, sample_index=index)
            y = _denoise(net, x, sigma, class_labels)
    return y.float()


def _supported(net: Denoiser, sigmas: Tensor) -> list[float]:
    """The grid, its last value 0, at the levels that the network supports."""
    if isinstance(net, RoundsSigma):
        sigmas = torch.stack([*(net.round_sigma(sigma).to(sigmas) for sigma in sigmas[:-1]), sigmas[-1]])
    return sigmas.tolist()


def _start(
    net: Denoiser,
    n: int,
    sigma: float,
    D: float,
    seed: int,
    latents: Tensor | None,
    first_index: int,
    device: torch.device,
) -> Tensor:
    for name, value in (("the number of images", n), ("the index of the first image", first_index)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {value}")
    shape = (n, net.img_channels, net.img_resolution, net.img_resolution)
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents
    index = torch.arange(first_index, first_index + n, device=device)
    return draw_prior(net, index, sigma, D, seed=seed)


def _denoise(net: Denoiser, x: Tensor, sigma: float, class_labels: Tensor | None) -> Tensor:
    level = torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
    return net(x, level, class_labels)


def _device(net: Denoiser, latents: Tensor | None) -> torch.device:
    if latents is not None:
        return latents.device
    if isinstance(net, torch.nn.Module):
        return next((p.device for p in net.parameters()), torch.device("cpu"))
    return torch.device("cpu")
