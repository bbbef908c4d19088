"""The preconditioners of earlier diffusion models: VP and VE (Song et al. 2021), iDDPM (Nichol & Dhariwal 2021).

Their scalings are those of Karras et al. (2022), table 1, and appendix C.
"""

from typing import Any

import torch
from torch import Tensor

from .buffers import Float32Buffers
from .config import NetworkConfig
from .precond import Precond
from .schedules import iddpm_levels


class VPPrecond(Precond):
    """c_skip = 1, c_out = -σ, c_in = 1/√(σ²+1), c_noise = (M-1)·t(σ), where t inverts

    σ(t) = √(exp(beta_d·t²/2 + beta_min·t) - 1): t(σ) = (√(beta_min² + 2·beta_d·ln(1+σ²)) - beta_min)/beta_d.

    sigma_min and sigma_max are σ(epsilon_t) and σ(1), as float32 has them.
    """

    PRECOND = "VPPrecond"

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        beta_d, beta_min = self.config.beta_d, self.config.beta_min
        log = torch.log1p(sigma.square())
        # The difference in the numerator of t(σ), multiplied out: it would cancel at small σ.
        t = 2 * log / ((beta_min**2 + 2 * beta_d * log).sqrt() + beta_min)
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (self.config.M - 1) * t


class VEPrecond(Precond):
    """c_skip = 1, c_out = σ, c_in = 1, c_noise = ln(σ/2)."""

    PRECOND = "VEPrecond"

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()


class iDDPMPrecond(Precond, Float32Buffers):
    """c_skip = 1, c_out = -σ, c_in = 1/√(σ²+1), c_noise = M-1-j with u_j the level nearest to σ.

    The network knows the M + 1 noise levels of the buffer `u` (M + 1), float32, falling to u_M = 0; see `iddpm_levels`.
    sigma_min and sigma_max are u_{M-1} and u_0. The inner U-Net returns 2·img_channels channels, of which the second
    half, the variances, is not used.
    """

    PRECOND = "iDDPMPrecond"
    u: Tensor

    def __init__(self, config: NetworkConfig | None = None, **keywords: Any) -> None:
        super().__init__(config, **keywords)
        self.register_buffer("u", torch.tensor(self._levels(), dtype=torch.float32))

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_noise = self.config.M - 1 - self._nearest(sigma).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), c_noise

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The noise level of `u` nearest to `sigma`, of its shape and dtype (float32 for a number), on its device."""
        given = torch.as_tensor(sigma)
        if not given.is_floating_point():
            given = given.float()
        return self.u.to(given.device)[self._nearest(given)].to(given.dtype)

    def _nearest(self, sigma: Tensor) -> Tensor:
        """The index into `u`, of the shape of `sigma`."""
        return (sigma.unsqueeze(-1) - self.u.to(sigma)).abs().argmin(dim=-1)

    def _levels(self) -> list[float]:
        return iddpm_levels(self.config.M, self.config.C_1, self.config.C_2).tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The levels belong to the options; others in a file would mean that the two do not fit.
        given = state_dict.get(prefix + "u")
        if given is not None and given.shape == self.u.shape:
            expected = torch.tensor(self._levels(), dtype=torch.float32, device="cpu")
            if not torch.allclose(given.detach().float().cpu(), expected, rtol=1e-3):
                args[-1].append(f"{prefix}u holds other noise levels than M, C_1 and C_2 of the configuration make")
        super()._load_from_state_dict(state_dict, prefix, *args)
