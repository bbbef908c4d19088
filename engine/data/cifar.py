"""CIFAR-10 as its authors distribute it: the Python and the binary archive, packed or unpacked.

    cifar-10-python.tar.gz  cifar-10-batches-py/data_batch_1 … 5       a pickled dictionary each: data, labels
    cifar-10-binary.tar.gz  cifar-10-batches-bin/data_batch_1.bin … 5  records of one label and 3072 pixels

An image is 32x32, stored plane by plane: red, green, blue. The training set is the five batches in their order, 50 000
images. The pickles, written by Python 2, are read without running anything from them.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.image_files import printable
from ipfm.models.checkpoints.unpickler import Inert, Limits, Table, read_pickle

CLASSES = 10
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
CIFAR_100 = "CIFAR-100, which is not read: store its images as files, a folder for each class, and give their folder"
"""For messages."""
_PIXELS = 3 * 32 * 32
_MAX_BATCH_BYTES = 1 << 26
_MAX_ARCHIVE_BYTES = 1 << 30


class Cifar(NamedTuple):
    """`images` (N, 3, 32, 32) uint8, `labels` (N,) int64 from 0 to 9."""

    images: Tensor
    labels: Tensor


def is_cifar_folder(path: Path) -> bool:
    """Whether `path` is a folder with the batches, or some of them."""
    return any((path / name).is_file() for kind in _KINDS for name in kind.batches)


def is_cifar100(names: Iterable[str]) -> bool:
    """Whether these are the files, or the folders, of CIFAR-100: its training set is one file, train or train.bin."""
    last = {name.rpartition("/")[2] for name in names}
    return {"train", "test", "meta"} <= last or {"train.bin", "test.bin", "fine_label_names.txt"} <= last


def cifar_place(path: Path) -> Path:
    """Where the training set lies: `path`, or in torchvision's root folder, which is given in its place."""
    if path.is_dir() and not is_cifar_folder(path):
        for name in (*(kind.folder for kind in _KINDS), *_ARCHIVES):
            if is_cifar_folder(path / name) or (name in _ARCHIVES and (path / name).is_file()):
                return path / name
    return path


def read_cifar(path: Path) -> Cifar:
    """The training set in `path`, an archive (.tar, .tar.gz) or the folder that is in it.

    Raises:
        ValueError: one line that names the file: no such archive, a batch is missing, damaged, or holds anything else
            than images of 3072 bytes with labels from 0 to 9.
    """
    path = cifar_place(path)
    kind, contents = _from_folder(path) if path.is_dir() else _from_archive(path)
    parts = []
    for name in kind.batches:
        if name not in contents:
            raise ValueError(f"{path}: {name} is missing; the training set is {kind.batches[0]} to {kind.batches[-1]}")
        where = str(path / name) if path.is_dir() else f"{path}: {kind.folder}/{name}"
        images, labels = kind.parse(contents[name], where)
        if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
            raise ValueError(f"{where}: labels must lie in 0…9, got {labels.min()} to {labels.max()}")
        parts.append((images, labels))
    pixels = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    if not len(pixels):
        raise ValueError(f"{path}: there are no images in {kind.batches[0]} to {kind.batches[-1]}")
    return Cifar(torch.from_numpy(pixels), torch.from_numpy(np.concatenate([labels for _, labels in parts])))


class _Kind(NamedTuple):
    folder: str
    batches: tuple[str, ...]
    parse: Callable[[bytes, str], tuple[np.ndarray, np.ndarray]]


# ------------------------------------------------------------------------------------------------- where the bytes are


def _from_folder(path: Path) -> tuple[_Kind, dict[str, bytes]]:
    kind = next((kind for kind in _KINDS if any((path / name).is_file() for name in kind.batches)), None)
    if kind is None:
        raise ValueError(f"{path} has no {' and no '.join(kind.batches[0] for kind in _KINDS)}")
    contents = {}
    for name in kind.batches:
        if not (path / name).is_file():
            continue
        try:
            with open(path / name, "rb") as file:
                contents[name] = _bounded(file.read(_MAX_BATCH_BYTES + 1), str(path / name))
        except OSError as error:
            raise ValueError(f"{path / name}: {error.strerror}") from None
    return kind, contents


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > _MAX_BATCH_BYTES:
        raise ValueError(f"{where} is larger than {_MAX_BATCH_BYTES >> 20} MiB")
    return data


