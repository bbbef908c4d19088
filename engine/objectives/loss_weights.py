"""Weights lambda of the generator's loss by name, beside that of the method: what `--weight` chooses among.

The best student is the same under any weight that depends on sigma and x alone; what changes is which noise levels, and
which samples, the generator follows most. Adam does not see a constant factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ipfm.engine.checks import is_number
from ipfm.engine.objectives.losses import Noisy, OnePass, Weighting, per_sample
from ipfm.kernels.reference import SMALL_SQUARE

WeightName = Literal["sid", "sigma", "edm", "score", "unsquared"]
# The formulas, for titles and reports. N: elements of an image.
FORMULAS: Mapping[str, str] = {
    "sid": "1 / mean|T - y|",
    "sigma": "1 / sigma^2",
    "edm": "1 / c_out^2",
    "score": "(N + D) / (|x - T|^2 + sigma^2 D)",
    "unsquared": "1 / sqrt(|T - S|^2 + c)",
}
# Largest power of sigma that a weight is multiplied by.
POWER_LIMIT = 4.0


@dataclass(frozen=True)
class ChosenWeight:
    """A weight by name, in the place of the method's.

    Attributes:
        name: of the weight; y is the sample, x the noisy one, T and S the two predictions at x:
            sid: 1 / mean|T - y| [SiD]; sigma: 1 / sigma^2, with which a square of T - S is the field's [IPFM, eq. 12];
            edm: 1 / c_out^2, the weight of the denoising loss [Karras et al. 2022]; score: (N + D) / (|x - T|^2 + r^2),
            r^2 = sigma^2 D, which turns the difference of two denoisers into one of scores, sample by sample, and is
            1 / sigma^2 at D = inf; unsquared: 1 / sqrt(|T - S|^2 + c), the gradient of a distance for that of its
            square [RealUID, A.4], c = 1e-6 an element.
        power: of sigma, another factor.
        D: of the kernel.
        then: what to take instead of this weight, see `losses.Weighting`; None takes it.
    """

    name: str = "sid"
    power: float = 0.0
    D: float = math.inf
    then: Weighting | None = None

    def among(self, noisy: Noisy, teacher: Tensor, student: Tensor) -> Weighting:
        """The weighting of these samples.

        Args:
            noisy: the perturbed samples.
            teacher: (B, C, H, W) the teacher's raw output at them.
            student: the student's, likewise.
        """

        def weigh(sigma: Tensor, usual: Tensor) -> Tensor:
            own = self._weight(noisy, teacher, student, usual)
            if self.power:
                own = own * sigma.to(own.dtype) ** self.power
            return own if self.then is None else self.then(sigma, own)

        return weigh

    def in_one_pass(self, noisy: Noisy) -> OnePass | None:
        """See `losses.KernelWeighting`: all of them, unless another weighting is to take its place."""
        if self.then is not None:
            return None
        tilt = noisy.sigma**self.power if self.power else None
        if self.name == "edm":
            square = noisy.c_out**-2
            return OnePass("given", square if tilt is None else square * tilt)
        if self.name == "sigma" or (self.name == "score" and math.isinf(self.D)):
            return OnePass("given", noisy.sigma ** (self.power - 2))
        if self.name == "score":
            return OnePass("score", tilt, noisy.sigma, self.D)
        return OnePass("unsquared" if self.name == "unsquared" else "sid", tilt)

    def _weight(self, noisy: Noisy, teacher: Tensor, student: Tensor, usual: Tensor) -> Tensor:
        sigma, c_out = noisy.sigma.to(usual.dtype), noisy.c_out.to(usual.dtype)
        if self.name == "sid":
            return usual
        if self.name == "edm":
            return c_out**-2
        if self.name == "sigma" or (self.name == "score" and math.isinf(self.D)):
            return sigma**-2
        elements = teacher[0].numel()
        if self.name == "score":
            rest, out = (per_sample(c, teacher) for c in (1 - noisy.c_skip.to(usual.dtype), c_out))
            away = (rest * noisy.x.to(usual.dtype) - out * teacher.to(usual.dtype)).square().flatten(1).sum(1)
            # Both by D, which may be large.
            return (elements / self.D + 1) / (away / self.D + sigma.square())
        apart = c_out * torch.linalg.vector_norm((teacher - student).flatten(1).to(usual.dtype), dim=1)
        return (apart.square() + SMALL_SQUARE * elements).rsqrt()


def chosen_weight(name: str, power: float, D: float, then: Weighting | None) -> ChosenWeight | Weighting | None:
    """What the generator's loss is weighted by: `then` alone where the method's weight was chosen."""
    return then if name == "sid" and power == 0 else ChosenWeight(name, power, D, then)


def check_weight(name: Any, power: Any) -> None:
    """Check a choice.

    Raises:
        ValueError: there is no such weight, or the power is out of range.
    """
    names = get_args(WeightName)
    if name not in names:
        raise ValueError(f"weight must be {', '.join(names[:-1])} or {names[-1]}, got {name!r}")
    if not (is_number(power) and abs(power) <= POWER_LIMIT):
        raise ValueError(f"weight-power must be a number in [-{POWER_LIMIT:g}, {POWER_LIMIT:g}], got {power}")


def weight_in_words(settings: Mapping[str, Any]) -> str:
    """The weight of a folder's settings, for reports: "1 / sigma^2"; "" for the method's and for what is damaged."""
    name, power = settings.get("weight", "sid"), settings.get("weight_power", 0.0)
    formula = FORMULAS.get(name, "") if isinstance(name, str) else ""
    tilt = f"sigma^{power:g}" if is_number(power) and power else ""
    if not formula or (name == "sid" and not tilt):
        return ""
    return f"{tilt} {formula}" if tilt else formula
