"""Precision and recall of generated images: how many look real, and how much of what is real they cover."""

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    """Both in [0, 1].

    Attributes:
        precision: share of generated images that lie where real ones do.
        recall: share of real images that lie where generated ones do.
    """

    precision: float
    recall: float


def precision_recall(
    real: Tensor, generated: Tensor, *, k: int = 3, limit: int | None = None, chunk: int = 1024
) -> PrecisionRecall:
    """Improved precision and recall [Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2], on the features' device.

    The region of a set is the union of the balls about its points that reach to their k-th nearest neighbour in the
    set. Time is quadratic in the number of images, memory linear: distances are formed some rows at a time, in
    float64 about the common mean.

    Args:
        real: features (N, dim), floating.
        generated: features (M, dim), floating.
        k: neighbour that sets the radius.
        limit: at most so many of each set, drawn at random with a fixed seed; None takes all.
        chunk: rows of the distance matrix that are held at a time; 1024 of 10 000 distances are 80 MB.

    Raises:
        ValueError: shapes that do not match, not more than k images in a set, non-finite features.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must have shapes (N, dim) and (M, dim), got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    chosen = [_subset(features, limit).to(generated.device, torch.float64) for features in (real, generated)]
    fewest = min(map(len, chosen))
    if not 1 <= k < fewest:
        raise ValueError(f"the {k}-th neighbour needs at least {max(k, 1) + 1} images in each set, got {fewest}")
    centre = chosen[0].mean(dim=0)
    if not (torch.isfinite(centre).all() and torch.isfinite(chosen[1]).all()):
        raise ValueError("the features have non-finite entries")
    a, b = (features - centre for features in chosen)
    # A copy of an image lies in a ball of radius 0: what rounding adds to its distance must not count.
    slack = 64 * torch.finfo(torch.float64).eps * torch.cat([a, b]).square().sum(dim=1).max()
    radii_a, radii_b = _radii(a, k, chunk) + slack, _radii(b, k, chunk) + slack
    return PrecisionRecall(_covered(b, a, radii_a, chunk), _covered(a, b, radii_b, chunk))


def _subset(features: Tensor, limit: int | None) -> Tensor:
    """A random part, for data sets are often sorted by class."""
    if limit is None or len(features) <= limit:
        return features
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(features), generator=generator)[:limit].sort().values
    return features[chosen.to(features.device)]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each point (N, dim) to its k-th neighbour among the others, (N,)."""
    radii = []
    for first in range(0, len(x), chunk):
        distances = _squared_distances(x[first : first + chunk], x)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, rows + first] = torch.inf
        radii.append(_kth_smallest(distances, k))
    return torch.cat(radii)


def _kth_smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row. Where results have to repeat, a GPU refuses the shorter way to it."""
    if torch.are_deterministic_algorithms_enabled():
        return rows.topk(k, dim=1, largest=False).values[:, -1]
    return rows.kthvalue(k, dim=1).values


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Share of `points` that lie in a ball about one of `centres` with these squared `radii`."""
    inside = torch.zeros((), dtype=torch.int64, device=points.device)
    for part in points.split(chunk):
        inside += (_squared_distances(part, centres) <= radii).any(dim=1).sum()
    return inside.item() / len(points)