def _unpacked(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else open(path, "rb")


def _from_archive(path: Path) -> tuple[_Kind, dict[str, bytes]]:
    """The batches in an archive, found by their full names: no name of a member is ever used as a path."""
    wanted = {f"{kind.folder}/{name}": (kind, name) for kind in _KINDS for name in kind.batches}
    found: dict[str, dict[str, bytes]] = {kind.folder: {} for kind in _KINDS}
    others: list[str] = []
    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                # What follows has to be unpacked to get past it.
                if member.offset_data + member.size > _MAX_ARCHIVE_BYTES:
                    raise ValueError(f"{path} is larger than {_MAX_ARCHIVE_BYTES >> 30} GiB unpacked")
                others.append(member.name)
                kind, name = wanted.get(member.name.removeprefix("./"), (None, ""))
                if kind is None:
                    continue
                where = f"{path}: {kind.folder}/{name}"
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or name in found[kind.folder]:
                    raise ValueError(f"{where} is no plain file, or there twice")
                found[kind.folder][name] = _bounded(content.read(_MAX_BATCH_BYTES + 1), where)
            # gzip's checksum is at its end, behind the end of the archive.
            for _ in range(_MAX_ARCHIVE_BYTES >> 20):
                if not stream.read(1 << 20):
                    break
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an archive: {printable(str(error))}") from None
    for kind in _KINDS:
        if found[kind.folder]:
            return kind, found[kind.folder]
    if is_cifar100(others):
        raise ValueError(f"{path} is {CIFAR_100}")
    raise ValueError(
        f"{path} is not CIFAR-10's archive: it has no {' or '.join(f'{k.folder}/' for k in _KINDS)}; "
        "of any other archive unpack the images and give their folder"
    )


# ------------------------------------------------------------------------------------------------------ binary batches


def _parse_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    records = len(data) // (1 + _PIXELS)
    if records * (1 + _PIXELS) != len(data):
        raise ValueError(f"{where}: {len(data)} bytes are no whole number of records of {1 + _PIXELS}")
    table = np.frombuffer(data, dtype=np.uint8).reshape(records, 1 + _PIXELS)
    return table[:, 1:], table[:, 0].astype(np.int64)


# ------------------------------------------------------------------------------------------------------ Python batches


class _Dtype(Inert):
    """numpy.dtype("u1")."""

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) < 8 or state[1] not in (b"|", "|") or any(state[2:5]):
            raise ValueError("the pixels are not plain bytes")


class _Array(Inert):
    """A NumPy array of bytes; empty until its state is set."""

    def __init__(self) -> None:
        self.values: np.ndarray = np.empty((0, 0), dtype=np.uint8)

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array is damaged")
        _, shape, dtype, fortran, content = state
        if type(shape) is not tuple or len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array has other than two dimensions")
        if (
            not isinstance(dtype, _Dtype)
            or type(fortran) is not bool
            or not isinstance(content, (bytes, bytearray, memoryview))
        ):
            raise ValueError("an array holds other things than bytes")
        if len(content) != prod(shape):
            raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
        self.values = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind != _NDARRAY:
        raise ValueError("an array is of a foreign kind")
    return _Array()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _Array:
    # An array of pickle's protocol 5.
    if order not in ("C", "F"):
        raise ValueError("an array is damaged")
    array = _Array()
    array.set_state((1, shape, dtype, order == "F", content))
    return array


def _dtype(code: object, align: object, copy: object) -> _Dtype:
    if code not in (b"u1", "u1"):
        raise ValueError("an array holds other things than bytes")
    return _Dtype()


def _encode(text: object, encoding: object) -> bytes:
    # How Python 3 writes byte strings for Python 2.
    if type(text) is not str or encoding not in (b"latin1", "latin1"):
        raise ValueError("a byte string is damaged")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise ValueError("a byte string is damaged") from None


_NDARRAY = "numpy.ndarray"
_GLOBALS: Table = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


def _parse_python(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    limits = Limits(text=_MAX_BATCH_BYTES)
    root = read_pickle(data, _GLOBALS, where=where, encoding="bytes", limits=limits)
    fields = {_text(key): value for key, value in root.items()} if isinstance(root, dict) else {}
    array, labels = fields.get("data"), fields.get("labels")
    if labels is None and "fine_labels" in fields:
        raise ValueError(f"{where} is of {CIFAR_100}")
    if not isinstance(array, _Array) or array.values.shape[1] != _PIXELS:
        raise ValueError(f"{where}: data must be an array of {_PIXELS} bytes a row")
    rows = len(array.values)
    if not isinstance(labels, list) or len(labels) != rows or not all(type(label) is int for label in labels):
        raise ValueError(f"{where}: labels must be a list of {rows} whole numbers, one for each row of data")
    if not all(0 <= label < CLASSES for label in labels):
        raise ValueError(f"{where}: labels must lie in 0…9, got {min(labels)} to {max(labels)}")
    return array.values, np.array(labels, dtype=np.int64)


def _text(key: object) -> object:
    return key.decode("latin1") if isinstance(key, bytes) else key


_KINDS = (
    _Kind("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), _parse_python),
    _Kind("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), _parse_binary),
)
