"""Classes drawn as often as a data set has them, of which a distillation needs the labels alone."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from ipfm.engine.data.class_counts import class_counts
from ipfm.engine.random_streams import class_shares, draw_labels


def written(place: Path, labels: object) -> Path:
    place.write_text(json.dumps({"labels": labels}))
    return place


def listed(*classes: object) -> list[list[object]]:
    return [[f"00000/img-mean-std-{i:08d}.npy", one] for i, one in enumerate(classes)]


def test_counts_of_a_file_a_zip_and_a_folder_without_an_image(tmp_path):
    expected = (2, 0, 1, 0)
    path = written(tmp_path / "dataset.json", listed(0, 2, 0))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(path, "dataset.json")
    for place in (path, tmp_path / "x.zip", tmp_path):
        assert class_counts(place, 4) == expected


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "has none"),
        ([], "has none"),
        (listed([1.0, 0.0]), "labels that are vectors"),
        (listed(0, 9), "has the class 9, the teacher knows 0 to 3"),
        (listed("dog"), "must be a whole number"),
        ("all", "must be a list of pairs"),
    ],
    ids=["null", "empty", "vectors", "unknown", "text", "other"],
)
def test_labels_that_are_refused(tmp_path, labels, words):
    with pytest.raises(ValueError, match=words) as error:
        class_counts(written(tmp_path / "labels.json", labels), 4)
    assert "\n" not in str(error.value)


def test_classes_are_drawn_as_often_and_by_position_alone():
    counts = (3, 0, 6, 1)
    shares, index = class_shares(counts, 4), torch.arange(20_000)
    drawn = draw_labels(4, index, seed=1, stream=3, step=5, shares=shares)
    assert drawn.sum(1).eq(1).all()
    assert torch.allclose(drawn.mean(0), torch.tensor(counts) / 10, atol=0.01)
    assert drawn[:, 1].sum() == 0
    part = draw_labels(4, index[777:900], seed=1, stream=3, step=5, shares=shares)
    assert torch.equal(part, drawn[777:900])


def test_equal_counts_are_uniform():
    index = torch.arange(4096)
    plain = draw_labels(8, index, seed=2, stream=3, step=0)
    assert torch.equal(draw_labels(8, index, seed=2, stream=3, step=0, shares=class_shares((5,) * 8, 8)), plain)


@pytest.mark.parametrize("counts", [(1, 2), (0, 0, 0), (1, -1, 3)], ids=["too few", "nothing", "negative"])
def test_counts_that_cannot_be(counts):
    with pytest.raises(ValueError, match="class_counts must be"):
        class_shares(counts, 3)
    assert class_shares((), 3) is None
