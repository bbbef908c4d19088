"""MNIST, and the sets that share its format, as their authors distribute them: files of the kind IDX.

    train-images-idx3-ubyte(.gz)   00 00 08 03, three 32-bit numbers (images, rows, columns), the pixels
    train-labels-idx1-ubyte(.gz)   00 00 08 01, their number, a byte each: the class

The test images are t10k-images-…; EMNIST puts its name before (emnist-letters-train-images-idx3-ubyte.gz), stores
images with rows and columns exchanged, and counts the letters from 1: here they stand upright, and classes begin at 0.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits"; Fashion-MNIST, KMNIST and EMNIST likewise.
"""

from __future__ import annotations

import gzip
import re
import zlib
from math import prod
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.image_files import printable
from ipfm.engine.runtime.wording import counted

_IMAGES, _LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01"
_NAME = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(?P<gz>\.gz)?", re.IGNORECASE)
# Folders that others put the files in: torchvision's below its root, the zip of EMNIST, Fashion-MNIST's repository.
_SETS = ("MNIST", "FashionMNIST", "KMNIST", "EMNIST")
_BELOW = ("raw", *(f"{name}/raw" for name in _SETS), "gzip", "data/fashion")
_MAX_BYTES = 1 << 31


class Mnist(NamedTuple):
    """`images` (N, 1, H, W) uint8, `labels` (N,) int64 from 0, or None where their file is missing."""

    images: Tensor
    labels: Tensor | None
    label_source: str = "none"
    """Where these come from, for people."""
    remarks: tuple[str, ...] = ()
    """What there is to say of them, a line each."""


class Part(NamedTuple):
    """A file with images of a set, and what else lies beside it."""

    file: Path
    others: tuple[Path, ...] = ()
    """The images of the set's other parts, which are not taken."""

    @property
    def has_labels(self) -> bool:
        """Whether the file of the labels is there."""
        return _labels_of(self.file) is not None


def mnist_part(path: Path, split: str | None = None) -> Part | None:
    """The file with the images at `path`; None where there is none.

    Args:
        path: the file itself; or a folder with them, or one that torchvision keeps them below.
        split: which part of a folder, "train" or "test", which is also "t10k"; None takes the training images, or the
            test images where these are alone.

    Raises:
        ValueError: a folder holds several sets, or not this part; a file holds labels, or numbers of another kind.
    """
    if not path.is_dir():
        return _single(path, split) if path.is_file() else None
    found = _parts(path) or [file for place in _BELOW for file in _parts(path / place)]
    return _chosen(path, found, split) if found else None


def read_mnist(part: Part) -> Mnist:
    """The images of a file, with the labels beside them.

    Args:
        part: from `mnist_part`.

    Raises:
        ValueError: one line that names the file: damaged, cut short, or labels of another number.
    """
    path, remarks = part.file, []
    images = _array(path, _IMAGES, 3)
    beside = _labels_of(path)
    labels = None if beside is None else _array(beside, _LABELS, 1).astype(np.int64)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{beside} has {len(labels)} labels, {path} {len(images)} images")
    if part.others:
        others = " and ".join(other.name for other in part.others)
        remarks.append(
            f"{path.parent}: the {counted(f'{len(images):,}', 'image')} of {path.name} are taken, not {others}"
        )
    if labels is None:
        remarks.append(f"{path}: no labels, for {_label_names(path)[0]} is not beside it")
    if path.name.lower().startswith("emnist-"):
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
        upright = "rows and columns are exchanged, as EMNIST stores its images lying on their side"
        if labels is not None and path.name.lower().startswith("emnist-letters") and labels.min() == 1:
            labels -= 1
            upright += "; its letters' classes 1 to 26 are 0 to 25 here"
        remarks.append(f"{path}: {upright}")
    pixels = torch.from_numpy(images)[:, None]
    if labels is None or beside is None:
        return Mnist(pixels, None, remarks=tuple(remarks))
    return Mnist(pixels, torch.from_numpy(labels), f"those of {beside.name}", tuple(remarks))


def _single(path: Path, split: str | None) -> Part | None:
    start = _start(path)
    kind, axes = start[2:3], start[3:4]
    if start[:2] != b"\0\0" or kind not in b"\x08\x09\x0b\x0c\x0d\x0e" or not b"\1" <= axes <= b"\4":
        return None
    if start != _IMAGES:
        what = "labels" if start == _LABELS else f"numbers of another kind (header {start.hex(' ')})"
        raise ValueError(f"{path} holds {what}, not images of bytes: give the file …-images-idx3-ubyte beside it")
    if split is not None:
        raise ValueError(f"split {split} was given, but {path} is one file: give the folder, or leave it out")
    return Part(path)


def _parts(folder: Path) -> list[Path]:
    """The files of images in a folder, of each the unpacked one where there are both."""
    if not folder.is_dir():
        return []
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if (named := _NAME.fullmatch(file.name)) and file.is_file():
            found.setdefault((named["set"] + named["part"]).lower(), file)
    return list(found.values())


def _chosen(path: Path, found: list[Path], split: str | None) -> Part:
    sets: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in found:
        named = _NAME.fullmatch(file.name)
        assert named is not None
        part = "train" if named["part"].lower() == "train" else "test"
        sets.setdefault((file.parent, named["set"].lower()), {})[part] = file
    if len(sets) > 1:
        listed = ", ".join(str(next(iter(parts.values())).relative_to(path)) for parts in sets.values())
        raise ValueError(f"{path} holds {len(sets)} sets: give the file of the one that is meant, of {listed}")
    (parts,) = sets.values()
    wanted = "test" if split == "t10k" else split
    if wanted is not None and wanted not in parts:
        raise ValueError(f"{path} has no part {split}: it has {' and '.join(sorted(parts))}")
    taken = parts.get(wanted or "train") or next(iter(parts.values()))
    # What was asked for needs no word.
    return Part(taken, () if wanted else tuple(file for file in parts.values() if file != taken))


def _label_names(images: Path) -> list[str]:
    """What the file of the labels may be called, packed and not; the likeliest first."""
    name = re.sub(r"\.gz$", "", images.name, flags=re.IGNORECASE)
    plain = re.sub(r"images([-.])idx3", r"labels\1idx1", name, flags=re.IGNORECASE)
    if plain == name:
        return ["the file …-labels-idx1-ubyte"]
    return [plain, f"{plain}.gz"] if name == images.name else [f"{plain}.gz", plain]


def _labels_of(images: Path) -> Path | None:
    return next((path for name in _label_names(images) if (path := images.with_name(name)).is_file()), None)


def _unpacked(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else open(path, "rb")


def _start(path: Path) -> bytes:
    """The first four bytes of a file, unpacked; empty where they cannot be."""
    try:
        with _unpacked(path) as file:
            return file.read(4)
    except (OSError, EOFError, zlib.error):
        return b""


def _array(path: Path, magic: bytes, axes: int) -> np.ndarray:
    """The array of an IDX file of bytes; never more is read than its header announces.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        with _unpacked(path) as file:
            head = file.read(4 + 4 * axes)
            shape = [int.from_bytes(head[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
            if head[:4] != magic or len(head) < 4 + 4 * axes or not all(shape):
                raise ValueError(f"{path} holds no {'images' if axes == 3 else 'labels'} of the format IDX")
            size = prod(shape)
            if size > _MAX_BYTES:
                raise ValueError(f"{path} is damaged, or too large: its header announces {size:,} bytes")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {printable(str(error))}") from None
    if len(data) != size:
        more = "more" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"{path} is cut short or damaged: {size:,} bytes are announced, and {more} follow")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()
