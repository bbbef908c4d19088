"""Kernel distance, Inception score, precision and recall: against definitions written out, and in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ipfm.engine.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from ipfm.engine.evaluation.metrics.moments import FeatureMoments


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- Fréchet distance ------------------------------------------------------------------------------------------------


def test_frechet_distance_agrees_with_numpy_and_sqrtm_on_random_features():
    """Features of 192 dimensions with a spectrum over four decades: moments and root computed independently."""
    scale = torch.logspace(0, -2, 192, dtype=torch.float64)
    a, b = normal(3000, 192, seed=1) * scale + 0.3, (normal(2500, 192, seed=2) @ normal(192, 192, seed=3) * 0.02) + 0.1
    found = []
    for features in (a, b):
        moments = FeatureMoments(192)
        for part in features.float().split(250):
            moments.add(part)
        found.append(moments)
    x, y = (features.float().double().numpy() for features in (a, b))
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    truth = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariance_x + covariance_y - 2 * root)
    assert frechet_distance(*found) == pytest.approx(float(truth), rel=1e-6)


# -- kernel distance -------------------------------------------------------------------------------------------------


def unbiased(x: torch.Tensor, y: torch.Tensor) -> float:
    """The estimate pair by pair [arXiv 1801.01401, eq. 4]."""

    def k(u: torch.Tensor, v: torch.Tensor) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    across = sum(k(u, v) for u in x for v in y) / (m * n)
    return within_x + within_y - 2 * across


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = normal(12, 5), normal(12, 5, seed=1) + 0.5
    found = kernel_distance(x, y, subsets=3, subset_size=100)
    assert found.mean == pytest.approx(unbiased(x, y), rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)  # all subsets are the whole sets


def test_kernel_distance_averages_over_subsets():
    """Over all pairs of subsets the mean is the estimate with every sample; 400 random ones come near it.

    The deviation of the mean is std / 20; 6 of them are exceeded less often than once in 10^8.
    """
    x, y = normal(60, 4), 1.3 * normal(50, 4, seed=1) + 0.4
    found = kernel_distance(x, y, subsets=400, subset_size=20)
    assert kernel_distance(x, y) == kernel_distance(x, y, subsets=100, subset_size=25)  # half of the smaller set
    assert abs(found.mean - unbiased(x, y)) < 6 * found.std / 20
    assert found.std > 0 and found == kernel_distance(x, y, subsets=400, subset_size=20)
    assert found != kernel_distance(x, y, subsets=400, subset_size=20, seed=1)


def test_kernel_distance_in_closed_form():
    """dim 1, a all 1 and b all 0: 8 + 1 - 2; equal sets: nothing is compared with itself, and 0 is left."""
    ones, zeros = torch.ones(6, 1), torch.zeros(9, 1)
    assert kernel_distance(ones, zeros).mean == pytest.approx(7, rel=1e-12)
    assert kernel_distance(ones, ones).mean == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_computed_in_float64():
    """Large common values, as of unscaled features: float32 products would lose the difference altogether."""
    x = (normal(200, 8) * 0.1 + 50).float()
    y = (normal(200, 8, seed=1) * 0.1 + 50).float()
    found = kernel_distance(x, y, subsets=1, subset_size=200).mean
    scaled = [(z.double() @ w.double().T / 8 + 1) ** 3 for z, w in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - k.diagonal().sum()) / (200 * 199) for k in scaled[:2]]
    assert found == pytest.approx(float(within[0] + within[1] - 2 * scaled[2].mean()), rel=1e-6)


def test_kernel_distance_refuses_what_it_cannot_use():
    good = normal(5, 3)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        kernel_distance(good, normal(5, 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 100 of 1"):
        kernel_distance(good, good[:1])
    with pytest.raises(ValueError, match="at least 2 samples, got 0 of 2"):
        kernel_distance(good, good, subsets=0)
    with pytest.raises(ValueError, match="non-finite"):
        kernel_distance(good, good * math.nan)


# -- Inception score -------------------------------------------------------------------------------------------------


def test_inception_score_is_that_of_the_definition():
    p = normal(53, 6).softmax(dim=1)
    found = inception_score(p.float(), splits=4)
    scores = []
    for part in range(4):
        rows = p[part * 53 // 4 : (part + 1) * 53 // 4].numpy()
        marginal = rows.mean(0)
        divergences = [sum(r * math.log(r / m) for r, m in zip(row, marginal, strict=True)) for row in rows]
        scores.append(math.exp(np.mean(divergences)))
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-6)
    assert found.std == pytest.approx(np.std(scores), rel=1e-4)


def test_inception_score_in_closed_form():
    """Sure and evenly varied: the number of classes. Always the same answer: 1."""
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure) == (pytest.approx(5, rel=1e-12), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.full((30, 4), 0.25)).mean == pytest.approx(1, rel=1e-12)


def test_inception_score_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="one image for each of 10 parts, got 9"):
        inception_score(torch.eye(9))
    for bad in (torch.full((20, 4), 0.3), torch.tensor([[1.5, -0.5]] * 20), torch.full((20, 2), math.nan)):
        with pytest.raises(ValueError, match="non-negative and sum to 1"):
            inception_score(bad)
    with pytest.raises(ValueError, match=r"shape \(N, classes\), got \(20,\)"):
        inception_score(torch.ones(20))


# -- precision and recall --------------------------------------------------------------------------------------------


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Arrays of all distances [arXiv 1904.06991, eq. 1 and 2]."""

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        among = np.linalg.norm(centres[:, None] - centres[None], axis=2)
        radii = np.sort(among, axis=1)[:, k]  # place 0 is the point itself
        across = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return float((across <= radii).any(axis=1).mean())

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize(("k", "chunk"), [(1, 1024), (3, 7), (3, 100)])
def test_precision_and_recall_are_those_of_the_definition(k, chunk):
    real, generated = normal(90, 3), 0.7 * normal(70, 3, seed=1) + 0.6
    found = precision_recall(real, generated, k=k, chunk=chunk)
    assert tuple(found) == by_definition(real.numpy(), generated.numpy(), k)
    assert 0 < found.recall < found.precision < 1  # narrower than the real ones, and shifted
    swapped = precision_recall(generated, real, k=k)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_precision_and_recall_of_copies_and_of_strangers():
    """Also with points that are there several times, whose balls have no radius, far from the origin."""
    real = normal(40, 6).repeat_interleave(5, dim=0).float() + 1000
    assert precision_recall(real, real.flip(0)) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    part = precision_recall(real, real[:100])
    assert part.precision == 1.0 and part.recall == 0.5


def test_precision_and_recall_of_a_part():
    real, generated = normal(300, 4), normal(400, 4, seed=1)
    found = precision_recall(real, generated, limit=100)
    assert found == precision_recall(real, generated, limit=100) != precision_recall(real, generated)
    sorted_by_class = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 50])
    # The first hundred alone would miss the second class.
    assert precision_recall(sorted_by_class, normal(100, 2, seed=2) + 50, limit=100).precision > 0.5


def test_precision_and_recall_refuse_what_they_cannot_use():
    good = normal(5, 3)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        precision_recall(good, normal(5, 4))
    with pytest.raises(ValueError, match="the 3-th neighbour needs at least 4 images in each set, got 3"):
        precision_recall(good, good[:3])
    for bad in ((good * math.inf, good), (good, good * math.nan)):
        with pytest.raises(ValueError, match="non-finite"):
            precision_recall(*bad)
