"""CIFAR-10's archives: both kinds, packed and unpacked, as they were written, and everything else refused."""

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ipfm.engine.data.cifar import is_cifar_folder, read_cifar
from ipfm.engine.data.open_dataset import open_dataset

ROWS = 6  # a batch; 10 000 in the real files


def batch(number: int, rows: int = ROWS) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(number)
    return random.integers(0, 256, (rows, 3072), dtype=np.uint8), random.integers(0, 10, rows).tolist()


# -- writers of the two formats ----------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    """A string as Python 2 pickles it."""
    return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value


def python2_pickle(
    data: np.ndarray, labels: list[int], *, dtype: bytes = b"u1", label: bytes = b"training batch"
) -> bytes:
    """A batch in the order and with the instructions of Python 2's cPickle, protocol 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85q\x08U\x01bq\x09\x87q\x0aRq\x0b"
        b"(K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in data.shape) + b"\x86q\x0c"
        b"cnumpy\ndtype\nq\x0d" + text(dtype) + b"q\x0eK\x00K\x01\x87q\x0fRq\x10"
        b"(K\x03U\x01|q\x11NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x12b\x89"
        + text(data.tobytes())
        + b"q\x13tq\x14b"
    )
    numbers = b"(" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    names = b"(" + b"".join(text(b"picture_%d.png" % i) for i in range(len(labels))) + b"e"
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02" + text(label) + b"q\x03U\x06labelsq\x04]q\x05" + numbers
        + b"U\x04dataq\x15" + array + b"U\x09filenamesq\x16]q\x17" + names + b"u."
    )  # fmt: skip


def binary(data: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, dtype=np.uint8)[:, None], data], axis=1).tobytes()


PYTHON = ("cifar-10-batches-py", "", python2_pickle)
BINARY = ("cifar-10-batches-bin", ".bin", binary)
Kind = tuple[str, str, Callable[..., bytes]]


def files_of(kind: Kind) -> dict[str, bytes]:
    folder, suffix, write = kind
    files = {f"{folder}/data_batch_{i}{suffix}": write(*batch(i)) for i in (4, 1, 5, 3, 2)}
    return {f"{folder}/readme.html": b"<p>", **files, f"{folder}/test_batch{suffix}": write(*batch(9))}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path / next(iter(files)).partition("/")[0]


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PYTHON, BINARY], ids=["python", "binary"])
@pytest.mark.parametrize("place", ["folder", "a.tar.gz", "a.tar"])
def test_the_training_set_in_the_order_of_its_batches(tmp_path, kind, place):
    files = files_of(kind)
    path = write_folder(tmp_path, files) if place == "folder" else write_tar(tmp_path / place, files)
    images, labels = read_cifar(path)
    parts = [batch(i) for i in range(1, 6)]
    expected = np.concatenate([data for data, _ in parts]).reshape(5 * ROWS, 3, 32, 32)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), expected)
    assert labels.tolist() == [n for _, numbers in parts for n in numbers]


@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_the_newest_pickles(tmp_path, order):
    """Protocol 5 stores an array as a bytearray, and the order of its values as a letter."""
    data, labels = batch(1)
    content = pickle.dumps({"data": np.asarray(data, order=order), "labels": labels}, protocol=5)
    assert b"_frombuffer" in content
    files = {f"cifar-10-batches-py/data_batch_{i}": content for i in range(1, 6)}
    images, found = read_cifar(write_folder(tmp_path, files))
    assert np.array_equal(images[:ROWS].flatten(1).numpy(), data) and found[:ROWS].tolist() == labels


def test_cifar_100_is_named(tmp_path):
    rows = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 99], "coarse_labels": [0, 19]}
    python = {f"cifar-100-python/{name}": pickle.dumps(rows, protocol=2) for name in ("meta", "test", "train")}
    names = ("coarse_label_names.txt", "fine_label_names.txt", "test.bin", "train.bin")
    binary100 = {f"cifar-100-binary/{name}": b"x" for name in names}
    named = {f"cifar-10-batches-py/data_batch_{i}": pickle.dumps(rows, protocol=2) for i in range(1, 6)}
    places = [
        write_tar(tmp_path / "cifar-100-python.tar.gz", python),
        write_tar(tmp_path / "cifar-100-binary.tar.gz", binary100),
        write_folder(tmp_path, python),
        write_folder(tmp_path, binary100),
        write_folder(tmp_path, named),
    ]
    for place in places:
        with pytest.raises(ValueError, match="CIFAR-100, which is not read: store its images as files, a folder for"):
            open_dataset(place)


def test_the_dataset(tmp_path):
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", files_of(BINARY))
    data = open_dataset(path, xflip=True)
    assert data.shape == (3, 32, 32) and len(data) == 5 * ROWS and data.classes == 10 and data.xflip
    assert data.name == str(path)
    assert torch.equal(data.take(0, 1)[0], torch.from_numpy(batch(1)[0][0]).reshape(3, 32, 32) / 127.5 - 1)
    plain = open_dataset(path, labels=False, max_images=7, seed=3)
    order = np.arange(5 * ROWS)
    np.random.RandomState(3).shuffle(order)
    assert plain.labels is None and plain.classes is None
    assert torch.equal(plain.images, data.images[np.sort(order[:7])])
    # All ten classes exist, whichever the images have.
    assert open_dataset(path, max_images=1).classes == 10


def test_files_that_were_pickled_anew(tmp_path):
    """Python 3 writes byte strings as text and a call of _codecs.encode; columns may come first in memory."""
    data, labels = batch(1)
    content = pickle.dumps({"data": np.asfortranarray(data), "labels": labels}, protocol=2)
    content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    files = {f"cifar-10-batches-py/data_batch_{i}": content for i in range(1, 6)}
    images, found = read_cifar(write_folder(tmp_path, files))
    assert b"_codecs" in content
    assert np.array_equal(images[ROWS : 2 * ROWS].flatten(1).numpy(), data) and found[:ROWS].tolist() == labels


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_batches_that_numpy_1_or_2_pickled_anew(tmp_path, protocol, module):
    data, labels = batch(1)
    content = pickle.dumps({"data": data, "labels": labels}, protocol=protocol)
    if protocol == 2:
        content = content.replace(b"numpy._core", module.encode())
    files = {f"cifar-10-batches-py/data_batch_{i}": content for i in range(1, 6)}
    images, found = read_cifar(write_folder(tmp_path, files))
    assert np.array_equal(images[:ROWS].flatten(1).numpy(), data) and found[:ROWS].tolist() == labels


def test_the_root_folder_of_torchvision_stands_for_the_folder_or_the_archive_in_it(tmp_path):
    write_folder(tmp_path / "unpacked", files_of(PYTHON))
    (tmp_path / "packed").mkdir()
    write_tar(tmp_path / "packed" / "cifar-10-python.tar.gz", files_of(PYTHON))
    for root in ("unpacked", "packed"):
        assert len(open_dataset(tmp_path / root)) == 5 * ROWS


# -- refusing ----------------------------------------------------------------------------------------------------------


def refused(path: Path, message: str) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        read_cifar(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line


class Touch:
    """Makes a file when it is unpickled as usual."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_pickle_is_run(tmp_path):
    mark = tmp_path / "run"
    content = pickle.dumps({"data": Touch(mark), "labels": []}, protocol=2)
    folder = write_folder(tmp_path, files_of(PYTHON) | {"cifar-10-batches-py/data_batch_2": content})
    line = refused(folder, "not admitted")
    assert "data_batch_2" in line and not mark.exists()
    pickle.loads(content)["data"].close()
    assert mark.exists()


