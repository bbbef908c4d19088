"""Inception features from a file: the call, the pixels it gets, and files that are something else."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path

import pytest
import tiny_inception
import torch

from ipfm.engine.distributed.precision import allow_tf32
from ipfm.engine.evaluation.metrics import Features, InceptionFeatures, PixelFeatures
from ipfm.engine.evaluation.metrics.features import Classifier


def images(count: int, channels: int = 3, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_inception.write(tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt")


def test_the_network_sees_the_pixels_of_files(path: Path) -> None:
    """clip(127.5 x + 128, 0, 255), truncated: what a PNG of the image would hold."""
    net, features = tiny_inception.TinyInception(), InceptionFeatures(path)
    assert (features.name, features.dim, features.classes) == ("inception", tiny_inception.DIM, tiny_inception.CLASSES)
    x = images(5)
    x[0, 0, 0, :4] = torch.tensor([-3.0, 7.0, 1.0, -1.0])
    pixels = (x.double() * 127.5 + 128).clamp(0, 255).floor().to(torch.uint8)
    assert torch.equal(features(x), net(pixels, return_features=True))
    assert torch.equal(features.probabilities(x), net(pixels, no_output_bias=True))
    assert not torch.allclose(features.probabilities(x), net(pixels))  # the bias would show


def test_stored_images_come_back_as_they_were(path: Path) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    x = levels.float() / 127.5 - 1
    assert torch.equal(InceptionFeatures(path)(x), tiny_inception.TinyInception()(levels, return_features=True))


@pytest.mark.parametrize("side", [7, 33])
def test_grey_counts_as_three_equal_channels_at_any_size(path: Path, side: int) -> None:
    features, grey = InceptionFeatures(path), images(3, 1, side)
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))
    assert features(grey.double()).dtype == torch.float32


def test_an_image_that_no_file_can_hold_has_no_features(path: Path) -> None:
    features, x = InceptionFeatures(path), images(4)
    x[1, 2, 3, 4] = math.nan
    x[2, 0, 0, 0] = math.inf
    finite = torch.isfinite(features(x)).all(dim=1)
    assert finite.tolist() == [True, False, False, True]
    assert torch.isfinite(features.probabilities(x)).all(dim=1).tolist() == [True, False, False, True]


def test_logits_become_probabilities(path: Path, tmp_path: Path) -> None:
    raw = InceptionFeatures(tiny_inception.write(tmp_path / "raw.pt", tiny_inception.TinyInception(normalised=False)))
    torch.testing.assert_close(raw.probabilities(images(6)), InceptionFeatures(path).probabilities(images(6)))


@pytest.mark.parametrize("allowed", [True, False])
def test_features_do_not_depend_on_what_a_run_allows(
    path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    features, seen = InceptionFeatures(path), []

    def settings() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def net(pixels: torch.Tensor, return_features: bool) -> torch.Tensor:
        seen.append(settings())
        return torch.zeros(len(pixels), 4)

    monkeypatch.setattr(features, "_net", net)
    before = settings()
    try:
        allow_tf32(allowed)
        features(images(2))
        assert seen == [(False, False)]
        assert settings() == (allowed, allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_network_without_classes_gives_features_still(tmp_path: Path) -> None:
    features = InceptionFeatures(tiny_inception.write(tmp_path / "a.pt", tiny_inception.WithoutClasses()))
    assert (features.dim, features.classes) == (3, 0)
    assert features(images(2)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"a.pt gives no class probabilities"):
        features.probabilities(images(2))


def test_files_that_are_something_else_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "noise.pt").write_bytes(b"no network at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    tiny_inception.write(tmp_path / "half.pt")
    os.truncate(tmp_path / "half.pt", 4096)
    tiny_inception.write(tmp_path / "call.pt", tiny_inception.WithoutFeatures())
    tiny_inception.write(tmp_path / "flat.pt", tiny_inception.FlatFeatures())
    for name, message in (
        ("missing.pt", "does not exist"),
        (".", "no file"),
        ("net.pkl", "is a pickled network, which runs code of its own"),
        ("noise.pt", "is no TorchScript network"),
        ("empty.pt", "is no TorchScript network"),
        ("weights.pt", "is no TorchScript network: it is a checkpoint of torch.save; "),
        ("half.pt", "is no TorchScript network: it is a damaged zip, as after a download that was interrupted"),
        ("call.pt", r"does not take images as net\(images, return_features=True\)"),
        ("flat.pt", r"gives no features \(B, dim\) of 2 images, but torch.float32 \(\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            InceptionFeatures(tmp_path / name)
        text = str(caught.value)
        assert "\n" not in text and str(tmp_path / name) in text
        assert "StyleGAN2-ADA" in text or name == "flat.pt"


def test_images_of_another_shape_are_refused(path: Path) -> None:
    features = InceptionFeatures(path)
    for bad in (images(2, 4), images(2)[0]):
        with pytest.raises(ValueError, match=r"images must have shape \(B, 1 or 3, H, W\)"):
            features(bad)


def test_kinds_of_features(path: Path) -> None:
    pixels: Features = PixelFeatures((1, 4, 5))
    assert (pixels.name, pixels.dim) == ("pixels", 20)
    assert not isinstance(pixels, Classifier) and isinstance(InceptionFeatures(path), Classifier)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\)"):
        PixelFeatures((0, 4, 5))
