"""Moments and Fréchet distance: against exact formulas, for every split into batches and ranks."""

import json
import math
import textwrap

import launch
import numpy as np
import prepared
import pytest
import scipy.linalg
import torch

from ipfm.engine.data.dataset import ImageDataset, digits
from ipfm.engine.evaluation.metrics import (
    FeatureMoments,
    PixelFeatures,
    Statistics,
    dataset_statistics,
    evaluate_frechet,
    frechet_distance,
    index_ranges,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(features: torch.Tensor, sizes: list[int] | None = None) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    for part in features.split(sizes or len(features)):
        moments.add(part)
    return moments


# -- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e8])
@pytest.mark.parametrize(
    "sizes", [[503], [1] * 503, [1, 2, 300, 200], [0, 500, 3]], ids=["one", "ones", "odd", "empty"]
)
def test_moments_match_two_pass_formulas_for_every_split(mean, sizes):
    features = normal(503, 7) * torch.linspace(0.1, 3, 7) + mean
    moments = moments_of(features, sizes)
    assert moments.count == 503
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    # Shifted data: the truth must not suffer from the mean either. Inputs at 1e8 are exact only to 1e-8.
    truth = np.cov((features - mean).numpy(), rowvar=False)
    np.testing.assert_allclose(moments.mean, (features - mean).mean(0) + mean, rtol=4e-15, atol=1e-14)
    np.testing.assert_allclose(moments.covariance, truth, atol=1e-12 + 2e-15 * mean)


def test_float32_features_at_a_large_mean_keep_their_spread():
    features = (normal(4096, 3) + 1e4).float()
    truth = np.cov(features.double().numpy() - 1e4, rowvar=False)
    np.testing.assert_allclose(moments_of(features, [1000] * 4 + [96]).covariance, truth, rtol=1e-10, atol=1e-12)


def test_non_finite_rows_are_counted_and_make_every_statistic_an_error():
    features = normal(10, 4)
    features[2, 1] = math.nan
    features[5] = math.inf
    features[5, 0] = -math.inf
    moments = moments_of(features, [4, 6])
    assert moments.count == 8
    for read in ("mean", "covariance", "statistics"):
        with pytest.raises(ValueError, match="2 of 10 samples have non-finite features"):
            getattr(moments, read)
    with pytest.raises(ValueError, match="2 of 10"):
        frechet_distance(moments, moments_of(normal(10, 4)))


def test_moments_refuse_what_they_cannot_use():
    moments = FeatureMoments(4)
    for bad in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(2, 2, 4)):
        with pytest.raises(ValueError, match=r"shape \(B, 4\)"):
            moments.add(bad)
    with pytest.raises(ValueError, match="at least 1 samples, got 0"):
        _ = moments.mean
    moments.add(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="dim=0"):
        FeatureMoments(0)
    moments.all_reduce()
    with pytest.raises(RuntimeError, match="all-reduced already"):
        moments.all_reduce()
    with pytest.raises(RuntimeError, match="all-reduced already"):
        moments.add(torch.zeros(1, 4))


# -- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_distance_of_random_covariances_matches_sqrtm(seed):
    a, b = (moments_of(normal(200, 24, seed=10 * seed + i) @ normal(24, 24, seed=90 + i) + i) for i in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    truth = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(truth), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize(("samples", "dim"), [(9, 30), (40, 128), (2, 50)])
def test_distance_of_singular_covariances_is_exact(samples, dim):
    """Sa = A Aᵀ, Sb = B Bᵀ: the trace of the root is the nuclear norm of Aᵀ B, which no small eigenvalue spoils."""
    a, b = normal(samples, dim, seed=1), normal(2 * samples, dim, seed=2) * 3 + 1
    factor_a, factor_b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = torch.linalg.matrix_norm(factor_a @ factor_b.T, ord="nuc")
    truth = (a.mean(0) - b.mean(0)).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * overlap
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(truth.item(), rel=1e-11)


def test_a_distance_is_two_eigenvalue_problems_and_one_of_singular_values(monkeypatch):
    """In float64, each of them seconds for 2048 features where a device is slow at that."""
    asked = []
    for name in ("eigh", "svdvals"):
        solve = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda a, name=name, solve=solve: (asked.append((name, a.dtype)), solve(a))[1]
        )
    frechet_distance(moments_of(normal(20, 4)), moments_of(normal(20, 4, seed=1)))
    assert asked == [("eigh", torch.float64)] * 2 + [("svdvals", torch.float64)]


@pytest.mark.quick
def test_distance_in_closed_form():
    """Diagonal covariances: Σ (√a - √b)²; no spread at all: the squared distance of the means."""
    a, b = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0])
    mean = torch.tensor([1.0, 2.0, -2.0])
    assert frechet_distance((mean, a.diag()), (0 * mean, b.diag())) == pytest.approx(9 + 1 + 1 + 25, rel=1e-12)
    zeros = torch.zeros(3, 3)
    assert frechet_distance(Statistics(mean, zeros), Statistics(0 * mean, zeros)) == pytest.approx(9, rel=1e-12)


