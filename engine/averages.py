"""What the number of a step decides: moving averages (EMA) of the weights, and learning rates.

Averages are by half-life, by a power of the time, or made afterwards of others.

A power-function average of the weights of the images (0, t] weighs those at the image τ by τ^γ [Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3]: however long the training is, it
forgets the same share of it. Its relative width is the standard deviation of that profile as a share of t,

    std = √((γ + 1) / ((γ + 2)² (γ + 3))).

Any such average of other widths, up to the last time, can be made of stored ones: a linear combination of them, by
least squares over the profiles [the same, appendix C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import numpy as np

# The relative width at γ = 0, where every image weighs the same: powers grow below it.
WIDEST = 12**-0.5
# Averages that the optimiser keeps at most.
MOST = 4
LrSchedule = Literal["constant", "linear", "rsqrt"]
SCHEDULES: tuple[LrSchedule, ...] = get_args(LrSchedule)
Decay = float | tuple[float, ...]
"""The decay of the one average, or of each of several."""


@dataclass(frozen=True)
class Average:
    """A moving average of the weights.

    Attributes:
        half_life: in thousands of images, of one by half-life.
        std: relative width, of one by a power of the time.
    """

    half_life: float | None = None
    std: float | None = None

    @property
    def name(self) -> str:
        """In files, tags and tables: "ema500k" of a half-life of 500 kimg, "ema0.05" of the relative width 0.05."""
        return f"ema{_plain(self.half_life)}k" if self.std is None else f"ema{_plain(self.std)}"

    @property
    def in_words(self) -> str:
        """As in "half-life 500 kimg", "relative width 0.05"."""
        if self.std is None:
            return f"half-life {_plain(self.half_life)} kimg"
        return f"relative width {_plain(self.std)}"

    def decay(self, step: int, batch: int, *, rampup: float, seen: int) -> float:
        """Share of the average that the 0-based step `step` leaves.

        By half-life: 0.5^(batch / min(half-life, ramp-up * images seen)); by a power: (1 - batch / t)^(γ + 1), t being
        the images seen with those of this step.

        Args:
            step: counted from 0.
            batch: images of a step.
            rampup: the half-life is at most this share of the images seen.
            seen: by how many images the ramp-up goes.
        """
        if self.std is not None:
            return (step / (step + 1)) ** (exponent(self.std) + 1)
        assert self.half_life is not None
        half_life = min(self.half_life * 1000, rampup * seen)
        return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def exponent(std: float) -> float:
    """γ of the relative width `std`: the largest root of γ³ + 7γ² + (16 - std⁻²)γ + (12 - std⁻²).

    Raises:
        ValueError: no growing power has this width.
    """
    check_std("std", std)
    q = std**-2
    # Newton from above, where the polynomial is positive and convex: it falls towards the largest root.
    gamma = math.sqrt(q)
    while True:
        value = ((gamma + 7) * gamma + 16 - q) * gamma + 12 - q
        lower = gamma - value / ((3 * gamma + 14) * gamma + 16 - q)
        if not lower < gamma:
            return gamma
        gamma = lower


def width(gamma: float) -> float:
    """Relative width of the power γ > -1, see `exponent`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def check_std(name: str, std: float) -> None:
    """Check that it is the relative width of a growing power. ValueError: one line that says what is possible."""
    number = isinstance(std, (int, float)) and not isinstance(std, bool)
    if not (number and 1e-4 <= std < WIDEST):
        raise ValueError(f"{name} must be relative widths from 0.0001 to {WIDEST:.4f} (below), got {std}")


