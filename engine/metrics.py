"""Fréchet distance between sets of images, in a feature space that the caller chooses.

With the features of the Inception network this distance is the FID; with :class:`PixelFeatures` it needs no network.
All statistics are float64, and depend neither on how the images were split into batches nor on the number of ranks,
beyond rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ipfm.engine.data import ImageDataset

# Most negative eigenvalue, relative to the largest, that still counts as rounding: covariances stored in float32 at
# 2048 dimensions come with about -3e-6.
NEGATIVE_EIGENVALUE = 1e-4


class Statistics(NamedTuple):
    """First two moments of a set of features: `mean` (dim,) and `covariance` (dim, dim), float64."""

    mean: Tensor
    covariance: Tensor


class FeatureMoments:
    """Running mean and covariance of features, float64.

    Batches are merged with the pairwise update of Chan, Golub & LeVeque (1983), so nothing cancels when the mean is
    large against the spread. Rows with a NaN or an infinity are left out and counted; reading a statistic afterwards
    is an error. That way `add` needs no host-device synchronisation, and in a distributed run every rank fails
    together, after `all_reduce`, rather than one of them while the others wait for it.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"features need at least one dimension, got dim={dim}")
        self.dim = dim
        self.device = torch.device(device)
        # [finite rows, non-finite rows]
        self._counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        # Sum of outer products of the deviations from the running mean.
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        self._reduced = False

    def add(self, features: Tensor) -> None:
        """Takes in `features` (B, dim) of any floating dtype, on any device.

        ValueError: wrong shape. RuntimeError: the moments were all-reduced already.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (B, {self.dim}), got {tuple(features.shape)}")
        self._open()
        rows = features.detach().to(self.device, torch.float64)
        finite = torch.isfinite(rows).all(dim=1)
        rows = torch.where(finite[:, None], rows, 0.0)
        weight = finite.to(torch.float64)
        count = weight.sum()
        mean = rows.sum(dim=0) / count.clamp(min=1)
        deviation = (rows - mean) * weight[:, None]

        total = (self._counts[0] + count).clamp(min=1)
        step = mean - self._mean
        self._scatter += deviation.T @ deviation + torch.outer(step, step) * (self._counts[0] * count / total)
        self._mean += step * (count / total)
        self._counts += torch.stack([count, len(rows) - count])

    def all_reduce(self) -> None:
        """Merges the moments of all ranks, in place and on every rank. Without a process group it changes nothing.

        Once, after the last `add`: a second call would count every sample again and is a RuntimeError.
        """
        self._open()
        self._reduced = True
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        count = self._counts[0].clone()
        mean = self._mean * count
        dist.all_reduce(self._counts)
        dist.all_reduce(mean)
        mean /= self._counts[0].clamp(min=1)
        step = self._mean - mean
        self._scatter += torch.outer(step, step) * count
        dist.all_reduce(self._scatter)
        self._mean = mean

    @property
    def count(self) -> int:
        """Number of samples taken in (of all ranks after `all_reduce`), without the non-finite ones."""
        return int(self._counts[0])

    @property
    def mean(self) -> Tensor:
        """Mean (dim,), float64. ValueError: no samples, or some were non-finite."""
        self._readable(at_least=1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (dim, dim), float64. ValueError: fewer than two samples, or some were non-finite."""
        self._readable(at_least=2)
        return self._scatter / (self._counts[0] - 1)

    @property
    def statistics(self) -> Statistics:
        """Mean and covariance together; errors as those."""
        return Statistics(self.mean, self.covariance)

    def _open(self) -> None:
        if self._reduced:
            raise RuntimeError("these moments were all-reduced already; start a new FeatureMoments")

    def _readable(self, at_least: int) -> None:
        finite, bad = (int(value) for value in self._counts.tolist())
        if bad:
            raise ValueError(f"{bad} of {finite + bad} samples have non-finite features")
        if finite < at_least:
            raise ValueError(f"needs at least {at_least} samples, got {finite}")


def frechet_distance(
    a: FeatureMoments | Statistics | tuple[Tensor, Tensor], b: FeatureMoments | Statistics | tuple[Tensor, Tensor]
) -> float:
    """Squared Fréchet distance of two Gaussians, |mu_a - mu_b|² + tr(Sa + Sb - 2 (Sa^½ Sb Sa^½)^½), in float64.

    `a`, `b`: moments, or pairs of mean (dim,) and covariance (dim, dim). The trace of the root is the sum of the root
    eigenvalues of Sa^½ Sb Sa^½ = (Sb^½ Sa^½)ᵀ (Sb^½ Sa^½), taken as the singular values of Sb^½ Sa^½: squaring first
    loses half of the digits where a covariance is singular (300 samples of 1024 features were 9e-5 away from
    themselves, and are 4e-12 this way). Formula: Dowson & Landau (1982); as a metric of images: Heusel et al.,
    arXiv 1706.08500.

    Rounding cannot make the result negative. ValueError: shapes that do not match, non-finite entries, a covariance
    that is not symmetric and positive semidefinite.
    """
    mean_a, root_a, trace_a = _mean_and_root(a, "first")
    mean_b, root_b, trace_b = _mean_and_root(b, "second")
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"statistics of {len(mean_a)} and of {len(mean_b)} features cannot be compared")
    mean_b, root_b, trace_b = (value.to(mean_a.device) for value in (mean_b, root_b, trace_b))
    overlap = torch.linalg.svdvals(root_b @ root_a).sum()
    distance = (mean_a - mean_b).square().sum() + trace_a + trace_b - 2 * overlap
    return max(distance.item(), 0.0)


