"""A discriminator without parameters of its own: the student's encoder [SiDA, Zhou et al. 2024, arXiv 2410.14919].

Its logits l(x), a map of them for each image, are the mean over the channels of what the encoder's last block gives.
With y of the generator and y* of the data, noisy by the same draw of the kernel, BCE the mean over the map,

    S descends too   omega w_mean 1/2 (BCE(l(x), 0) + BCE(l(x*), 1))
    G descends too   gamma N lambda BCE(clamp(l(x), -10, 10), 1)

w_mean is the mean over the global batch of the weights in the student's loss, and lambda each sample's own in the
generator's, so that neither depends on how a batch is divided. SiDA takes both means over what one GPU has at a time:
of the generator's that differs by a covariance of lambda and BCE.

Where S tells the two apart as well as can be, the generator's is a divergence of the noisy laws at every D: in the
minimax that of Jensen and Shannon, which is 0 for p_G = p* alone, from one noise level on, as the characteristic
function of the kernel has no zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.engine.checks import is_number
from ipfm.engine.objectives.losses import Raw, RawWithLogits, RawWithLogvar, vjp
from ipfm.models import NetworkConfig

DiscriminatorKind = Literal["encoder"]

# Beyond it the generator's term has no gradient: it asks for logits at levels where the student is seldom trained.
CLAMP = 10.0
# omega and gamma of SiDA: lsd, and 2 lsg_gan / lsg of lsg = 100, lsg_gan = 0.01, as L here is twice that of SiD.
WEIGHTS, EDM2_WEIGHTS = (1.0, 2e-4), (100.0, 2e-4)
# Thousands of images before the generator is trained, and before it is told what the discriminator says.
STARTS = (100.0, 200.0)
# The largest shares of a run that they are by default.
SHARES = (0.05, 0.1)


class Judged(NamedTuple):
    """What logits (B, H, W) are judged to be."""

    loss: Tensor
    """(B,) binary cross entropy: the mean over the map."""
    slope: Tensor
    """(B, H, W): of the loss by the logits."""


@torch.no_grad()
def told_apart(logits: Tensor, *, real: bool) -> Judged:
    """BCE(l, 1) = softplus(-l) where the images are real, else BCE(l, 0) = softplus(l).

    Args:
        logits: (B, H, W).
        real: what the discriminator should say.
    """
    sign = -1.0 if real else 1.0
    return _judged(sign * logits, sign)


@torch.no_grad()
def deceived(logits: Tensor) -> Judged:
    """BCE(clamp(l, -10, 10), 1), what a generator makes small; beyond the ends the slope is 0.

    Args:
        logits: (B, H, W).
    """
    found = _judged(-logits.clamp(-CLAMP, CLAMP), -1.0)
    return found._replace(slope=found.slope.masked_fill(logits.abs() > CLAMP, 0.0))


def _judged(signed: Tensor, sign: float) -> Judged:
    loss = F.softplus(signed).flatten(1).mean(1)
    return Judged(loss, sign * torch.sigmoid(signed) / signed[0].numel())


class Tapped:
    """A student that gives its logits too, as a network without them; its last ones are `logits`.

    Args:
        net: (scaled, sigma) -> (F, …, logits), see `Precond.forward`.
    """

    def __init__(self, net: RawWithLogits | Raw | RawWithLogvar) -> None:
        self._net = net
        self.logits: Tensor | None = None

    def __call__(self, scaled: Tensor, sigma: Tensor) -> Any:
        """F, or (F, log-variance)."""
        *out, self.logits = self._net(scaled, sigma)
        return out[0] if len(out) == 1 else tuple(out)

    def taken(self) -> Tensor:
        """The logits, which are forgotten here."""
        logits, self.logits = self.logits, None
        assert logits is not None
        return logits


class Seen(NamedTuple):
    """Noisy images and their logits, with the graph between the two."""

    scaled: Tensor
    """(B, C, H, W)."""
    logits: Tensor
    """(B, H, W)."""


class Adversary:
    """The generator's side: the frozen student, and what its logits ask of the samples.

    Args:
        student: (scaled, sigma) -> (F, logits).
        encoder: (scaled, sigma) -> the logits, from the encoder alone.
        factor: gamma, times the number N of an image's elements.
    """

    def __init__(self, student: RawWithLogits, encoder: Callable[[Tensor, Tensor], Tensor], factor: float) -> None:
        self.student = Tapped(student)
        """For a step that passes back through the student: its logits come along."""
        self.encoder = encoder
        self._factor = factor
        self.loss: Tensor | None = None
        """(B,) BCE of the last samples."""

    def beside(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of `student`'s last call, and the cotangent that they have beside F's; `weight` (B,) is lambda."""
        return self.cotangent(self.student.taken(), weight)

    def cotangent(self, logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` (B, H, W), and gamma N lambda times the slope of `deceived`; `weight` (B,) is lambda."""
        self.loss, slope = deceived(logits)
        return logits, slope * (self._factor * weight).to(slope.dtype).view(-1, 1, 1)

    def seen(self, scaled: Tensor, sigma: Tensor) -> Seen:
        """The logits of the encoder alone, for a step that passes back through nothing else."""
        with torch.enable_grad():
            leaf = scaled.detach().requires_grad_()
            return Seen(leaf, self.encoder(leaf, sigma))

    def gradient(self, seen: Seen, weight: Tensor, *, rescale: bool) -> Tensor:
        """The term's gradient by what was seen, (B, C, H, W); `weight` (B,) is lambda, `rescale` as of `vjp`."""
        logits, cotangent = self.cotangent(seen.logits, weight)
        return vjp((logits,), seen.scaled, (cotangent,), rescale)


class DiscriminatorWeights(NamedTuple):
    """The factors (omega, gamma)."""

    student: float
    generator: float

    def __str__(self) -> str:
        return f"{self.student:g} {self.generator:g}"


def discriminator_weights(value: Any) -> DiscriminatorWeights | None:
    """Weights as settings and JSON have them; None for None.

    Raises:
        ValueError: they are no weights.
    """
    found = _pair(value, lambda omega, gamma: 0 < omega <= 1e6 and 0 <= gamma <= 1e6)
    if found is None and value is not None:
        raise ValueError(
            "discriminator-weights must be two numbers, of the student's loss in (0, 1e6] and of the generator's in "
            f"[0, 1e6], got {_shown(value)}"
        )
    return None if found is None else DiscriminatorWeights(*found)


def discriminator_starts(value: Any) -> tuple[float, float] | None:
    """Thousands of images as settings and JSON have them; None for None.

    Raises:
        ValueError: they are no beginnings.
    """
    found = _pair(value, lambda generator, term: 0 <= generator <= term < math.inf)
    if found is None and value is not None:
        raise ValueError(
            "discriminator-kimg must be two numbers >= 0, after which the generator is trained and, not before, "
            f"meets the discriminator, got {_shown(value)}"
        )
    return found


def check(kind: Any, weights: Any, starts: Any) -> None:
    """Check the settings of a discriminator, but for the weights and starts themselves.

    Raises:
        ValueError: another kind, or settings of one without one.
    """
    if kind not in (None, "encoder"):
        raise ValueError(f"discriminator must be encoder, got {kind!r}")
    for name, value in (("weights", weights), ("kimg", starts)):
        if kind is None and value is not None:
            raise ValueError(f"discriminator-{name} {_shown(value)} was given without discriminator encoder")


def decided(kind: DiscriminatorKind | None, weights: Any, network: NetworkConfig) -> Mapping[str, Any]:
    """The weights of a discriminator with nothing left open, by their setting's name; nothing without one.

    Args:
        kind: what tells apart.
        weights: as given.
        network: the teacher's.
    """
    if kind is None:
        return {}
    given = discriminator_weights(weights) or DiscriminatorWeights(*(EDM2_WEIGHTS if network.is_edm2 else WEIGHTS))
    return {"discriminator_weights": tuple(given)}


def starts_by_default(kimg: float | None) -> tuple[float, float]:
    """The beginnings of a run of so many thousands of images; None where it has no length.

    A run folder records them beside its settings: a run that is lengthened keeps them.
    """
    first, then = STARTS if kimg is None else [min(s, share * kimg) for s, share in zip(STARTS, SHARES, strict=True)]
    return first, then


def words_of(settings: Mapping[str, Any]) -> str:
    """What the settings of a folder say of a discriminator, after the words of the objective; mostly nothing."""
    return ", with a discriminator from the student's encoder" if settings.get("discriminator") == "encoder" else ""


def _pair(value: Any, possible: Callable[[float, float], bool]) -> tuple[float, float] | None:
    numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(numbers) != 2 or not all(is_number(v) for v in numbers) or not possible(*map(float, numbers)):
        return None
    return float(numbers[0]), float(numbers[1])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
