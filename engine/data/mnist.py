"""MNIST, and the sets that share its format, as their authors distribute them: files of the kind IDX.

    train-images-idx3-ubyte(.gz)   00 00 08 03, three 32-bit numbers (images, rows, columns), the pixels
    train-labels-idx1-ubyte(.gz)   00 00 08 01, their number, a byte each: the class

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits"; Fashion-MNIST, KMNIST and EMNIST likewise.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.image_files import printable

_IMAGES, _LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"
_TRAINING = "train-images-idx3-ubyte"
_FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw")
_MAX_BYTES = 1 << 31


class Mnist(NamedTuple):
    """`images` (N, 1, H, W) uint8, `labels` (N,) int64 from 0, or None where their file is missing."""

    images: Tensor
    labels: Tensor | None


def mnist_file(path: Path) -> Path | None:
    """The file with the images: `path`, or the training images in a folder, such as torchvision's root; else None."""
    if path.is_dir():
        files = (path / place / f"{_TRAINING}{end}" for place in _FOLDERS for end in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)
    return path if path.is_file() and _begins(path, _IMAGES) else None


def read_mnist(path: Path) -> Mnist:
    """The images of a file, with the labels beside them.

    Args:
        path: from `mnist_file`.

    Raises:
        ValueError: one line that names the file: damaged, cut short, or labels of another number.
    """
    images = _array(path, _IMAGES, 3)
    beside = _labels_of(path)
    labels = None if beside is None else _array(beside, _LABELS, 1)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{beside} has {len(labels)} labels, {path} {len(images)} images")
    return Mnist(
        torch.from_numpy(images)[:, None], None if labels is None else torch.from_numpy(labels.astype(np.int64))
    )


def _labels_of(images: Path) -> Path | None:
    for one, other in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1")):
        name = images.name.removesuffix(".gz").replace(one, other)
        found = [images.with_name(name + end) for end in ("", ".gz")]
        if one in images.name and (there := next((path for path in found if path.is_file()), None)):
            return there
    return None


def _begins(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as unpacked:
                start = unpacked.read(4)
        except (OSError, EOFError, zlib.error):
            return False
    return start == magic


def _array(path: Path, magic: bytes, axes: int) -> np.ndarray:
    """The array of an IDX file of bytes.

    Raises:
        ValueError: it is none, or damaged.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {printable(str(error))}") from None
    head = 4 + 4 * axes
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    if data[:4] != magic or len(data) < head or not all(shape):
        raise ValueError(f"{path} holds no {'images' if axes == 3 else 'labels'} of the format IDX")
    if len(data) - head != prod(shape):
        said = f"{prod(shape):,} bytes are announced, and {len(data) - head:,} follow"
        raise ValueError(f"{path} is cut short or damaged: {said}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()
