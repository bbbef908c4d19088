"""Noise levels: which sigma each step of training and sampling uses."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipfm.kernels import philox
from ipfm.models import NetworkConfig


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of EDM [Karras et al. 2022, table 1] and of the generator step [Zhou et al. 2024].

    Everything is parametrised by sigma at every D; the norm of the auxiliary variable is r = sigma sqrt(D).

    Raises:
        ValueError: a level that is not finite and positive, or a range that is empty.
    """

    sigma_min: float = 0.002
    """Smallest noise level of the sampler's grid."""
    sigma_max: float = 80.0
    """Largest noise level, where the prior is drawn."""
    rho: float = 7.0
    """Exponent of the grid: sigma^(1/rho) is spaced evenly."""
    sigma_data: float = 0.5
    """Standard deviation of the data that the preconditioning assumes."""
    p_mean: float = -1.2
    """Mean of ln sigma in the denoising loss."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in the denoising loss."""
    t_max: float = 800.0
    """The generator step draws t uniformly in (0, t_max / 1000); t = 0 is sigma_min, t = 1 is sigma_max."""

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "rho", "sigma_data", "p_std"):
            value = getattr(self, name)
            if not (_finite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if not _finite(self.p_mean):
            raise ValueError(f"p_mean must be a finite number, got {self.p_mean}")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not (_finite(self.t_max) and 0 < self.t_max <= 1000):
            raise ValueError(f"t_max must lie in (0, 1000], got {self.t_max}")

    def denoising(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) float32 of the denoising loss: ln sigma ~ N(p_mean, p_std^2) [Karras et al. 2022, table 1].

        Args:
            sample_index: (B,) int64, the samples' global indices.
            seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
            stream: of the random numbers, likewise.
            step: of the random numbers, likewise.

        Raises:
            ValueError: as in `ipfm.kernels.philox.uniform`.
        """
        normal = philox.normal(sample_index, 1, seed=seed, stream=stream, step=step)[:, 0]
        return (normal.double() * self.p_std + self.p_mean).exp().float()

    def generator(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) float32 of the generator step: the grid at t ~ U(0, t_max / 1000). Arguments as in `denoising`."""
        t = philox.uniform(sample_index, 1, seed=seed, stream=stream, step=step)[:, 0]
        return self.at(t.double() * (self.t_max / 1000)).float()

    def at(self, t: Tensor) -> Tensor:
        """sigma(t), increasing from sigma_min to sigma_max [Karras et al. 2022, eq. 5, reversed].

        Args:
            t: of any shape, in [0, 1].

        Returns:
            sigma, of t's shape and dtype.
        """
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + (1 - t) * (low - high)) ** self.rho

    def karras(self, steps: int) -> Tensor:
        """The sampler's grid: (steps + 1,) float64, sigma_max first, then falling to sigma_min and a last 0.

        One step has no room for sigma_min: its grid is sigma_max, 0.

        Raises:
            ValueError: fewer than one step.
        """
        _check_steps("the number of sampling steps", steps)
        t = torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)
        return torch.cat([self.at(t), torch.zeros(1, dtype=torch.float64)])


def training_sigmas(
    network: NetworkConfig, noise: NoiseLevels, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor
) -> Tensor:
    """sigma (B,) float32 of a teacher's training, by its preconditioning [Karras et al. 2022, table 1, training].

    EDM: ln sigma ~ N(p_mean, p_std^2). VP: t ~ U(epsilon_t, 1), sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).
    VE: ln sigma ~ U(ln sigma_min, ln sigma_max), of the network's range.

    Args:
        network: what is trained.
        noise: p_mean and p_std of EDM.
        sample_index: (B,) int64, the samples' global indices.
        seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
        stream: of the random numbers, likewise.
        step: of the random numbers, likewise.

    Raises:
        ValueError: as in `check_trainable`, and in `ipfm.kernels.philox.uniform`.
    """
    check_trainable(network)
    if network.precond == "EDMPrecond":
        return noise.denoising(sample_index, seed=seed, stream=stream, step=step)
    u = philox.uniform(sample_index, 1, seed=seed, stream=stream, step=step)[:, 0].double()
    if network.precond == "VPPrecond":
        t = network.epsilon_t + (1 - network.epsilon_t) * u
        return torch.expm1(network.beta_d / 2 * t.square() + network.beta_min * t).sqrt().float()
    low, high = math.log(network.sigma_min), math.log(network.sigma_max)
    return (low + (high - low) * u).exp().float()


def weight_sigma_data(network: NetworkConfig, noise: NoiseLevels) -> float:
    """sigma_data of the weight 1 / sigma_data^2 + 1 / sigma^2 in a teacher's training; inf: 1 / sigma^2 of VP and VE.

    Source: Karras et al. 2022, table 1, loss weighting.
    """
    return noise.sigma_data if network.precond == "EDMPrecond" else math.inf


def check_trainable(network: NetworkConfig) -> None:
    """Check that a teacher of this preconditioning can be trained.

    Raises:
        ValueError: it cannot: iDDPM's loss has a part for variances, which these networks are not trained by here; or
            VE's range of noise levels begins at 0.
    """
    if network.precond == "iDDPMPrecond":
        raise ValueError(
            "iDDPM networks are not trained here, as their loss has a part for variances: precond can be edm, vp or ve"
        )
    if network.precond == "VEPrecond" and not 0 < network.sigma_min < network.sigma_max < math.inf:
        raise ValueError(
            f"a VE network is trained at noise levels between its sigma_min and sigma_max, which must be finite and "
            f"above 0, got {network.sigma_min:g} and {network.sigma_max:g}"
        )


def few_step_sigmas(steps: int, sigma_init: float = 2.5) -> tuple[float, ...]:
    """Default levels of a K-step generator: sigma_init (K - k + 1) / K for k = 1..K, e.g. 2.5, 1.875, 1.25, 0.625.

    Raises:
        ValueError: fewer than one step, or a sigma_init that is not finite and positive.
    """
    _check_steps("the number of generator steps", steps)
    if not (_finite(sigma_init) and sigma_init > 0):
        raise ValueError(f"sigma_init must be a finite number > 0, got {sigma_init!r}")
    return tuple(sigma_init * (steps - k) / steps for k in range(steps))


def check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Levels of a few-step generator, as floats.

    Args:
        sigmas: a sequence, an array or a tensor.

    Raises:
        ValueError: there is none, or they are not finite, positive and strictly falling.
    """
    sigmas = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    if not isinstance(sigmas, Sequence) or not all(isinstance(sigma, numbers.Real) for sigma in sigmas):
        raise ValueError(f"sigmas must be a sequence of numbers, got {sigmas!r}")
    levels = tuple(float(sigma) for sigma in sigmas)
    listed = ", ".join(f"{sigma:g}" for sigma in levels)
    if not levels:
        raise ValueError("sigmas must hold at least one noise level, got none")
    if any(not (math.isfinite(sigma) and sigma > 0) for sigma in levels):
        raise ValueError(f"sigmas must be finite and > 0, got {listed}")
    if any(later >= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must fall strictly, got {listed}")
    return levels


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_steps(what: str, steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"{what} must be an integer >= 1, got {steps!r}")