@pytest.mark.parametrize("samples", [30, 100, 5000])
def test_distance_to_itself_is_zero_also_where_singular(samples):
    moments = moments_of(normal(samples, 300) * torch.logspace(1, -4, 300) + 5)
    copy = Statistics(moments.mean.clone(), moments.covariance.clone())
    assert 0 <= frechet_distance(moments, copy) < 1e-6


def test_covariance_rounded_to_float32_is_accepted():
    moments = moments_of(normal(50, 200))
    rounded = Statistics(moments.mean, moments.covariance.float())
    assert torch.linalg.eigvalsh(rounded.covariance.double())[0] < 0  # the case that this test is about
    assert frechet_distance(moments, rounded) < 1e-3 * moments.covariance.trace()


def test_distance_refuses_statistics_that_are_none():
    good = moments_of(normal(20, 3)).statistics
    with pytest.raises(ValueError, match="of 3 and of 4 features"):
        frechet_distance(good, moments_of(normal(20, 4)))
    with pytest.raises(ValueError, match=r"second statistics must be .* got \(3,\) and \(3,\)"):
        frechet_distance(good, (good.mean, good.mean))
    with pytest.raises(ValueError, match="first statistics have non-finite"):
        frechet_distance((good.mean * math.nan, good.covariance), good)
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(good, (good.mean, good.covariance + torch.eye(3).roll(1, 0)))
    with pytest.raises(ValueError, match="not positive semidefinite: eigenvalues from -1"):
        frechet_distance(good, (good.mean, torch.tensor([1.0, -1.0, 2.0]).diag()))


# -- evaluation ------------------------------------------------------------------------------------------------------


def pattern(first: int, count: int) -> torch.Tensor:
    """Images (count, 1, 2, 3) that are a function of their global index."""
    index = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    return torch.sin(index * torch.arange(1, 7) * 0.7 + index**2).float().reshape(count, 1, 2, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch"), [(2, 1), (50, 7), (64, 64), (64, 1), (1000, 33), (5, 100)])
def test_ranks_draw_each_image_once_and_call_equally_often(n, batch, world):
    ranges = [index_ranges(n, batch, rank, world) for rank in range(world)]
    assert len({len(r) for r in ranges}) == 1
    drawn = [i for r in ranges for first, count in r for i in range(first, first + count)]
    assert sorted(drawn) == list(range(n))
    assert max(count for r in ranges for _, count in r) <= batch
    if n >= 2 * world and batch > 1:
        assert min(count for r in ranges for _, count in r) > 0


def test_evaluation_of_the_digits_against_themselves():
    data = digits()
    features = PixelFeatures(data.shape)
    reference = dataset_statistics(data, features, batch=100)
    other_split = dataset_statistics(data, features, batch=1797)
    np.testing.assert_allclose(reference.covariance, other_split.covariance, rtol=1e-12, atol=1e-14)

    result = evaluate_frechet(data.take, 1797, features, reference, batch=200)
    assert result.distance < 1e-9 and result.images == 1797
    assert result.images_per_second == pytest.approx(1797 / result.seconds)
    # Another set of images is farther away: grey ones by the squared mean and the whole variance.
    grey = evaluate_frechet(lambda first, count: torch.zeros(count, *data.shape), 10, features, reference, batch=4)
    expected = reference.mean.square().sum() + reference.covariance.trace()
    assert grey.distance == pytest.approx(expected.item(), rel=1e-9)


def test_dataset_statistics_are_those_of_the_stored_images():
    images = (torch.rand(31, 3, 4, 5, generator=torch.Generator().manual_seed(3)) * 256).to(torch.uint8)
    statistics = dataset_statistics(ImageDataset(images, xflip=True), PixelFeatures((3, 4, 5)), batch=7)
    pixels = images.flatten(1).double().numpy() / 127.5 - 1
    np.testing.assert_allclose(statistics.mean, pixels.mean(0), atol=2e-7)
    np.testing.assert_allclose(statistics.covariance, np.cov(pixels, rowvar=False), atol=1e-6)


def test_evaluation_refuses_what_it_cannot_compare():
    features = PixelFeatures((1, 2, 3))
    reference = moments_of(normal(20, 6))
    with pytest.raises(ValueError, match="reference has 5 features, 'pixels' gives 6"):
        evaluate_frechet(pattern, 10, features, moments_of(normal(20, 5)), batch=4)
    with pytest.raises(ValueError, match=r"sample\(0, 3\) must return images \(3, C, H, W\), got \(2, 1, 2, 3\)"):
        evaluate_frechet(lambda first, count: pattern(first, count - 1), 10, features, reference, batch=4)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, 2, 3\), got \(4, 1, 3, 2\)"):
        evaluate_frechet(lambda i, n: pattern(i, n).mT, 8, features, reference, batch=4)
    with pytest.raises(ValueError, match="at least 2 images"):
        evaluate_frechet(pattern, 1, features, reference, batch=4)
    with pytest.raises(ValueError, match="rank must lie in 0…1, got 2"):
        evaluate_frechet(pattern, 10, features, reference, batch=4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="rank 0 of 2 is not what the process group says: 0 of 1"):
        evaluate_frechet(pattern, 10, features, reference, batch=4, world_size=2)
    with pytest.raises(ValueError, match="3 of 10 samples have non-finite"):
        evaluate_frechet(lambda i, n: pattern(i, n) / (i > 2), 10, features, reference, batch=4)


