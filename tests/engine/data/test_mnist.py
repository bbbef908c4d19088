"""MNIST as its authors distribute it: packed or not, with its labels or without; what is damaged is named."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.experiments.own_images import has_labels

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def write(folder: Path, *, part: str = "train", end: str = ".gz", labels: bool = True, cut: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = (struct.pack(">IIII", 0x803, *IMAGES.shape) + IMAGES.tobytes())[: -cut or None]
    packed = gzip.compress if end else bytes
    path = folder / f"{part}-images-idx3-ubyte{end}"
    path.write_bytes(packed(images))
    if labels:
        about = struct.pack(">II", 0x801, len(LABELS)) + bytes(LABELS)
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(packed(about))
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_the_file_its_folder_and_the_root_of_torchvision(tmp_path, end):
    file = write(tmp_path / "MNIST" / "raw", end=end)
    for path in (file, file.parent, tmp_path):
        data = open_dataset(path)
        assert np.array_equal(data.images[:, 0].numpy(), IMAGES) and data.labels.tolist() == LABELS
        assert data.shape == (1, 28, 28) and data.classes == 10
    assert open_dataset(file, labels=False).labels is None
    some = open_dataset(file, max_images=5)
    assert len(some) == 5 and some.classes == 10
    assert some.remarks == (f"{file}: 5 of 12 images are kept, drawn at random (seed 0)",)


def test_it_becomes_a_zip_of_another_size(tmp_path, capsys):
    Dataset(source=write(tmp_path / "a"), out=tmp_path / "a.zip", resolution=32).run()
    said = capsys.readouterr().out
    assert "12 images 32x32, grey" in said and "labels: those of train-labels-idx1-ubyte.gz\n10 classes" in said
    data = open_dataset(tmp_path / "a.zip")
    first = np.asarray(Image.fromarray(IMAGES[0]).resize((32, 32), Image.Resampling.LANCZOS))
    assert torch.equal(data.images[0, 0], torch.from_numpy(first.copy())) and data.labels.tolist() == LABELS
    Dataset(source=write(tmp_path / "b", labels=False), out=tmp_path / "b.zip").run()
    assert open_dataset(tmp_path / "b.zip").labels is None


def test_what_is_damaged_is_named(tmp_path):
    def refused(path: Path, said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            open_dataset(path)
        assert str(caught.value).startswith(str(path.parent)) and "\n" not in str(caught.value)

    refused(write(tmp_path / "a", cut=1), "is cut short or damaged: 9,408 bytes are announced, and 9,407 follow")
    path = write(tmp_path / "b")
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "images-idx3-ubyte.gz is damaged: ")
    path = write(tmp_path / "c")
    (path.parent / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 0x801, 1) + b"\1"))
    refused(path, "labels-idx1-ubyte.gz has 1 labels, .* 12 images")
    (path.parent / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"x"))
    refused(path, "labels-idx1-ubyte.gz holds no labels of the format IDX")


def test_a_header_that_promises_too_much_is_refused_before_anything_is_read(tmp_path):
    """What follows a header is read up to what it announces, packed or not."""
    for end, packed in (("", bytes), (".gz", gzip.compress)):
        path = tmp_path / f"train-images-idx3-ubyte{end}"
        path.write_bytes(packed(struct.pack(">IIII", 0x803, 2**32 - 1, 2**32 - 1, 28) + b"x"))
        with pytest.raises(ValueError, match=r"is damaged, or too large: its header announces 516,\S+ bytes$"):
            open_dataset(path)
        path.write_bytes(packed(struct.pack(">IIII", 0x803, 1, 2, 2) + bytes(5)))
        with pytest.raises(ValueError, match="is cut short or damaged: 4 bytes are announced, and more follow"):
            open_dataset(path)
        path.write_bytes(packed(struct.pack(">IIII", 0x803, 0, 28, 28)))
        with pytest.raises(ValueError, match="holds no images of the format IDX"):
            open_dataset(path)


def test_labels_or_other_numbers_given_as_images_are_told(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz holds labels, not images of bytes"):
        open_dataset(path.with_name("train-labels-idx1-ubyte.gz"))
    floats = tmp_path / "floats"
    floats.write_bytes(struct.pack(">IIII", 0xD03, 1, 1, 1) + bytes(4))
    with pytest.raises(ValueError, match=r"numbers of another kind \(header 00 00 0d 03\)"):
        open_dataset(floats)


def test_a_folder_with_both_parts_gives_the_training_images_and_says_so(tmp_path, capsys):
    write(tmp_path)
    test = write(tmp_path, part="t10k", labels=False)
    said = "the 12 images of train-images-idx3-ubyte.gz are taken, not t10k-images-idx3-ubyte.gz"
    assert open_dataset(tmp_path).remarks == (f"{tmp_path}: {said}",) and said in capsys.readouterr().err
    for split in ("t10k", "test"):
        data = open_dataset(tmp_path, split=split)
        assert data.labels is None
        assert data.remarks == (f"{test}: no labels, for t10k-labels-idx1-ubyte.gz is not beside it",)
    assert open_dataset(tmp_path, split="train").remarks == ()
    with pytest.raises(ValueError, match="has no part validation: it has test and train"):
        open_dataset(tmp_path, split="validation")
    with pytest.raises(ValueError, match=r"split test was given, but .* is one file: give the folder"):
        open_dataset(test, split="test")
    Dataset(source=tmp_path, out=tmp_path / "a.zip", split="t10k").run()
    assert "labels: none" in capsys.readouterr().out
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    assert len(open_dataset(tmp_path)) == 12  # the test images, where these are alone
    with pytest.raises(ValueError, match="holds images, and no parts that have names: split test was given"):
        open_dataset(tmp_path / "a.zip", split="test")


def test_emnist_stands_upright_and_its_letters_begin_at_0(tmp_path):
    path = write(tmp_path, part="emnist-letters-train")
    write(tmp_path, part="emnist-letters-test")
    data = open_dataset(tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), IMAGES.transpose(0, 2, 1))
    assert data.labels.tolist() == [label - 1 for label in LABELS] and data.classes == 9
    turned = "rows and columns are exchanged, as EMNIST stores its images lying on their side"
    assert data.remarks[1] == f"{path}: {turned}; its letters' classes 1 to 26 are 0 to 25 here"
    assert open_dataset(path).remarks == data.remarks[1:]
    digits = write(tmp_path, part="emnist-digits-train")
    assert open_dataset(digits).labels.tolist() == LABELS
    with pytest.raises(ValueError, match=r"holds 2 sets: give the file .*, of emnist-digits-.*, emnist-letters-"):
        open_dataset(tmp_path)


def test_a_root_of_torchvision_with_two_sets_is_not_taken_by_chance(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        write(tmp_path / name / "raw")
    with pytest.raises(ValueError, match=r"holds 2 sets: .* MNIST/raw/train-images-idx3-ubyte.gz, FashionMNIST/raw"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / "MNIST")) == 12


def test_names_with_dots_in_capitals_and_of_which_one_file_alone_is_packed(tmp_path):
    path = write(tmp_path / "a", end="")
    path.rename(path.with_name("train-images.idx3-ubyte"))
    (path.parent / "train-labels-idx1-ubyte").rename(path.parent / "train-labels.idx1-ubyte")
    assert open_dataset(path.parent).labels.tolist() == LABELS
    path = write(tmp_path / "b")
    labels = path.parent / "train-labels-idx1-ubyte.gz"
    (path.parent / "train-labels-idx1-ubyte").write_bytes(gzip.decompress(labels.read_bytes()))
    labels.unlink()
    assert open_dataset(path.parent).labels.tolist() == LABELS
    assert has_labels(path.parent) and not has_labels(write(tmp_path / "c", labels=False))
