"""Evaluations: every metric from one pass, what they refuse before they start, and one process against two."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny_inception
import torch

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation, open_comparison, open_features
from ipfm.engine.evaluation.metrics import (
    FrechetResult,
    InceptionFeatures,
    Metric,
    PixelFeatures,
    Reference,
    Statistics,
    collect,
    dataset_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ipfm.engine.evaluation.options import EvaluationOptions

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
SHAPE = (3, 6, 6)
ALL: tuple[Metric, ...] = ("fid", "kid", "is", "pr")


def pattern(first: int, count: int) -> torch.Tensor:
    """Images (count, 3, 6, 6) that are a function of their global index."""
    index = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    return torch.sin(index * torch.arange(1, 109) * 0.7 + index**2).float().reshape(count, *SHAPE)


def real(count: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, real images, and the statistics of their features."""
    root = tmp_path_factory.mktemp("files")
    tiny_inception.write(root / "net.pt")
    np.savez(root / "real.npz", arr_0=real())
    statistics = comparison(root, ("fid",)).evaluation(ALONE, images=2).statistics
    np.savez(root / "stats.npz", mu=statistics.mean, sigma=statistics.covariance)
    return root


def comparison(root: Path, metrics: tuple[Metric, ...], reference: str = "real.npz"):
    return open_comparison(root / reference, SHAPE, CPU, inception=root / "net.pt", metrics=metrics)


def test_every_metric_comes_from_one_pass(files: Path) -> None:
    asked: list[tuple[int, int]] = []

    def sample(first: int, count: int) -> torch.Tensor:
        asked.append((first, count))
        return pattern(first, count)

    evaluation = comparison(files, ALL).evaluation(ALONE, images=70, batch=16, pr_images=60)
    result = evaluation.measure(sample, ALONE)
    assert [i for first, count in asked for i in range(first, first + count)] == list(range(70))

    features = InceptionFeatures(files / "net.pt")
    fake = features(pattern(0, 70))
    true = features(torch.from_numpy(real()).permute(0, 3, 1, 2) / 127.5 - 1)
    kid = kernel_distance(fake, true)
    score = inception_score(features.probabilities(pattern(0, 70)))
    pair = precision_recall(true, fake, limit=60)
    covariances = (torch.from_numpy(np.cov(f.double().numpy(), rowvar=False)) for f in (fake, true))
    distance = frechet_distance(*((f.double().mean(0), c) for f, c in zip((fake, true), covariances, strict=True)))
    assert result.distance == pytest.approx(distance, rel=1e-6)
    assert (result.kid, result.kid_std) == (pytest.approx(kid.mean, rel=1e-4), pytest.approx(kid.std, rel=1e-4))
    assert result.inception_score == pytest.approx(score.mean, rel=1e-5)
    assert result.inception_score_std == pytest.approx(score.std, rel=1e-3)
    assert (result.precision, result.recall) == pair
    assert (result.name, result.images) == ("FID", 70)


def test_only_what_was_asked_for_is_there(files: Path) -> None:
    fid = comparison(files, ("fid",), "stats.npz").evaluation(ALONE, images=20).measure(pattern, ALONE)
    assert (fid.kid, fid.kid_std, fid.inception_score, fid.precision, fid.recall) == (None,) * 5
    features = InceptionFeatures(files / "net.pt")
    score = Evaluation(features, None, 20, metrics=("is",)).measure(pattern, ALONE)
    assert math.isnan(score.distance) and score.inception_score is not None and score.kid is None
    pixels = Evaluation(PixelFeatures(SHAPE), Statistics(torch.zeros(108), torch.eye(108)), 20)
    assert pixels.measure(pattern, ALONE).name == "Fréchet distance"


@pytest.mark.parametrize("kind", ["inception", "pixels"])
def test_a_set_of_images_is_at_no_distance_from_itself(files: Path, kind: str) -> None:
    metrics: tuple[Metric, ...] = ("fid", "kid", "pr")
    features = InceptionFeatures(files / "net.pt") if kind == "inception" else PixelFeatures(SHAPE)
    data = ImageDataset(torch.from_numpy(real()).permute(0, 3, 1, 2).contiguous())
    found = collect(data.take, len(data), features, batch=40, keep_features=True)
    reference = Reference(dataset_statistics(data, features, batch=33), found.features)
    result = Evaluation(features, reference, 90, batch=20, metrics=metrics).measure(data.take, ALONE)
    assert 0 <= result.distance < 1e-3
    assert (result.precision, result.recall) == (1.0, 1.0)
    # 90 against the same 90: what is compared with itself is left out within the sets, but not across.
    assert result.kid is not None and result.kid < 0


