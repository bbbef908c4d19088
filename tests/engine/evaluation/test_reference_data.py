"""Reference files: EDM's statistics, ADM's batches, data sets, and everything that is none of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_inception
import torch

from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.metrics import InceptionFeatures, PixelFeatures, Statistics, frechet_distance
from ipfm.engine.evaluation.reference_data import make_reference, open_images, open_reference, save_statistics

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def pixels(count: int = 30, channels: int = 3, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def covariance(dim: int, seed: int = 0) -> np.ndarray:
    return np.cov(np.random.default_rng(seed).normal(size=(3 * dim, dim)), rowvar=False)


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_statistics_in_edms_format(tmp_path: Path) -> None:
    mu, sigma = np.arange(5.0), covariance(5)
    found = open_reference(write(tmp_path / "cifar10-32x32.npz", mu=mu, sigma=sigma.astype(np.float32)))
    assert found.images is None and found.statistics is not None
    assert found.statistics.mean.dtype == found.statistics.covariance.dtype == torch.float64
    np.testing.assert_array_equal(found.statistics.mean, mu)
    np.testing.assert_array_equal(found.statistics.covariance, sigma.astype(np.float32))
    reference = make_reference(found, PixelFeatures((5, 1, 1)), ALONE)
    assert reference.features is None and reference.statistics is found.statistics


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    statistics = Statistics(torch.randn(4, dtype=torch.float64), torch.from_numpy(covariance(4)))
    save_statistics(tmp_path / "deeper" / "a.npz", statistics)
    with np.load(tmp_path / "deeper" / "a.npz") as stored:
        assert sorted(stored.files) == ["mu", "sigma"]
        assert stored["mu"].dtype == stored["sigma"].dtype == np.float64
    found = open_reference(tmp_path / "deeper" / "a.npz").statistics
    assert found is not None
    assert torch.equal(found.mean, statistics.mean) and torch.equal(found.covariance, statistics.covariance)
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == ["a.npz"]


@pytest.mark.parametrize("name", ["arr_0", "images"])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_images(tmp_path: Path, name: str, channels: int) -> None:
    array = pixels(channels=channels)
    found = open_reference(write(tmp_path / "a.npz", **{name: array}))
    assert found.statistics is None and found.images is not None
    assert found.images.shape == (channels, 6, 6)
    np.testing.assert_array_equal(found.images.images, array.transpose(0, 3, 1, 2))
    features = InceptionFeatures(tiny_inception.write(tmp_path / "net.pt"))
    reference = make_reference(found, features, ALONE, keep_features=True, batch=7)
    truth = features(torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1).double()
    assert reference.features is not None
    # Batches of another size are summed in another order.
    torch.testing.assert_close(reference.features.double(), truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reference.statistics.mean, truth.mean(0), rtol=1e-5)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(truth.numpy(), rowvar=False), atol=1e-6)
    assert frechet_distance(reference.statistics, make_reference(found, features, ALONE).statistics) < 1e-6


def test_a_batch_of_adm_brings_statistics_and_images(tmp_path: Path) -> None:
    """The statistics are of more images than those in the file: they stand, the images serve KID and PR."""
    dim = tiny_inception.DIM
    found = open_reference(write(tmp_path / "a.npz", arr_0=pixels(), mu=np.arange(float(dim)), sigma=covariance(dim)))
    features = InceptionFeatures(tiny_inception.write(tmp_path / "net.pt"))
    for keep in (False, True):
        reference = make_reference(found, features, ALONE, keep_features=keep)
        np.testing.assert_array_equal(reference.statistics.mean, np.arange(dim))
        assert (reference.features is not None) == keep
    assert reference.features is not None and reference.features.shape == (30, dim)


def test_images_that_do_not_fit_the_features_name_the_file(tmp_path: Path) -> None:
    file = open_reference(write(tmp_path / "a.npz", arr_0=pixels()))
    with pytest.raises(ValueError, match=r"a.npz: images must have shape \(B, 3, 8, 8\), got \(30, 3, 6, 6\)"):
        make_reference(file, PixelFeatures((3, 8, 8)), ALONE)
    with pytest.raises(ValueError, match=r"b.npz: needs at least 2 images"):
        make_reference(open_reference(write(tmp_path / "b.npz", arr_0=pixels(1))), PixelFeatures((3, 6, 6)), ALONE)


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is no file"),
    "noise": (lambda path: path.write_bytes(b"no archive"), "is no readable .npz"),
    "empty": (lambda path: path.write_bytes(b""), "is no readable .npz"),
    "cut": (lambda path: path.write_bytes(write(path, **GOOD).read_bytes()[:-40]), "is no readable .npz"),
    "single array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "it is a single array"),
    "objects": (lambda path: write(path, mu=np.array([{}]), sigma=np.eye(3)), "is no readable .npz"),
    "neither": (lambda path: write(path, other=np.zeros(3)), "holds neither statistics .* nor images"),
    "half": (lambda path: write(path, mu=np.zeros(3)), "lacks sigma"),
    "other half": (lambda path: write(path, sigma=np.eye(3)), "lacks mu"),
    "text": (lambda path: write(path, mu=np.array(["a"]), sigma=np.eye(1)), "mu must hold numbers, got <U1"),
    "shape": (lambda path: write(path, mu=np.zeros(4), sigma=np.eye(3)), r"stored statistics .* \(4,\) and \(3, 3\)"),
    "nan": (lambda path: write(path, mu=np.full(3, math.nan), sigma=np.eye(3)), "stored statistics have non-finite"),
    "skew": (lambda path: write(path, mu=np.zeros(2), sigma=np.triu(np.ones((2, 2)))), "covariance is not symmetric"),
    "negative": (lambda path: write(path, mu=np.zeros(2), sigma=-np.eye(2)), "not positive semidefinite"),
    "float images": (lambda path: write(path, arr_0=np.zeros((2, 4, 4, 3))), r"uint8, got float64 \(2, 4, 4, 3\)"),
    "channels first": (lambda path: write(path, arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"got uint8 \(2, 3, 4, 4\)"),
    "no images": (lambda path: write(path, arr_0=np.zeros((0, 4, 4, 3), np.uint8)), r"got uint8 \(0, 4, 4, 3\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_none_of_these_are_named_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "stats.npz"
    prepare, message = BAD[case]
    prepare(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_reference(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_images_alone_are_asked_for(tmp_path: Path) -> None:
    assert len(open_images(write(tmp_path / "a.npz", arr_0=pixels()))) == 30
    with pytest.raises(ValueError, match=r"b.npz holds no images"):
        open_images(write(tmp_path / "b.npz", **GOOD))
