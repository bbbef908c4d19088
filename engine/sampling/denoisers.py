"""What the samplers need of a network, and one network that is guided by another."""

from __future__ import annotations

import math
import numbers
from typing import Protocol, runtime_checkable

from torch import Tensor


class Denoiser(Protocol):
    """What the samplers need of a network: `net(x, sigma, class_labels)` and the shape of its images."""

    img_channels: int
    img_resolution: int

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class RoundsSigma(Protocol):
    """A network that knows which noise levels it supports."""

    def round_sigma(self, sigma: Tensor) -> Tensor: ...


class GuidedDenoiser:
    """guide(x, sigma) + guidance (net(x, sigma) - guide(x, sigma)) [Ho & Salimans 2022; Karras et al. 2024, eq. 3].

    At guidance = 1, `net` alone, the guide is not evaluated. `ipfm.models.guidance.guided` is the same as a network.

    Args:
        net: the denoiser that is guided.
        guide: the weaker one. It is told the same class labels, or none if it is unconditional.
        guidance: how far from the guide, finite and >= 0.

    Raises:
        ValueError: a number out of its range, or a guide of other images, classes or D.
    """

    def __init__(self, net: Denoiser, guide: Denoiser, guidance: float) -> None:
        check_guidance(guidance)
        check_guide(net, guide)
        self.net, self.guide, self.guidance = net, guide, float(guidance)
        self.img_channels, self.img_resolution = net.img_channels, net.img_resolution

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        strong = self.net(x, sigma, class_labels)
        if self.guidance == 1:
            return strong
        weak = self.guide(x, sigma, class_labels if getattr(self.guide, "label_dim", True) else None)
        return weak + self.guidance * (strong - weak)


def check_guidance(guidance: object) -> None:
    """Check a factor of guidance.

    Raises:
        ValueError: it is no finite number >= 0.
    """
    number = float(guidance) if isinstance(guidance, numbers.Real) and not isinstance(guidance, bool) else -1.0
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"guidance must be a finite number >= 0 (1 is without), got {guidance!r}")


def check_guide(net: object, guide: object) -> None:
    """Check that a network can guide another, as far as they say what they are.

    Raises:
        ValueError: it makes other images, has another D, or knows other classes than the network's or none.
    """
    for name, what in (("img_channels", "channels"), ("img_resolution", "pixels a side")):
        ours, theirs = getattr(net, name, None), getattr(guide, name, None)
        if ours != theirs:
            raise ValueError(f"the guide must make images like the network's, with {ours} {what}, got {theirs}")
    ours, theirs = getattr(net, "D", None), getattr(guide, "D", None)
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(f"the guide must have the network's D, {ours:g}, got {theirs:g}")
    ours, theirs = getattr(net, "label_dim", None), getattr(guide, "label_dim", None)
    if None not in (ours, theirs) and theirs not in (0, ours):
        raise ValueError(f"the guide must know the network's {ours} classes or none, got {theirs}")
