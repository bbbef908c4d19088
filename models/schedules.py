"""Noise levels of VP (Song et al. 2021) and iDDPM (Nichol and Dhariwal 2021) networks.

In the form of Karras et al. (2022), table 1 and appendix C. Everything is evaluated in float32, as it was for the
published networks: near t = 0 its rounding shows in the third digit.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray


def vp_sigma_range(beta_d: float, beta_min: float, epsilon_t: float) -> tuple[float, float]:
    """(σ(epsilon_t), σ(1)) of σ(t) = √(exp(beta_d·t²/2 + beta_min·t) - 1)."""
    t = np.array([epsilon_t, 1.0], dtype=np.float32)
    with np.errstate(all="ignore"):
        exponent = np.float32(0.5 * beta_d) * t**2 + np.float32(beta_min) * t
        # Through float64, so that exp is correctly rounded: its last bit is a tenth of σ at small t.
        low, high = np.sqrt(np.exp(exponent.astype(np.float64)).astype(np.float32) - 1)
    return float(low), float(high)


@functools.lru_cache(maxsize=16)
def iddpm_levels(M: int, C_1: float, C_2: float) -> NDArray[np.float32]:
    """u (M + 1,) float32, falling from u_0, the largest noise level, to u_M = 0; not to be written to.

    u_{j-1} = √((u_j² + 1) / max(ᾱ_{j-1}/ᾱ_j, C_1) - 1) with ᾱ_j = sin²(π/2 · j / (M·(C_2 + 1))).
    """
    u = np.zeros(M + 1, dtype=np.float32)
    one = np.float32(1)
    # Numbers beyond float32 make infinite or undefined levels, which the caller sees.
    with np.errstate(all="ignore"):
        angles = np.float32(math.pi / 2) * np.arange(M + 1, dtype=np.float32) / np.float32(M) / np.float32(C_2 + 1)
        alpha_bar = np.sin(angles) ** 2
        ratios = np.maximum(alpha_bar[:-1] / alpha_bar[1:], np.float32(C_1))
        for j in range(M, 0, -1):
            u[j - 1] = np.sqrt((u[j] * u[j] + one) / ratios[j - 1] - one)
    u.flags.writeable = False
    return u