def _mean_and_root(moments: FeatureMoments | tuple[Tensor, Tensor], which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (dim,), symmetric root of the covariance (dim, dim) and its trace () of validated statistics."""
    if isinstance(moments, FeatureMoments):
        moments = moments.statistics
    mean, covariance = (value.detach().to(torch.float64) for value in moments)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"the {which} statistics must be a mean (dim,) and a covariance (dim, dim), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"the {which} statistics have non-finite entries")
    largest = covariance.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if (covariance - covariance.T).abs().max() > NEGATIVE_EIGENVALUE * largest:
        raise ValueError(f"the {which} covariance is not symmetric")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -NEGATIVE_EIGENVALUE * values[-1].clamp(min=0):
        raise ValueError(
            f"the {which} covariance is not positive semidefinite: "
            f"eigenvalues from {values[0].item():.3g} to {values[-1].item():.3g}"
        )
    # Below the numerical rank there is only rounding, of which the root would make something visible.
    rank = len(values) * torch.finfo(torch.float64).eps * values[-1]
    values = torch.where(values > rank, values, 0.0)
    return mean, (vectors * values.sqrt()) @ vectors.T, values.sum()


class Features(Protocol):
    """Maps images (B, C, H, W) in [-1, 1] to features (B, dim) of a floating dtype."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class PixelFeatures:
    """The pixels themselves as features: for small images, and where no feature network is at hand.

    `shape`: (C, H, W) of the images.
    """

    name = "pixels"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
        self.shape = tuple(shape)
        self.dim = shape[0] * shape[1] * shape[2]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C·H·W), same dtype. ValueError: images of another shape."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}"
            )
        return images.flatten(start_dim=1)


@torch.no_grad()
def dataset_statistics(
    dataset: ImageDataset, features: Features, batch: int = 512, device: torch.device | str | None = None
) -> Statistics:
    """Statistics of the features of every image of `dataset`, each taken once, as stored (no flips).

    `batch`: images at a time. `device`: where the features are computed; the dataset's own when None.
    """
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    moments = FeatureMoments(features.dim, device or dataset.images.device)
    for first in range(0, len(dataset), batch):
        moments.add(features(dataset.take(first, min(batch, len(dataset) - first)).to(moments.device)))
    return moments.statistics


@dataclass(frozen=True)
class FrechetResult:
    """`distance`; number of `images` drawn by all ranks; `seconds` that the slowest rank spent drawing them, without
    features and matrix roots; `images_per_second` of all ranks together."""

    distance: float
    images: int
    seconds: float
    images_per_second: float


def index_ranges(n: int, batch: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """The (first index, count) that `rank` draws of the images 0…n-1: disjoint over ranks, complete, count ≤ batch.

    Every rank gets the same number of ranges, for a sharded network stops all ranks when one of them makes a call
    fewer. Ranges may be empty where there are more of them than images (as 3 images, batch 1, 2 ranks).
    """
    rounds = -(-n // (batch * world_size))
    pieces = rounds * world_size
    edges = [piece * n // pieces for piece in range(pieces + 1)]
    return [(edges[i], edges[i + 1] - edges[i]) for i in range(rank, pieces, world_size)]


@torch.no_grad()
def evaluate_frechet(
    sample: Callable[[int, int], Tensor],
    n: int,
    features: Features,
    reference: FeatureMoments | Statistics,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> FrechetResult:
    """Fréchet distance of `n` sampled images to `reference`, the same on every rank and for every number of ranks.

    `sample(first, count)` returns the images with the global indices first … first+count-1, (count, C, H, W) in
    [-1, 1]; count is at most `batch`. Every rank calls it equally often (see `index_ranges`); a rank without images
    draws image 0 and throws it away. With `world_size` 1 this process evaluates alone, whatever process group exists.

    ValueError: n < 2, a reference of another dimension, images of the wrong shape, non-finite features (how many),
    a rank and world size that are not those of the process group.
    """
    if n < 2 or batch < 1:
        raise ValueError(f"needs at least 2 images and a positive batch, got n={n}, batch={batch}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0…{world_size - 1}, got {rank}")
    if world_size > 1:
        group = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
        if group != (rank, world_size):
            raise ValueError(
                f"rank {rank} of {world_size} is not what the process group says: {group[0]} of {group[1]}"
            )
    reference = reference.statistics if isinstance(reference, FeatureMoments) else Statistics(*reference)
    if reference.mean.shape != (features.dim,):
        raise ValueError(
            f"the reference has {reference.mean.numel()} features, {features.name!r} gives {features.dim}: "
            "it was made with another extractor"
        )

    moments: FeatureMoments | None = None
    seconds = 0.0
    for first, count in index_ranges(n, batch, rank, world_size):
        started = time.perf_counter()
        images = sample(first, count) if count else sample(0, 1)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds += time.perf_counter() - started
        if images.ndim != 4 or len(images) != max(count, 1):
            raise ValueError(
                f"sample({first}, {count}) must return images ({count}, C, H, W), got {tuple(images.shape)}"
            )
        if moments is None:
            moments = FeatureMoments(features.dim, images.device)
        if count:
            moments.add(features(images))
    assert moments is not None  # n ≥ 2 gives every rank at least one range

    if world_size > 1:
        moments.all_reduce()
        slowest = torch.tensor(seconds, dtype=torch.float64, device=moments.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = slowest.item()
    distance = frechet_distance(moments, reference)
    return FrechetResult(distance, moments.count, seconds, moments.count / max(seconds, 1e-9))
