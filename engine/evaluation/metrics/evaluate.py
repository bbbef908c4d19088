"""Metrics of sampled images against a reference, all from one pass over the samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.evaluation.metrics.collection import collect
from ipfm.engine.evaluation.metrics.features import WHERE_TO_GET_INCEPTION, Classifier, Features
from ipfm.engine.evaluation.metrics.frechet import frechet_distance
from ipfm.engine.evaluation.metrics.inception_score import inception_score
from ipfm.engine.evaluation.metrics.kernel_distance import kernel_distance, usual_subset_size
from ipfm.engine.evaluation.metrics.measures import (
    DISTANCE,
    FD_DINOV2,
    FID,
    METRICS,
    Measure,
    Measured,
    Metric,
    measures_of,
)
from ipfm.engine.evaluation.metrics.moments import FeatureMoments, Statistics
from ipfm.engine.evaluation.metrics.precision_recall import precision_recall

# Images of each set that precision and recall are measured on.
PR_IMAGES = 10_000


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with.

    Attributes:
        statistics: of the features of real images.
        features: these themselves, (N, dim), which the kernel distance and precision and recall need; None where only
            the statistics are known.
    """

    statistics: Statistics
    features: Tensor | None = None


@dataclass(frozen=True)
class FrechetResult(Measured):
    """What an evaluation found; `Measured` has what it may be beside the distance.

    Attributes:
        distance: Fréchet distance, NaN where it was not asked for.
        images: how many it is of, drawn by all ranks.
        seconds: that the slowest rank spent drawing them, without features and matrix roots.
        images_per_second: of all ranks together.
        name: what the distance is called, "FID" with Inception features alone, "FD-DINOv2" with those of DINOv2.
        left_out: how many more were drawn, and left out because they, or their features, were not finite.
    """

    distance: float
    images: int
    seconds: float
    images_per_second: float
    name: str = DISTANCE
    left_out: int = 0

    @property
    def frechet(self) -> float:
        """The distance, by its name in files."""
        return self.distance

    def in_words(self) -> str:
        """What was measured, with its names; how many images are not in it, if any."""
        text = ", ".join(map(self._named, measures_of(self.metrics)))
        if not self.left_out:
            return text
        drawn = self.images + self.left_out
        return f"{text} over {self.images:,} of {drawn:,} images: {self.left_out:,} were not finite"

    def _named(self, measure: Measure) -> str:
        value = f"{self.distance:.4f}" if measure.key == "frechet" else self.shown(measure)
        return f"{measure.called(self.name)} {value}"


def distance_name(features: Features) -> str:
    """What the Fréchet distance of these features is called."""
    return {"inception": FID, "dinov2": FD_DINOV2}.get(features.name, DISTANCE)


def check_known(metrics: Sequence[str]) -> None:
    """ValueError unless these are names of metrics, one or more."""
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}")


# Features that the published network gives, and what to do about a reference that has as many.
INCEPTION_DIM, INCEPTIONS = 2048, ", by their number the Inception network: give --inception FILE"


def check_metrics(metrics: Sequence[Metric], features: Features, reference: Reference | None) -> None:
    """Check that these metrics can be measured on these features against this reference.

    Raises:
        ValueError: they cannot, or one is unknown.
    """
    check_known(metrics)
    if "is" in metrics and not (isinstance(features, Classifier) and features.classes):
        raise ValueError(
            f"the Inception score needs class probabilities, which {features.name!r} does not give; "
            f"{WHERE_TO_GET_INCEPTION}"
        )
    if reference is None:
        if set(metrics) != {"is"}:
            compared = " and ".join(metric for metric in metrics if metric != "is")
            raise ValueError(f"{compared} cannot be measured without a reference; the Inception score can")
        return
    wanted = reference.statistics.mean.numel()
    if reference.statistics.mean.shape != (features.dim,):
        raise ValueError(
            f"the reference has {wanted} features, {features.name!r} gives {features.dim}: "
            "it was made with another extractor" + (INCEPTIONS if wanted == INCEPTION_DIM else "")
        )
    if reference.features is None and (unable := [m for m in metrics if m in ("kid", "pr")]):
        raise ValueError(
            f"{' and '.join(unable)} cannot be measured against a mean and covariance alone: give real images (a data "
            "set, or an .npz with arr_0) as the reference, or leave it at fid and is"
        )


