"""A classifier of the set's own classes: trained alike from a seed, kept in a file, and never taken for another one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import idx_files
import numpy as np
import pytest
import torch

from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.classifier_training import FILE, check_classes, kept_classifier, train_classifier
from ipfm.engine.evaluation.metrics import evaluate_images
from ipfm.engine.evaluation.metrics.classifier import ClassifierFeatures, load_classifier, save_classifier
from ipfm.engine.evaluation.reference_data import open_reference
from ipfm.engine.runtime.commandline import BadInput

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageDataset, ImageDataset]:
    folder = idx_files.write_idx(tmp_path_factory.mktemp("set"), train=300, test=60)
    return open_dataset(folder, split="train"), open_dataset(folder, split="test")


@pytest.fixture(scope="module")
def features(parts: tuple[ImageDataset, ImageDataset]) -> ClassifierFeatures:
    return train_classifier(*parts, ALONE, epochs=8)


def test_it_learns_and_says_how_well(features: ClassifierFeatures) -> None:
    assert features.facts.accuracy > 0.9 and features.facts.held_out == 60
    said = features.described()
    assert said.startswith(f"{features.name}: ") and "trained on 300 of 10 classes, seed 0" in said


def test_a_seed_gives_one_classifier_and_another_seed_another(
    parts: tuple[ImageDataset, ImageDataset], features: ClassifierFeatures
) -> None:
    before = torch.get_rng_state()
    one, other = (train_classifier(*parts, ALONE, epochs=1, seed=seed) for seed in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.name == train_classifier(*parts, ALONE, epochs=1).name
    assert len({one.name, other.name, features.name}) == 3


def test_its_file_gives_the_same_features(
    tmp_path: Path, parts: tuple[ImageDataset, ImageDataset], features: ClassifierFeatures
) -> None:
    save_classifier(tmp_path / "c.safetensors", features)
    again, images = load_classifier(tmp_path / "c.safetensors"), parts[1].take(0, 5)
    assert (again.name, again.facts) == (features.name, features.facts)
    assert torch.equal(again(images), features(images)) and again(images).shape == (5, features.dim)
    # What a file would hold of them is compared: less than half a grey level is nothing.
    assert torch.equal(features(images + 0.4 / 127.5), features(images))
    images[1, 0, 0, 0] = math.nan
    assert torch.isfinite(features(images)).all(dim=1).tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match=r"shape \(B, 1, 28, 28\), got \(2, 3, 28, 28\)"):
        features(torch.zeros(2, 3, 28, 28))


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "another network"])
def test_a_file_that_is_none_is_named(tmp_path: Path, features: ClassifierFeatures, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    save_classifier(path, features)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no network at all")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(path.read_bytes().replace(b"ipfm-classifier-1", b"ipfm-classifier-2"))
    with pytest.raises(ValueError, match="does not exist" if damage == "missing" else "no classifier that can") as told:
        load_classifier(path)
    assert str(told.value).startswith(str(path)) and "\n" not in str(told.value)


def test_images_without_classes_are_told_before_anything_is_trained(parts: tuple[ImageDataset, ImageDataset]) -> None:
    plain = replace(parts[0], labels=None, classes=None)
    with pytest.raises(
        ValueError, match=r"has no classes, which a classifier would learn: --features pixels or blocks"
    ):
        check_classes(plain)
    small = ImageDataset(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="images of less than 8 pixels a side"):
        check_classes(small)
    with pytest.raises(ValueError, match="images of other shapes or classes"):
        train_classifier(parts[0], plain, ALONE)


def test_runs_beside_each_other_share_one_and_each_keeps_its_own(
    tmp_path: Path, parts: tuple[ImageDataset, ImageDataset], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for run in "abc":
        (tmp_path / run).mkdir()
    first = kept_classifier(tmp_path / "a", *parts, ALONE)
    assert f"compared by {first.name}: " in capsys.readouterr().err
    monkeypatch.setattr("ipfm.engine.evaluation.classifier_training.train_classifier", None)  # once is enough
    assert kept_classifier(tmp_path / "b", *parts, ALONE).name == first.name
    (shared,) = tmp_path.glob("classifier-1x28x28-*.safetensors")
    shared.unlink()
    assert kept_classifier(tmp_path / "b", *parts, ALONE).name == first.name  # its own
    given = tmp_path / "a" / FILE
    assert kept_classifier(tmp_path / "c", *parts, ALONE, file=given).name == first.name
    assert (tmp_path / "c" / FILE).read_bytes() == given.read_bytes() and not shared.exists()
    other = replace(parts[0], images=torch.zeros(300, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="is a classifier of images 1x28x28, these are 3x28x28"):
        kept_classifier(tmp_path / "c", other, parts[1], ALONE)


def test_statistics_of_another_classifier_are_refused(
    tmp_path: Path, parts: tuple[ImageDataset, ImageDataset], features: ClassifierFeatures,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As many features of another network would pass for them, and give a number that means nothing."""
    save_classifier(tmp_path / "one.safetensors", features)
    save_classifier(tmp_path / "two.safetensors", train_classifier(*parts, ALONE, epochs=1))
    folder, kept = Path(parts[0].name), tmp_path / "kept.npz"

    def evaluate(classifier: str, reference: Path, **more: object) -> str:
        found = Evaluate(model=folder, reference=reference, features="classifier", json=True,
                         classifier=tmp_path / classifier, images=20, **more)  # fmt: skip
        found.run()
        return capsys.readouterr().out

    assert f'"features_name": "{features.name}"' in evaluate("one.safetensors", folder, save_reference=kept)
    assert open_reference(kept).features == features.name
    evaluate("one.safetensors", kept)
    with pytest.raises(BadInput, match=rf"holds statistics of the features {features.name}, not of classifier \w+"):
        evaluate("two.safetensors", kept)
    with np.load(kept) as found:
        np.savez(tmp_path / "bare.npz", mu=found["mu"], sigma=found["sigma"])
    with pytest.raises(BadInput, match=r"bare\.npz does not say that its statistics are of classifier"):
        evaluate("one.safetensors", tmp_path / "bare.npz")
    for options, said in (
        ({"features": "classifier"}, "features classifier needs --classifier FILE"),
        ({"features": "pixels", "classifier": tmp_path / "one.safetensors"}, "but features is pixels"),
    ):
        with pytest.raises(BadInput, match=said):
            Evaluate(model=folder, reference=folder, **options).run()


def test_the_inception_score_is_not_measured_by_it(features: ClassifierFeatures) -> None:
    with pytest.raises(ValueError, match="needs class probabilities"):
        evaluate_images(lambda *_: torch.zeros(2), 20, features, None, batch=4, metrics=("is",))
