"""Metrics of sets of images, in a feature space that the caller chooses.

With the features of the Inception network the Fréchet distance is the FID; with :class:`PixelFeatures` or
:class:`BlockFeatures` it needs no network. All of them are computed in float64, and depend neither on how the images
were split into batches nor on the number of ranks, beyond rounding.
"""

from ipfm.engine.evaluation.metrics.blocks import BlockFeatures
from ipfm.engine.evaluation.metrics.collection import collect, index_ranges
from ipfm.engine.evaluation.metrics.evaluate import (
    FrechetResult,
    Reference,
    dataset_reference,
    dataset_statistics,
    evaluate_frechet,
    evaluate_images,
)
from ipfm.engine.evaluation.metrics.features import Features, InceptionFeatures, PixelFeatures
from ipfm.engine.evaluation.metrics.frechet import frechet_distance
from ipfm.engine.evaluation.metrics.inception_score import InceptionScore, inception_score
from ipfm.engine.evaluation.metrics.kernel_distance import KernelDistance, kernel_distance
from ipfm.engine.evaluation.metrics.measures import METRICS, Metric
from ipfm.engine.evaluation.metrics.moments import FeatureMoments, Statistics
from ipfm.engine.evaluation.metrics.precision_recall import PrecisionRecall, precision_recall

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
    "dataset_reference",
    "dataset_statistics",
    "evaluate_frechet",
    "evaluate_images",
    "frechet_distance",
    "inception_score",
    "index_ranges",
    "kernel_distance",
    "precision_recall",
]
