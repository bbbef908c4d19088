"""Latents between the latents of seeds, each of which is a draw of the prior.

The prior of PFGM++ at noise level sigma is x = R u [Xu et al. 2023, appendix B]: u is uniform on the unit sphere of R^N
and R, independent of u, has R^2 / r^2 ~ BetaPrime(N/2, D/2), r = sigma sqrt(D); at D = inf, where it is a Gaussian,
R^2 / sigma^2 ~ chi^2_N. The straight line between two draws has another law, but at D = 1, where x is a Cauchy
variable: at large D the norm of its middle is that of noise at sigma / sqrt(2). Here

    u_t = (sin((1 - t) a) u_0 + sin(t a) u_1) / sin(a),   cos(a) = u_0 . u_1      the great circle, at even speed
    s_t = cos(t pi/2) s_0 + sin(t pi/2) s_1,   s = Phi^-1(F(R)),   R_t = F^-1(Phi(s_t))

where F is the law of R, and Phi the normal one: s is the normal score of a radius, standard normal over the seeds. For
two independent seeds and each t

- u_t is uniform on the sphere, since turning both ends turns it;
- s_t is standard normal, as cos^2 + sin^2 = 1, so R_t has the law F;
- both are independent, as u_t depends on the directions alone and s_t on the radii.

So every x_t is distributed as the prior is, at each D, and a network sees along the path what it was made for. That is
why R_t may leave [R_0, R_1] a little: a mean of the two, in whatever scale, would have too narrow a law in the middle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_POINTS = 10_000_000


@dataclass(frozen=True)
class Between:
    """What stands for a seed where an image lies on the path from one seed to another.

    Attributes:
        first: the seed of the path's start.
        last: the seed of its end.
        share: of the angle between them, in (0, 1).
    """

    first: int
    last: int
    share: float


def path(seeds: Sequence[int], n: int) -> tuple[int | Between, ...]:
    """n points, as even as may be, of the path through seeds, each of which is one of them.

    Args:
        seeds: at least two, one after the other different; the path is closed where the last one is the first.
        n: number of points, at least that of the seeds.

    Raises:
        ValueError: fewer than two seeds, two alike one after the other, too few points, or more than MOST_POINTS.
    """
    listed = ", ".join(map(str, seeds))
    if len(seeds) < 2:
        raise ValueError(f"interpolate needs two seeds or more, got {f'only {listed}' if listed else 'none'}")
    if any(a == b for a, b in itertools.pairwise(seeds)):
        raise ValueError(f"interpolate needs seeds that differ from one to the next, got {listed}")
    if n < len(seeds):
        raise ValueError(f"n must be at least {len(seeds)}, as the seeds {listed} are among the images, got {n}")
    if n > MOST_POINTS:
        raise ValueError(f"n must be at most {MOST_POINTS:,} for a path, got {n:,}")
    legs = len(seeds) - 1
    ends = [round(leg * (n - 1) / legs) for leg in range(legs + 1)]
    points: list[int | Between] = []
    for leg, (begin, end) in enumerate(itertools.pairwise(ends)):
        first, last = seeds[leg], seeds[leg + 1]
        points.append(first)
        points += [Between(first, last, (i - begin) / (end - begin)) for i in range(begin + 1, end)]
    return (*points, seeds[-1])


def usual_count(seeds: Sequence[int], each: int = 8) -> int:
    """Points of a path with `each` from one seed to the next, both included."""
    return (each - 1) * max(len(seeds) - 1, 1) + 1


def shares(point: int | Between) -> dict[int, float]:
    """How much of the angle from one seed to the next belongs to each: all to one that is met."""
    return {point.first: 1 - point.share, point.last: point.share} if isinstance(point, Between) else {point: 1.0}


def between(first: Tensor, last: Tensor, share: float, sigma: Tensor, D: float) -> Tensor:
    """Noise between two draws of the kernel p_r(. | 0), itself distributed so; see above.

    Args:
        first: (B, C, H, W), draws at sigma.
        last: (B, C, H, W), draws independent of them.
        share: t, in (0, 1).
        sigma: (B,) noise levels.
        D: auxiliary dimensions, in (0, inf].

    Returns:
        (B, C, H, W) float64, on the draws' device, within what their dtype can hold.
    """
    # At the smallest D draws may be infinite.
    most = torch.finfo(first.dtype).max
    ends = [draws.double().flatten(1).clamp(-most, most) for draws in (first, last)]
    radii = [draws.norm(dim=1, keepdim=True) for draws in ends]
    a, b = (draws / radius for draws, radius in zip(ends, radii, strict=True))
    # Of the chord and its complement, which is accurate at every angle.
    angle = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    direction = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    size = first[0].numel()
    levels = sigma.double().cpu()
    scores = [_scores(radius[:, 0].cpu() / levels, size, D) for radius in radii]
    score = math.cos(share * math.pi / 2) * scores[0] + math.sin(share * math.pi / 2) * scores[1]
    radius = (_radii(score, size, D) * levels).to(first.device)
    return (radius[:, None] * direction).clamp(-most, most).view_as(first)


def _scores(radii: Tensor, size: int, D: float) -> Tensor:
    """Phi^-1(F(R / sigma)) of N = `size` elements, (B,) float64; by the smaller of F and 1 - F, which is accurate."""
    from scipy import special

    R2 = radii.numpy() ** 2
    if math.isinf(D):
        below, above = special.gammainc(size / 2, R2 / 2), special.gammaincc(size / 2, R2 / 2)
    else:
        # D / (D + R^2) ~ Beta(D/2, N/2)
        rest = D / (D + R2)
        below, above = special.betaincc(D / 2, size / 2, rest), special.betainc(D / 2, size / 2, rest)
    return _either(torch.from_numpy(below < above), special.ndtri(below), -special.ndtri(above))


def _radii(scores: Tensor, size: int, D: float) -> Tensor:
    """R / sigma of the scores: the inverse of `_scores`."""
    from scipy import special

    below, above = special.ndtr(scores.numpy()), special.ndtr(-scores.numpy())
    lower = torch.from_numpy(below < above)
    if math.isinf(D):
        half = _either(lower, special.gammaincinv(size / 2, below), special.gammainccinv(size / 2, above))
        return (2 * half).sqrt()
    rest = _either(lower, special.betainccinv(D / 2, size / 2, below), special.betaincinv(D / 2, size / 2, above))
    return (D * (1 - rest) / rest).sqrt()


def _either(first: Tensor, chosen: np.ndarray, other: np.ndarray) -> Tensor:
    return torch.where(first, torch.from_numpy(chosen), torch.from_numpy(other))
