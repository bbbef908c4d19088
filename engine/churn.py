"""How much noise a stochastic sampler adds before each of its steps [Karras et al. 2022, algorithm 2]."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass


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