@torch.no_grad()
def evaluate_images(
    sample: Callable[[int, int], Tensor],
    n: int,
    features: Features,
    reference: Reference | None,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    metrics: Sequence[Metric] = ("fid",),
    pr_images: int = PR_IMAGES,
    leave_out: bool = False,
) -> FrechetResult:
    """The `metrics` of `n` sampled images, the same on every rank and for every number of ranks.

    Args:
        sample: as in `collect`.
        n: as in `collect`.
        features: what images are compared by.
        reference: what they are compared with; None for the Inception score alone.
        batch: as in `collect`.
        rank: as in `collect`.
        world_size: as in `collect`.
        metrics: what is measured.
        pr_images: images of each set that precision and recall are measured on, of which the time is quadratic; drawn
            at random with a fixed seed where there are more.
        leave_out: measure the samples that are finite, and count the others. Of fewer than two the Fréchet distance is
            NaN; the others are not measured of fewer than they need (2, 4 with precision and recall, 10 for the score).

    Raises:
        ValueError: a metric that the features or the reference do not allow, non-finite features (how many) unless
            they are left out, and as `collect`.
    """
    check_metrics(metrics, features, reference)
    single = bool({"kid", "pr"} & set(metrics))
    found = collect(
        sample,
        n,
        features,
        batch=batch,
        rank=rank,
        world_size=world_size,
        keep_features=single,
        keep_probabilities="is" in metrics,
    )
    # An error where features are not finite.
    statistics = found.moments.of_finite() if leave_out else found.moments.statistics
    distance, others = float("nan"), dict[str, Any]()
    if reference is not None and statistics is not None and "fid" in metrics:
        distance = frechet_distance(statistics, reference.statistics)
    rows, probabilities = found.features, found.probabilities
    if leave_out:
        rows, probabilities = _finite(rows, least=4 if "pr" in metrics else 2), _finite(probabilities, least=10)
    if reference is not None and reference.features is not None and rows is not None:
        if "kid" in metrics:
            others["kid"], others["kid_std"] = kernel_distance(rows, reference.features)
            others["kid_subset_size"] = usual_subset_size(rows, reference.features)
        if "pr" in metrics:
            pair = precision_recall(reference.features, rows, limit=pr_images)
            others["precision"], others["recall"] = pair
            others["pr_images"], others["pr_real_images"] = (
                min(pr_images, len(each)) for each in (rows, reference.features)
            )
    if probabilities is not None:
        others["inception_score"], others["inception_score_std"] = inception_score(probabilities)
    count = found.moments.count
    speed = count / max(found.seconds, 1e-9)
    left_out = found.moments.non_finite
    return FrechetResult(
        distance, count, found.seconds, speed, distance_name(features), left_out, metrics=tuple(metrics), **others
    )


def _finite(rows: Tensor | None, *, least: int) -> Tensor | None:
    """The rows that are finite; None where they are too few to be measured."""
    if rows is None:
        return None
    kept = rows[torch.isfinite(rows).all(dim=1)]
    return kept if len(kept) >= least else None


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
    """Fréchet distance of `n` sampled images to `reference`; arguments and errors as in `evaluate_images`."""
    statistics = reference.statistics if isinstance(reference, FeatureMoments) else Statistics(*reference)
    return evaluate_images(sample, n, features, Reference(statistics), batch=batch, rank=rank, world_size=world_size)


def dataset_statistics(
    dataset: ImageDataset, features: Features, batch: int = 512, device: torch.device | str | None = None
) -> Statistics:
    """Statistics of the features of every image of `dataset`, each taken once, as stored (no flips).

    Args:
        dataset: the images.
        features: the extractor.
        batch: images at a time.
        device: where the features are computed; the dataset's own when None.
    """
    return dataset_reference(dataset, features, batch, device).statistics


def dataset_reference(
    dataset: ImageDataset,
    features: Features,
    batch: int = 512,
    device: torch.device | str | None = None,
    *,
    keep_features: bool = False,
) -> Reference:
    """As `dataset_statistics`, with the features themselves where `keep_features`: 4·N·dim bytes."""
    where = dataset.device if device is None else device
    found = collect(
        lambda i, count: dataset.take(i, count).to(where),
        len(dataset),
        features,
        batch=batch,
        keep_features=keep_features,
    )
    return Reference(found.moments.statistics, found.features)
