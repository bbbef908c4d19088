"""Kernel distance of two sets of features (KID)."""

from typing import NamedTuple

import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000


class KernelDistance(NamedTuple):
    """`mean` of the squared distance over random subsets, and its standard deviation `std` from subset to subset."""

    mean: float
    std: float


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of `a` and `b`, averaged over random subsets.

    The kernel is k(x, y) = (x·y / dim + 1)³ [Bińkowski et al., arXiv 1801.01401, section 4]; with Inception features
    the mean is the KID. Unlike the Fréchet distance it has no bias at few samples; it may come out negative. Computed
    in float64, on the device of `a`.

    Args:
        a: features (N, dim), floating.
        b: features (M, dim), floating.
        subsets: how many are drawn.
        subset_size: samples in each, from either set without repetition; the smaller set bounds it. None takes
            `usual_subset_size`.
        seed: of the subsets, which are the same on every device.

    Raises:
        ValueError: shapes that do not match, fewer than two samples, non-finite features, subsets < 1.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"features must have shapes (N, dim) and (M, dim), got {tuple(a.shape)} and {tuple(b.shape)}")
    fewest = min(len(a), len(b))
    size = min(fewest, usual_subset_size(a, b) if subset_size is None else subset_size)
    if size < 2 or subsets < 1:
        raise ValueError(f"needs a subset or more of at least 2 samples, got {subsets} of {size}")
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [_squared(_draw(a, size, generator), _draw(b, size, generator).to(a.device)) for _ in range(subsets)]
    )
    if not torch.isfinite(values).all():
        raise ValueError("the features have non-finite entries")
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def usual_subset_size(a: Tensor, b: Tensor) -> int:
    """Samples in a subset of the sets of features `a` (N, dim) and `b` (M, dim), unless another number is asked for.

    1000, but no more than half of the smaller set, for larger subsets would hardly differ: with fewer than 2000 samples
    they are smaller. The mean does not depend on it, as the estimate is unbiased; the deviation does.
    """
    return max(2, min(SUBSET_SIZE, len(a) // 2, len(b) // 2))


def _draw(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randperm(len(features), generator=generator)[:size]
    return features[chosen.to(features.device)].to(torch.float64)


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate from `x` and `y`, both (size, dim) float64: a sample is not compared with itself."""
    pairs = len(x) * (len(x) - 1)
    within = [(k.sum() - k.diagonal().sum()) / pairs for k in (_kernel(x, x), _kernel(y, y))]
    return within[0] + within[1] - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
