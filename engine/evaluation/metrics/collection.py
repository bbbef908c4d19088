"""One pass over images that are shared out over the ranks: moments of their features, and the features themselves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ipfm.engine.distributed.agreement import together
from ipfm.engine.evaluation.metrics.features import Classifier, Features
from ipfm.engine.evaluation.metrics.moments import FeatureMoments

# Above this number is a slip of the keyboard.
MOST_IMAGES = 10**9


@dataclass(frozen=True, eq=False)
class Collected:
    """What one pass found, the same on every rank.

    Attributes:
        moments: of the features of all images.
        features: (n, dim) float32 in the order of the images; None where they were not asked for.
        probabilities: (n, classes) float32, likewise.
        seconds: that the slowest rank spent drawing images.
    """

    moments: FeatureMoments
    features: Tensor | None
    probabilities: Tensor | None
    seconds: float


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
def collect(
    sample: Callable[[int, int], Tensor],
    n: int,
    features: Features,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    keep_features: bool = False,
    keep_probabilities: bool = False,
) -> Collected:
    """Draw `n` images and take in their features.

    Args:
        sample: sample(first, count) returns the images with the indices first … first+count-1, (count, C, H, W) in
            [-1, 1]; count is at most `batch`. Every rank calls it equally often (see `index_ranges`); a rank without
            images draws image 0 and throws it away.
        n: number of images.
        features: what is taken in of them.
        batch: images that a rank draws at a time.
        rank: of this process.
        world_size: number of ranks; with 1 this process works alone, whatever process group exists.
        keep_features: keep the features themselves, 4·n·dim bytes of each rank on the device of the images.
        keep_probabilities: keep class probabilities, 4·n·classes bytes likewise.

    Raises:
        ValueError: on every rank when it happens on one: n < 2, images or features of the wrong shape, an image that
            cannot be read, probabilities asked of features that have none, a rank and world size that are not those of
            the process group.
        Exception: whatever else `sample` or `features` raise; where it happens on one rank, the others raise a
            `Failed`, a RuntimeError, that says the same.
    """
    if n < 2 or batch < 1:
        raise ValueError(f"needs at least 2 images and a positive batch, got n={n}, batch={batch}")
    _check_group(rank, world_size)
    classify: Classifier | None = None
    if keep_probabilities:
        if not (isinstance(features, Classifier) and features.classes):
            raise ValueError(f"{features.name!r} gives no class probabilities")
        classify = features
    own = _Share(features, keep_features=keep_features, classify=classify)
    own.take_all(sample, index_ranges(n, batch, rank, world_size), world_size)
    moments, seconds = own.moments, own.seconds
    assert moments is not None  # n ≥ 2 gives every rank at least one range

    if world_size > 1:
        moments.all_reduce()
        slowest = torch.tensor(seconds, dtype=torch.float64, device=moments.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = slowest.item()

    def together(parts: list[Tensor], width: int) -> Tensor:
        rows = torch.cat([torch.zeros(0, width, device=moments.device), *parts])
        return rows if world_size == 1 else _gather(rows, n, batch, world_size)

    return Collected(
        moments,
        together(own.rows, features.dim) if keep_features else None,
        None if classify is None else together(own.probabilities, classify.classes),
        seconds,
    )


class _Share:
    """What one rank has taken in so far."""

    def __init__(self, features: Features, *, keep_features: bool, classify: Classifier | None) -> None:
        self.features, self.keep_features, self.classify = features, keep_features, classify
        self.moments: FeatureMoments | None = None
        self.rows: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.seconds = 0.0

    def take_all(
        self, sample: Callable[[int, int], Tensor], ranges: Sequence[tuple[int, int]], world_size: int
    ) -> None:
        """Take in each of the ranges, as many on every rank. What fails on one ends it on all, after the same range."""
        for first, count in ranges:
            together(partial(self.take, sample, first, count), world_size)

    def take(self, sample: Callable[[int, int], Tensor], first: int, count: int) -> None:
        """Draw a range of images and take them in; of an empty one an image that is thrown away."""
        started = time.perf_counter()
        images = sample(first, count) if count else sample(0, 1)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self.seconds += time.perf_counter() - started
        if images.ndim != 4 or len(images) != max(count, 1):
            raise ValueError(
                f"sample({first}, {count}) must return images ({count}, C, H, W), got {tuple(images.shape)}"
            )
        if self.moments is None:
            self.moments = FeatureMoments(self.features.dim, images.device)
        if not count:
            return
        found = self.features(images)
        self.moments.add(found)
        if self.keep_features:
            self.rows.append(found.to(images.device, torch.float32))
        if self.classify is not None:
            self.probabilities.append(self.classify.probabilities(images).to(images.device, torch.float32))


def _check_group(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0…{world_size - 1}, got {rank}")
    if world_size > 1:
        group = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
        if group != (rank, world_size):
            raise ValueError(
                f"rank {rank} of {world_size} is not what the process group says: {group[0]} of {group[1]}"
            )


def _gather(own: Tensor, n: int, batch: int, world_size: int) -> Tensor:
    """The rows of all ranks (n, width) in the order of their images, from each rank's rows in its order."""
    shares = [
        torch.cat([torch.arange(first, first + count) for first, count in index_ranges(n, batch, rank, world_size)])
        for rank in range(world_size)
    ]
    padded = own.new_zeros(max(map(len, shares)), own.shape[1])
    padded[: len(own)] = own
    parts = [torch.zeros_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    whole = own.new_zeros(n, own.shape[1])
    for share, part in zip(shares, parts, strict=True):
        whole[share.to(whole.device)] = part[: len(share)]
    return whole
