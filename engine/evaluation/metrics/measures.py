"""The numbers that metrics give: their names in files and for people, and which of two is the better one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from ipfm.engine.evaluation.metrics.kernel_distance import SUBSET_SIZE
from ipfm.engine.runtime.wording import significant

Metric = Literal["fid", "kid", "is", "pr"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# What a Fréchet distance is called with the features of Inception, and with all others.
FID, DISTANCE = "FID", "Fréchet distance"
# And with those of DINOv2.
FD_DINOV2 = "FD-DINOv2"


@dataclass(frozen=True)
class Measure:
    """A number that a metric gives.

    Attributes:
        key: its name in files.
        metric: which metric.
        name: for people, with the features of Inception.
        otherwise: the same with all other features.
        higher: whether larger is better.
        about: what it is, a sentence.
        spread: name in files of its deviation, None where it has none.
    """

    key: str
    metric: Metric
    name: str
    otherwise: str
    higher: bool
    about: str
    spread: str | None = None

    def called(self, distance: str) -> str:
        """Its name for people, beside a Fréchet distance that is called `distance`."""
        if self.key == "frechet":
            return distance
        return self.name if distance == FID else self.otherwise

    @property
    def best(self) -> str:
        """The word for the best of several: "smallest" or "largest"."""
        return "largest" if self.higher else "smallest"


MEASURES = (
    Measure(
        "frechet",
        "fid",
        FID,
        DISTANCE,
        False,
        "Fréchet distance between samples of the averaged network and the reference: smaller is better.",
    ),
    Measure(
        "kid",
        "kid",
        "KID",
        "kernel distance",
        False,
        "Kernel distance between samples of the averaged network and real images: smaller is better, and it may be "
        "negative.",
        "kid_std",
    ),
    Measure(
        "inception_score",
        "is",
        "Inception score",
        "Inception score",
        True,
        "Inception score of samples of the averaged network: larger is better.",
        "inception_score_std",
    ),
    Measure(
        "precision",
        "pr",
        "precision",
        "precision",
        True,
        "Share of the averaged network's samples that lie where real images do: larger is better.",
    ),
    Measure(
        "recall",
        "pr",
        "recall",
        "recall",
        True,
        "Share of real images that lie where the averaged network's samples do: larger is better.",
    ),
)


def measures_of(metrics: Iterable[str]) -> tuple[Measure, ...]:
    """What these metrics give, in their order; a metric that is named twice counts once."""
    return tuple(measure for metric in dict.fromkeys(metrics) for measure in MEASURES if measure.metric == metric)


def merit(metric: Metric, values: Mapping[str, float | None]) -> float:
    """How good samples are by a metric: the larger, the better; NaN where it was not measured.

    The Fréchet and the kernel distance count negative, the Inception score as it is, precision and recall by their
    harmonic mean.

    Args:
        metric: one of METRICS.
        values: what was measured, by the keys of MEASURES.
    """
    found = [value for measure in measures_of((metric,)) if (value := values.get(measure.key)) is not None]
    if metric == "pr":
        if len(found) < 2 or not all(map(math.isfinite, found)):
            return math.nan
        return 2 * math.prod(found) / sum(found) if sum(found) > 0 else 0.0
    if not found:
        return math.nan
    return found[0] if metric == "is" else -found[0]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of samples beside their Fréchet distance, which a class made from this one has as `frechet`.

    Attributes:
        metrics: what was asked for, in this order.
        kid: kernel distance; this and the following are None where they were not asked for.
        kid_std: its deviation over subsets.
        kid_subset_size: images in each of these.
        inception_score: Inception score.
        inception_score_std: its deviation over subsets.
        precision: share of samples that lie where real images do.
        recall: share of real images that lie where samples do.
        pr_images: samples that these two are of.
        pr_real_images: real images that they are of.
    """

    metrics: tuple[Metric, ...] = ("fid",)
    kid: float | None = None
    kid_std: float | None = None
    kid_subset_size: int | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    pr_images: int | None = None
    pr_real_images: int | None = None

    def __post_init__(self) -> None:
        # A file has a list; what is named twice is measured once.
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))

    @property
    def values(self) -> dict[str, float]:
        """By the keys of MEASURES, those that were asked for; NaN where too few samples were finite to be measured."""
        found = {measure.key: getattr(self, measure.key) for measure in measures_of(self.metrics)}
        return {key: math.nan if value is None else float(value) for key, value in found.items()}

    @property
    def others(self) -> dict[str, Any]:
        """All of this class, by name."""
        return {f.name: getattr(self, f.name) for f in fields(Measured)}

    def to_json(self) -> dict[str, Any]:
        """By name: first what is not of this class, then what was asked for of it."""
        shared = {name: value for name, value in self.others.items() if value is not None or name in self.values}
        if self.metrics == ("fid",):
            del shared["metrics"]
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.others} | shared

    def merit(self, metric: Metric) -> float:
        """See `merit`."""
        return merit(metric, self.values)

    def shown(self, measure: Measure) -> str:
        """The number for people, with its deviation; "-" where it was not asked for."""
        value = self.values.get(measure.key)
        if value is None:
            return "-"
        spread = None if measure.spread is None else getattr(self, measure.spread)
        return significant(value) if spread is None else f"{significant(value)} ± {significant(spread)}"


M = TypeVar("M", bound=Measured)


def best_of(evaluations: Iterable[M], metric: Metric) -> M | None:
    """The best of these by a metric, the first of equal ones; None where none has a number of it."""
    finite = [found for found in evaluations if math.isfinite(found.merit(metric))]
    return max(finite, key=lambda found: found.merit(metric), default=None)


def notes(found: Sequence[Measured], distance: str) -> list[str]:
    """What to know of numbers that are not measured as usual, or compare with few others; a line each.

    Args:
        found: what was measured.
        distance: what the Fréchet distance is called.
    """
    said: list[str] = []
    for one in found:
        if one.kid is not None and one.kid_subset_size is not None and one.kid_subset_size < SUBSET_SIZE:
            name = measures_of(("kid",))[0].called(distance)
            said.append(
                f"{name}: over subsets of {one.kid_subset_size:,} images, half of the smaller set, instead of "
                f"{SUBSET_SIZE:,}: its mean compares with that of others, its ± does not"
            )
        if one.precision is not None and one.pr_images is not None and one.pr_real_images is not None:
            features = "Inception's features" if distance == FID else "other features than Inception's"
            said.append(
                f"precision and recall: {one.pr_images:,} samples, {one.pr_real_images:,} real images, k = 3, "
                f"{features}; they compare only with figures of the same, and not with those of VGG's features"
            )
    return list(dict.fromkeys(said))