RANK = """
    import json, sys, time
    import torch, torch.distributed as dist
    from ipfm.engine.evaluation.metrics import FeatureMoments, PixelFeatures, Statistics, evaluate_frechet

    torch.set_num_threads(1)
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

    # Unequal shares, a large mean, and in the second round a rank that saw nothing at all.
    features = torch.load(f"{out}/features.pt")
    found = {}
    for name, edge in (("unequal", 17), ("empty", 0)):
        moments = FeatureMoments(features.shape[1])
        moments.add(features[:edge] if rank == 0 else features[edge:])
        moments.all_reduce()
        found[name] = [moments.count, moments.mean.tolist(), moments.covariance.tolist()]

    broken = FeatureMoments(2)
    broken.add(torch.full((3, 2), float("nan") if rank == 1 else 1.0))
    broken.all_reduce()
    try:
        broken.mean
    except ValueError as error:
        found["error"] = str(error)

    asked = []
    def sample(first, count):
        global inside
        started = time.perf_counter()
        asked.append([first, count])
        time.sleep(0.08)
        inside += time.perf_counter() - started
        index = torch.arange(first, first + count, dtype=torch.float64)[:, None]
        return torch.sin(index * torch.arange(1, 7) * 0.7 + index**2).float().reshape(count, 1, 2, 3)

    reference = Statistics(torch.zeros(6), torch.eye(6))
    for n, batch in ((101, 8), (3, 1)):
        inside = 0.0
        result = evaluate_frechet(
            sample, n, PixelFeatures((1, 2, 3)), reference, batch=batch, rank=rank, world_size=world
        )
        found[f"distance {n}"] = result.distance
        found[f"inside {n}"] = inside
        found[f"facts {n}"] = [result.images, result.seconds, result.images_per_second]
    found["asked"] = asked
    json.dump(found, open(f"{out}/rank{rank}.json", "w"))
    dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_find_what_one_does(tmp_path):
    features = normal(60, 5) * 0.5 + 1e4
    torch.save(features, tmp_path / "features.pt")
    program, env = tmp_path / "rank.py", launch.environment()
    program.write_text(textwrap.dedent(RANK))
    with open(tmp_path / "log", "wb") as log:
        ranks = [
            prepared.start(program, r, 2, tmp_path / "store", tmp_path, env=env, stdout=log, stderr=log, cwd=tmp_path)
            for r in (0, 1)
        ]
    try:
        for process in ranks:
            assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    finally:
        for process in ranks:
            process.kill()
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))

    alone = moments_of(features)
    for name in ("unequal", "empty"):
        for count, mean, covariance in (first[name], second[name]):
            assert count == 60
            np.testing.assert_allclose(mean, alone.mean, rtol=1e-15)
            np.testing.assert_allclose(covariance, alone.covariance, atol=1e-11)
    assert first["error"] == second["error"] == "3 of 6 samples have non-finite features"

    reference = Statistics(torch.zeros(6), torch.eye(6))
    for n in (101, 3):
        single = evaluate_frechet(pattern, n, PixelFeatures((1, 2, 3)), reference, batch=8)
        assert first[f"distance {n}"] == second[f"distance {n}"] == pytest.approx(single.distance, rel=1e-10)
        assert first[f"facts {n}"] == second[f"facts {n}"]
        images, seconds, speed = first[f"facts {n}"]
        assert images == n and speed == pytest.approx(n / seconds)
        # The slowest rank's time, not that of both.
        assert (
            max(first[f"inside {n}"], second[f"inside {n}"]) <= seconds < first[f"inside {n}"] + second[f"inside {n}"]
        )
    # The fourth call for three images is the one whose image is thrown away.
    assert len(first["asked"]) == len(second["asked"]) == 7 + 2
    drawn = [i for start, count in [*first["asked"][:7], *second["asked"][:7]] for i in range(start, start + count)]
    assert sorted(drawn) == list(range(101))