def damaged(change: Callable[[bytes], bytes]) -> bytes:
    return change(python2_pickle(*batch(2)))


DATA, LABELS = batch(2)
PICKLES = {
    "truncated": (damaged(lambda c: c[:-2000]), "truncated"),
    "cut to nothing": (b"", "truncated or damaged"),
    "no pickle": (b"\x89PNG", "not admitted"),
    "rows of another length": (
        python2_pickle(DATA[:, :3071].copy(), LABELS),
        "data must be an array of 3072 bytes a row",
    ),
    "floats": (python2_pickle(DATA, LABELS, dtype=b"f4"), "other things than bytes"),
    "objects": (python2_pickle(DATA, LABELS, dtype=b"O8"), "other things than bytes"),
    "a label too few": (python2_pickle(DATA, LABELS[:-1]), f"labels must be a list of {ROWS} whole numbers"),
    "a label of 10": (python2_pickle(DATA, [10, *LABELS[1:]]), "labels must lie in 0…9, got . to 10"),
    "big pixels": (damaged(lambda c: c.replace(b"U\x01|", b"U\x01>")), "not plain bytes"),
    "a foreign array": (damaged(lambda c: c.replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n")), "of a foreign kind"),
    "fewer bytes": (damaged(lambda c: c.replace(b"M\x06\x00M", b"M\x07\x00M")), "has 18432 bytes"),
    "labels that are no list": (pickle.dumps({"data": 1, "labels": 2}, protocol=2), "data must be an array"),
    "no dictionary": (pickle.dumps([1, 2], protocol=2), "data must be an array"),
    "something after it": (damaged(lambda c: c + b"x"), "follow"),
}


@pytest.mark.parametrize(("content", "message"), PICKLES.values(), ids=PICKLES)
def test_bad_python_batches(tmp_path, content, message):
    folder = write_folder(tmp_path, files_of(PYTHON) | {"cifar-10-batches-py/data_batch_2": content})
    assert "data_batch_2: " in refused(folder, message)


def test_bad_binary_batches(tmp_path):
    name = "cifar-10-batches-bin/data_batch_3.bin"
    folder = write_folder(tmp_path, files_of(BINARY))
    (tmp_path / name).write_bytes(bytes(3073 * 2 - 1))
    assert "data_batch_3.bin: 6145 bytes" in refused(folder, "records of 3073")
    (tmp_path / name).write_bytes(bytes([11]) + bytes(3072))
    assert "data_batch_3.bin: " in refused(folder, "labels must lie in 0…9, got 11 to 11")
    (tmp_path / name).unlink()
    refused(folder, r"data_batch_3.bin is missing; the training set is data_batch_1.bin to data_batch_5.bin")
    assert is_cifar_folder(folder) and not is_cifar_folder(tmp_path)
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "has no data_batch_1 and no data_batch_1.bin")
    refused(write_folder(tmp_path / "empty", dict.fromkeys(files_of(BINARY), b"")), "there are no images")


def test_bad_archives(tmp_path, monkeypatch):
    files = files_of(BINARY)
    first = "cifar-10-batches-bin/data_batch_1.bin"
    refused(write_tar(tmp_path / "other.tar.gz", {"photos/a.png": b"x"}), "is not CIFAR-10's archive")
    moved = {f"../{name}": content for name, content in files.items()}
    refused(write_tar(tmp_path / "up.tar.gz", moved), "is not CIFAR-10's archive")
    part = {name: content for name, content in files.items() if name != first}
    refused(write_tar(tmp_path / "part.tar.gz", part), "data_batch_1.bin is missing")

    whole = write_tar(tmp_path / "whole.tar.gz", files).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(cut, "cannot be read as an archive")
    flipped = tmp_path / "flipped.tar.gz"
    flipped.write_bytes(whole[:3000] + bytes(64) + whole[3064:])
    refused(flipped, "cannot be read as an archive: .*CRC")
    noise = tmp_path / "noise.tar.gz"
    noise.write_bytes(gzip.compress(b"no archive at all" * 100))
    refused(noise, "cannot be read as an archive")

    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo(first)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    refused(tmp_path / "link.tar.gz", "data_batch_1.bin is no plain file")
    with tarfile.open(tmp_path / "twice.tar.gz", "w:gz") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo(first), io.BytesIO())
    refused(tmp_path / "twice.tar.gz", "or there twice")

    good = write_tar(tmp_path / "good.tar.gz", files)
    monkeypatch.setattr("ipfm.engine.data.cifar._MAX_BATCH_BYTES", 3073 * ROWS - 1)
    refused(good, "data_batch_4.bin is larger than")
    monkeypatch.setattr("ipfm.engine.data.cifar._MAX_ARCHIVE_BYTES", 3073 * ROWS)
    refused(good, "larger than 0 GiB unpacked")
