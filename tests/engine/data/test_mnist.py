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

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def write(folder: Path, *, end: str = ".gz", labels: bool = True, cut: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = (struct.pack(">IIII", 0x803, *IMAGES.shape) + IMAGES.tobytes())[: -cut or None]
    packed = gzip.compress if end else bytes
    path = folder / f"train-images-idx3-ubyte{end}"
    path.write_bytes(packed(images))
    if labels:
        about = struct.pack(">II", 0x801, len(LABELS)) + bytes(LABELS)
        (folder / f"train-labels-idx1-ubyte{end}").write_bytes(packed(about))
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
    assert "12 images 32x32, grey" in said and "labels: MNIST's\n10 classes" in said
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