class Profile(NamedTuple):
    """A power-function average: images of its time, and relative width."""

    images: float
    std: float


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients of the stored averages whose sum is the wanted one, by least squares over the profiles.

    With the inner product of two profiles ⟨a, b⟩ = (γa + 1)(γb + 1)(ta / tb)^e / ((γa + γb + 1) max(ta, tb)), where e
    is γb if ta < tb and else -γa: A x = b with A_ij = ⟨i, j⟩ and b_i = ⟨i, wanted⟩, x then divided by its sum.

    Args:
        stored: each another average.
        wanted: its time that of one of them, and none of theirs later.

    Returns:
        float64 (len(stored),); their sum is 1.

    Raises:
        ValueError: nothing is stored, an average twice, or another one is wanted than can be made.
    """
    import numpy as np

    if not stored:
        raise ValueError("there is no average to combine")
    if len(set(stored)) < len(stored):
        twice = next(one for one in stored if list(stored).count(one) > 1)
        raise ValueError(f"the average of {twice.images / 1000:g} kimg and std {twice.std:g} is there twice")
    for one in (*stored, wanted):
        check_std("std", one.std)
    times = [one.images for one in stored]
    if wanted.images not in times or max(times) > wanted.images or min(times) <= 0:
        raise ValueError("the wanted average must be of the time of the last of the stored ones")
    t, gamma = np.array(times, dtype=np.float64), np.array([exponent(one.std) for one in stored])
    target, power = np.float64(wanted.images), np.float64(exponent(wanted.std))
    matrix = _product(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    found = np.linalg.solve(matrix, _product(t, gamma, target, power))
    return np.asarray(found / found.sum())


def missed(stored: Sequence[Profile], wanted: Profile, coefficients: np.ndarray) -> float:
    """How far the combined profile is from the wanted one: the norm of the difference over the norm of the wanted one.

    Args:
        stored: as of `combination`.
        wanted: as of `combination`.
        coefficients: from there.
    """
    import numpy as np

    t, gamma = np.array([one.images for one in stored]), np.array([exponent(one.std) for one in stored])
    target, power = np.array([wanted.images]), np.array([exponent(wanted.std)])
    matrix = _product(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    whole = float(_product(target, power, target, power)[0])
    cross = float(coefficients @ _product(t, gamma, target, power))
    square = whole - 2 * cross + float(coefficients @ matrix @ coefficients)
    return math.sqrt(max(square, 0.0) / whole)


def _product(ta: np.ndarray, a: np.ndarray, tb: np.ndarray | np.float64, b: np.ndarray | np.float64) -> np.ndarray:
    """Inner products of the profiles of the times ta, tb and the powers a, b, in float64."""
    import numpy as np

    power = np.where(ta < tb, b, -a)
    return (a + 1) * (b + 1) * (ta / tb) ** power / ((a + b + 1) * np.maximum(ta, tb))


def _plain(value: float | None) -> str:
    """A number as people write it: 500, 0.05, 50000."""
    assert value is not None
    return format(Decimal(repr(float(value))).normalize(), "f")


def learning_rate(
    lr: float,
    update: int,
    schedule: LrSchedule = "constant",
    *,
    grown: float = 1.0,
    total: int | None = None,
    end: float = 0.0,
    hold: float = 1.0,
) -> float:
    """The learning rate of an update.

    constant: lr; linear: lr (1 - (1 - end) update / total); rsqrt: lr / sqrt(max(update / hold, 1)), EDM2's; each
    times `grown`.

    Args:
        lr: the full rate.
        update: counted from 0.
        schedule: how the rate falls.
        grown: share of the rate that a warm-up has reached.
        total: updates in all, for "linear".
        end: for "linear": share of the rate that is left after the last update.
        hold: for "rsqrt": updates before the rate falls.

    Raises:
        ValueError: "linear" without `total`.
    """
    if schedule == "linear":
        if total is None:
            raise ValueError("a linear schedule needs the number of updates")
        return lr * grown * (1 - (1 - end) * min(1.0, update / total))
    if schedule == "rsqrt":
        return lr * grown / math.sqrt(max(update / hold, 1.0))
    return lr * grown


def warmed_up(done: float, length: float) -> float:
    """Share of the rate that a linear warm-up has reached: done / length, at most 1; 1 without one (0)."""
    return min(1.0, done / length) if length else 1.0
