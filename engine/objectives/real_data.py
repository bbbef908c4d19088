"""Real images in the student's loss [RealUID, arXiv 2509.22459], in the form of a raw output's target.

With the weights (a, b), c = c_skip x, the same law of the noise for both, y of the generator and y* of the data,

    S descends   a |S(x) - c - b/a (y - c)|^2 + (1 - a) |S(x*) - c - (1-b)/(1-a) (y* - c)|^2
    G descends   2 lambda (T - S) (e - alpha a (T - S)),   e = a (T - c) - b (y - c)

Where the generator has the law of the data S = T is the least of the first, at every D > 2, and nothing moves; at
a = b the offset c drops out, and D may be any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ipfm.engine.checks import is_number
from ipfm.models import NetworkConfig

# Taken where images are given and no weights: RealUID's, without and with classes.
UNCONDITIONAL, CONDITIONAL = (0.92, 0.94), (0.98, 0.96)
# Up to this D |x|^2 has no mean, and with it no target with an offset.
SMALLEST_D = 2.0


class Half(NamedTuple):
    """A part of the student's loss, see `ipfm.kernels.denoising_loss`."""

    share: float
    """Factor of the loss."""
    stretch: float
    """The target is c + stretch (y - c)."""


class RealWeights(NamedTuple):
    """The weights (a, b)."""

    a: float
    """Share of the generated samples."""
    b: float
    """Factor of their targets, by which those of real images follow."""

    @property
    def generated(self) -> Half:
        """The half of the generator's samples."""
        return Half(self.a, self.b / self.a)

    @property
    def real(self) -> Half:
        """The half of real images."""
        return Half(1 - self.a, (1 - self.b) / (1 - self.a))

    def __str__(self) -> str:
        return f"{self.a:g} {self.b:g}"


NO_REAL_DATA = RealWeights(1.0, 1.0)


def real_weights(value: Any) -> RealWeights | None:
    """Weights as settings and JSON have them; None for None.

    Raises:
        ValueError: they make no loss.
    """
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(numbers) == 2 and all(is_number(v) for v in numbers):
        a, b = map(float, numbers)
        if 0 < a <= 1 and 0 < b <= 1e6 and (a < 1 or b == 1):
            return RealWeights(a, b)
    shown = " ".join(map(str, numbers))
    raise ValueError(
        "real-weights must be two numbers, the share a of generated samples in (0, 1] and b > 0, with b = 1 where "
        f"a = 1, got {shown}"
    )


def weights_said(settings: Any) -> RealWeights | None:
    """The weights of a folder's settings, where real images are a part of them; None else, and for damaged ones."""
    try:
        found = real_weights(settings.get("real_weights"))
    except ValueError:
        return None
    return None if found == NO_REAL_DATA else found


def decided(weights: RealWeights | None, network: NetworkConfig, *, images: bool) -> RealWeights | None:
    """The weights for a teacher: as given, else RealUID's where there are images.

    Args:
        weights: as given.
        network: the teacher's.
        images: real images were given.

    Raises:
        ValueError: its D is too small for them.
    """
    if weights is None:
        weights = RealWeights(*(CONDITIONAL if network.label_dim else UNCONDITIONAL)) if images else None
    if weights is not None and weights.a != weights.b and network.D <= SMALLEST_D:
        raise ValueError(
            f"real-weights {weights} needs D above 2, where noisy images have a finite mean square, as the targets' "
            f"offset c_skip x must: this teacher has D {network.D:g}; give two equal weights, which have no offset"
        )
    return weights
