"""Laws of the noise levels by name: what `--levels-generator` and `--levels-student` choose among.

A law is of sigma, the same at every D, r = sigma sqrt(D); its levels are a function of (seed, stream, step, sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipfm.engine.noise_levels import NoiseLevels
from ipfm.kernels import philox

# (sample_index (B,), **position of the random numbers) -> sigma (B,) float32.
Draw = Callable[..., Tensor]

# What the law is called on a command line, and where numbers may stay away what they are then.
GENERATOR_LAWS = "grid:LOW:HIGH, rising:HIGH, lognormal:MEAN:STD, loguniform[:LOW:HIGH] or log-t:MEAN:SCALE:NU"
STUDENT_LAWS = f"generator, half, {GENERATOR_LAWS}"
_COUNTS = {"grid": (2,), "rising": (1,), "lognormal": (2,), "loguniform": (0, 2), "log-t": (3,)}
# Of levels whose density is tabulated, and the narrowest peak that it shows, in ln sigma.
_TABLE, _NARROWEST = 2**14, 0.002


class LevelLaw(NamedTuple):
    """A law of sigma.

    With t on the sampler's grid, 0 at sigma_min and 1 at sigma_max [Karras et al. 2022, eq. 5]:
    grid: t even on [LOW, HIGH]; 0 0.8 is SiD's law, 0.02 0.98 DMD2's. rising: t's density rises from 0 to HIGH.
    lognormal: ln sigma is normal. loguniform: ln sigma is even, on the sampler's range by default. log-t: ln sigma is
    MEAN + SCALE times Student's t of NU degrees of freedom, on the sampler's range.
    """

    name: str
    numbers: tuple[float, ...]

    def draw(self, noise: NoiseLevels, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) float32; arguments as of `NoiseLevels.generator`."""
        position = {"seed": seed, "stream": stream, "step": step}
        if self.name == "lognormal":
            mean, std = self.numbers
            normal = philox.normal(sample_index, 1, **position)[:, 0].double()  # type: ignore[arg-type]
            return (normal * std + mean).exp().float()
        u = philox.uniform(sample_index, 1, **position)[:, 0].double()  # type: ignore[arg-type]
        if self.name == "loguniform":
            low, high = (math.log(v) for v in self.numbers or (noise.sigma_min, noise.sigma_max))
            return (low + (high - low) * u).exp().float()
        if self.name == "log-t":
            return self._log_t(noise, u).float()
        if self.name == "rising":
            return noise.at(u.sqrt() * self.numbers[0]).float()
        low, high = self.numbers
        return noise.at(low + (high - low) * u).float()

    def _log_t(self, noise: NoiseLevels, u: Tensor) -> Tensor:
        """By the inverse of its distribution, from a table on the device: nothing is copied there."""
        mean, scale, nu = self.numbers
        ends = math.log(noise.sigma_min), math.log(noise.sigma_max)
        s = torch.linspace(*ends, _TABLE, dtype=torch.float64, device=u.device)
        # By its logarithm, which is a number also where the peak is far outside of the range.
        height = -(nu + 1) / 2 * torch.log1p(((s - mean) / scale).square() / nu)
        density = (height - height.max()).exp()
        sums = torch.cat([density.new_zeros(1), torch.cumsum((density[1:] + density[:-1]) / 2, 0)])
        wanted = u * sums[-1]
        above = torch.searchsorted(sums, wanted).clamp(1, _TABLE - 1)
        below = above - 1
        share = (wanted - sums[below]) / (sums[above] - sums[below]).clamp(min=1e-300)
        return (s[below] + share.clamp(0, 1) * (s[above] - s[below])).exp()

    def __str__(self) -> str:
        shown = (f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in self.numbers)
        return ":".join([self.name, *shown])


def level_law(option: str, value: object) -> LevelLaw | None:
    """The law that a setting names; None for None, and for "generator" and "half" of the student.

    Args:
        option: levels-generator or levels-student.
        value: such as "lognormal:-0.4:1".

    Raises:
        ValueError: there is no such law; one line that says which there are.
    """
    ours = option.endswith("student")
    if value is None or (ours and value in ("generator", "half")):
        return None
    name, *rest = value.split(":") if isinstance(value, str) else ("",)
    try:
        numbers = tuple(float(v) for v in rest)
    except ValueError:
        numbers = (math.nan,)
    if len(numbers) not in _COUNTS.get(name, ()) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{option} must be {STUDENT_LAWS if ours else GENERATOR_LAWS}, got {value!r}")
    if wrong := _wrong(name, numbers):
        raise ValueError(f"{option} {name}: {wrong}, got {value!r}")
    return LevelLaw(name, numbers)


def _wrong(name: str, numbers: tuple[float, ...]) -> str:
    """What the numbers of a law must be, where they are not."""
    if name == "grid" and not 0 <= numbers[0] < numbers[1] <= 1:
        return "LOW and HIGH must rise within [0, 1]"
    if name == "rising" and not 0 < numbers[0] <= 1:
        return "HIGH must lie in (0, 1]"
    if name == "lognormal" and not 0 < numbers[1] <= 10:
        return "STD must lie in (0, 10]"
    if name == "lognormal" and abs(numbers[0]) > 10:
        return "MEAN must lie in [-10, 10]"
    if name == "loguniform" and numbers and not 0 < numbers[0] < numbers[1]:
        return "LOW and HIGH must be levels that rise"
    if name == "log-t":
        _, scale, nu = numbers
        if not (0 < scale <= 100 and 0 < nu <= 1e6 and scale * min(nu, 1) ** 0.5 >= _NARROWEST):
            return f"SCALE and NU must be above 0, and SCALE sqrt(NU) at least {_NARROWEST:g}"
    return ""


def student_draw(value: str, usual: Draw, generator: Draw) -> Draw:
    """The levels of "generator", which are drawn by its law, or "half", of which half are and the others by `usual`.

    Args:
        value: the one or the other.
        usual: EDM's law.
        generator: the law of the generator's step.
    """

    def half(sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        # The fourth number of the block, which no law takes.
        coin = philox.uniform(sample_index, 4, seed=seed, stream=stream, step=step)[:, 3]
        position = {"seed": seed, "stream": stream, "step": step}
        return torch.where(coin < 0.5, generator(sample_index, **position), usual(sample_index, **position))

    return generator if value == "generator" else half