def test_another_first_index_measures_other_images(files: Path) -> None:
    evaluation = comparison(files, ("fid",)).evaluation(ALONE, images=30, batch=8)
    moved = evaluation.measure(lambda first, count: pattern(first + 30, count), ALONE)
    assert evaluation.measure(pattern, ALONE, first_index=30).distance == moved.distance
    assert evaluation.measure(pattern, ALONE).distance != moved.distance


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(files: Path, tmp_path: Path) -> None:
    features = InceptionFeatures(files / "net.pt")
    statistics = Statistics(torch.zeros(features.dim), torch.eye(features.dim))
    alone: tuple[Metric, ...]
    for alone, message in (
        (("kid",), "kid cannot be measured against a mean and covariance alone: give real images"),
        (("fid", "kid", "pr"), "kid and pr cannot be measured against a mean"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation(features, statistics, 20, metrics=alone)
        with pytest.raises(ValueError, match=message):
            comparison(files, alone, "stats.npz")
    with pytest.raises(ValueError, match=r"'pixels' does not give; inception-2015-12-05\.pt"):
        open_comparison(files / "real.npz", SHAPE, CPU, features="pixels", metrics=("fid", "is"))
    with pytest.raises(ValueError, match="the reference has 12 features, 'pixels' gives 108"):
        open_comparison(files / "stats.npz", SHAPE, CPU, features="pixels")
    with pytest.raises(ValueError, match="fid and pr cannot be measured without a reference; the Inception score can"):
        open_comparison(None, SHAPE, CPU, inception=files / "net.pt", metrics=("fid", "is", "pr"))
    with pytest.raises(ValueError, match=r"nothing\.npz does not exist: a reference is an .npz with mu and sigma"):
        open_comparison(tmp_path / "nothing.npz", SHAPE, CPU, inception=files / "net.pt")
    with pytest.raises(ValueError, match="metrics must be among fid, kid, is, pr, got ssim"):
        Evaluation(features, statistics, 20, metrics=("ssim",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metrics must be among fid, kid, is, pr, got none"):
        Evaluation(features, statistics, 20, metrics=())
    with pytest.raises(ValueError, match="at least 2 images and a positive batch, got 1 and 512"):
        Evaluation(features, statistics, 1)
    with pytest.raises(ValueError, match="precision and recall need at least 4 images, real ones too, got 3"):
        Evaluation(features, Reference(statistics, torch.zeros(9, features.dim)), 20, metrics=("pr",), pr_images=3)
    with pytest.raises(ValueError, match="real ones too, got 2"):
        Evaluation(features, Reference(statistics, torch.zeros(2, features.dim)), 20, metrics=("pr",))
    with pytest.raises(ValueError, match="Inception score needs at least 10 images, got 9"):
        Evaluation(features, None, 9, metrics=("is",))


@pytest.mark.parametrize(("side", "dim"), [(2, 6), (7, 6), (28, 294), (48, 384), (64, 384), (100, 150), (128, 384)])
def test_blocks_are_features_of_images_of_any_size(side: int, dim: int) -> None:
    """Few enough for the covariance of a small set, whatever the size: at most 8 blocks side by side."""
    found = open_features("blocks", None, (3, side, side), CPU)
    assert found(torch.zeros(2, 3, side, side)).shape == (2, found.dim) and found.dim == dim
    assert Evaluation(found, Statistics(torch.zeros(dim), torch.eye(dim)), 20).features.name.startswith("blocks of ")
    with pytest.raises(ValueError, match="at least 2x2 pixels, these are 1x1"):
        open_features("blocks", None, (3, 1, 1), CPU)


def test_features_are_named_or_pixels(files: Path) -> None:
    assert open_features("pixels", None, SHAPE, CPU).dim == 108
    assert open_features("inception", files / "net.pt", SHAPE, CPU).dim == tiny_inception.DIM
    with pytest.raises(ValueError, match=r"inception must be given .*StyleGAN2-ADA.*features pixels"):
        open_features("inception", None, SHAPE, CPU)
    with pytest.raises(ValueError, match="leave one of them out"):
        open_features("pixels", files / "net.pt", SHAPE, CPU)
    assert EvaluationOptions(reference=files / "real.npz", features="auto").compared_by == "blocks"
    with_network = EvaluationOptions(reference=files / "real.npz", inception=files / "net.pt", features="auto")
    assert with_network.compared_by == "inception"
    np.savez(files / "published.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"gives 54: .* by their number the Inception network: give --inc"):
        open_comparison(files / "published.npz", SHAPE, CPU, features="blocks")
    with pytest.raises(ValueError, match=r"the images of .* are 3x6x6, those that are measured 3x8x8; blocks can"):
        open_comparison(files / "real.npz", (3, 8, 8), CPU, features="blocks")


def test_images_that_are_not_finite_are_counted_for_every_metric(files: Path) -> None:
    def sample(first: int, count: int) -> torch.Tensor:
        images = pattern(first, count)
        images[torch.arange(first, first + count) < 3] = math.nan
        return images

    evaluation = comparison(files, ALL).evaluation(ALONE, images=20, batch=8)
    with pytest.raises(ValueError, match="3 of 20 samples have non-finite features"):
        evaluation.measure(sample, ALONE)
    fid = comparison(files, ("fid",)).evaluation(ALONE, images=20, batch=8)
    found = fid.measure(sample, ALONE, leave_out=True)
    finite = replace(fid, images=17).measure(lambda first, count: pattern(first + 3, count), ALONE)
    assert (found.images, found.left_out) == (17, 3)
    assert found.distance == pytest.approx(finite.distance, rel=1e-9)
    whole = evaluation.measure(sample, ALONE, leave_out=True)
    alone = replace(evaluation, images=17).measure(lambda first, count: pattern(first + 3, count), ALONE)
    for name in ("kid", "precision", "recall", "inception_score"):
        assert getattr(whole, name) == pytest.approx(getattr(alone, name), rel=1e-6), name
    none = evaluation.measure(lambda first, count: pattern(first, count) * math.nan, ALONE, leave_out=True)
    assert none.kid is None and none.precision is None and none.inception_score is None
    none = fid.measure(lambda first, count: pattern(first, count) * math.nan, ALONE, leave_out=True)
    assert math.isnan(none.distance) and (none.images, none.left_out) == (0, 20)


@pytest.mark.distributed
def test_two_processes_find_what_one_does(files: Path, tmp_path: Path) -> None:
    """Reference and samples shared out: features come together in the order of the images, whoever had them."""
    cases = [{"images": 70, "batch": 8}, {"images": 11, "batch": 1}]
    job = {"files": str(files), "out": str(tmp_path), "cases": cases}
    launch.run_workers("evaluate_shards.py", 2, job)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for case, first, second in zip(cases, ranks[0]["results"], ranks[1]["results"], strict=True):
        assert first == second
        found = FrechetResult(**first)
        alone = comparison(files, ALL).evaluation(ALONE, images=case["images"], batch=case["batch"])
        single = alone.measure(pattern, ALONE)
        assert found.images == single.images and (found.precision, found.recall) == (single.precision, single.recall)
        for name in ("distance", "kid", "kid_std", "inception_score", "inception_score_std"):
            assert getattr(found, name) == pytest.approx(getattr(single, name), rel=1e-5, abs=1e-9), name
    # Eleven images, two processes: the twelfth call draws an image that is thrown away.
    drawn = [i for rank in ranks for first, count in rank["asked"][-6:] for i in range(first, first + count)]
    assert sorted(drawn) == sorted([*range(11), 0])
    # An image that one process cannot draw stops both, with the same words.
    assert ranks[0]["error"] == ranks[1]["error"] == "image 13 is damaged"
    # The command prints once.
    assert json.loads(ranks[0]["printed"])["images"] == 11 and ranks[1]["printed"] == ""
