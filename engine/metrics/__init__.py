"""Metrics of sets of images, in a feature space that the caller chooses.

With the features of the Inception network the Fréchet distance is the FID; with :class:`PixelFeatures` or
:class:`BlockFeatures` it needs no network. All of them are computed in float64, and depend neither on how the images
were split into batches nor on the number of ranks, beyond rounding.
"""

from ipfm.engine.metrics.blocks import BlockFeatures
from ipfm.engine.metrics.collection import collect, index_ranges
from ipfm.engine.metrics.evaluate import (
    METRICS,
    FrechetResult,
    Metric,
    Reference,
    dataset_statistics,
    evaluate_frechet,
    evaluate_images,
)
from ipfm.engine.metrics.features import Features, InceptionFeatures, PixelFeatures
from ipfm.engine.metrics.frechet import frechet_distance
from ipfm.engine.metrics.inception_score import InceptionScore, inception_score
from ipfm.engine.metrics.kernel_distance import KernelDistance, kernel_distance
from ipfm.engine.metrics.moments import FeatureMoments, Statistics
from ipfm.engine.metrics.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "METRICS",
    "BlockFeatures",
    "FeatureMoments",
    "Features",
    "FrechetResult",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "Metric",
    "PixelFeatures",
    "PrecisionRecall",
    "Reference",
    "Statistics",
    "collect",
    "dataset_statistics",
    "evaluate_frechet",
    "evaluate_images",
    "frechet_distance",
    "inception_score",
    "index_ranges",
    "kernel_distance",
    "precision_recall",
]
