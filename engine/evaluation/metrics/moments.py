"""First two moments of features, accumulated over batches and ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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

    Args:
        dim: number of features.
        device: where the moments are kept.

    Raises:
        ValueError: dim < 1.
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
        """Take in `features` (B, dim) of any floating dtype, on any device.

        Raises:
            ValueError: wrong shape.
            RuntimeError: the moments were all-reduced already.
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
        # The step of the mean counts like one more deviation: a single product, added in place.
        apart = step * (self._counts[0] * count / total).sqrt()
        deviation = torch.cat([deviation, apart[None]])
        self._scatter.addmm_(deviation.T, deviation)
        self._mean += step * (count / total)
        self._counts += torch.stack([count, len(rows) - count])

    def all_reduce(self) -> None:
        """Merge the moments of all ranks, in place and on every rank. Without a process group it changes nothing.

        Raises:
            RuntimeError: a second call, which would count every sample again.
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
    def non_finite(self) -> int:
        """Number of samples left out because they were not finite, likewise."""
        return int(self._counts[1])

    def of_finite(self) -> Statistics | None:
        """Mean and covariance of the samples that were finite, however many were not; None of fewer than two."""
        if self.count < 2:
            return None
        return Statistics(self._mean, self._scatter / (self._counts[0] - 1))

    @property
    def mean(self) -> Tensor:
        """Mean (dim,), float64.

        Raises:
            ValueError: no samples, or some were non-finite.
        """
        self._readable(at_least=1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (dim, dim), float64.

        Raises:
            ValueError: fewer than two samples, or some were non-finite.
        """
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
