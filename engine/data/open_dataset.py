"""Data sets on disk, recognised by what they hold.

    a folder with images           in any sub-folders; labels from its dataset.json
    a zip with images              EDM's format, see `ipfm.engine.data.zip_writer`
    a zip or folder of latents     EDM2's format, see `ipfm.engine.data.latents`
    CIFAR-10's archives            Python or binary, .tar.gz or unpacked; the training set
    MNIST's images                 idx3-ubyte, .gz or unpacked, and those of sets in its format
    tar archives                   WebDataset's shards, not packed, see `ipfm.engine.data.tar_files`
    parquet or arrow files         Hugging Face's, see `ipfm.engine.data.table_files`

Nothing is unpacked to disk and no code from a file is run.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.cifar import CIFAR_100, CLASSES, cifar_place, is_cifar100, is_cifar_folder, read_cifar
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.decoding import DecodedImages, pillow_heard, read_header
from ipfm.engine.data.formats import EXTENSIONS
from ipfm.engine.data.image_files import NO_SUFFIX, FolderFiles, ImageFiles, ZipFiles, printable
from ipfm.engine.data.labels import read_labels
from ipfm.engine.data.latents import EncodedImages, are_latents, read_shape
from ipfm.engine.data.mnist import mnist_part, read_mnist
from ipfm.engine.data.table_files import SUFFIXES, TableFiles
from ipfm.engine.data.tar_files import TarFiles, holds_images
from ipfm.engine.runtime.launcher import is_first_process
from ipfm.engine.runtime.remarks import Remarks
from ipfm.models.checkpoints.recognise import (
    image_kind,
    missing,
    user_path,
    what_of_ours,
    what_packed,
    what_place,
    what_zip,
)

IN_MEMORY_LIMIT = 4 * 10**9
"""Bytes of pixels up to which a data set is decoded once and held in memory; a larger one is decoded batch by batch."""

KINDS = (
    "a folder or zip of images, or CIFAR-10's python or binary archive (.tar.gz or unpacked), or MNIST's training "
    "images (train-images-idx3-ubyte, .gz or unpacked), or tars (WebDataset), parquet or arrow files with images"
)
"""What can be opened, for messages."""


def open_dataset(
    path: str | os.PathLike[str],
    *,
    labels: bool = True,
    xflip: bool = False,
    max_images: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    strict: bool = False,
    memory_limit: int = IN_MEMORY_LIMIT,
    split: str | None = None,
) -> ImageDataset:
    """The images at `path`, named by it, on the CPU: uint8, square, in the order of their names or of their archive.

    Args:
        path: one of the kinds above. All images have the size of the first one; they are grey where the first is grey,
            else RGB. Large sets are decoded when they are used, and a bad image is then found when it is read.
        labels: take the labels, where there are any. Classes are as many as the largest label of the whole set says.
        xflip: mirror images at random, see `ImageDataset`.
        max_images: keep a random subset of this many (EDM's: NumPy's RandomState(seed) shuffles
            the indices; the first max_images of them, sorted); None, or more than there are, keeps all.
        seed: of the subset, in [0, 2³²).
        skip_unreadable: put the next image in the place of one that cannot be decoded, and say so on stderr; the number
            and the order of the others stay. Default: such an image is an error.
        strict: refuse a set of which anything is left out, system files aside, or in which a class has no images.
        memory_limit: see IN_MEMORY_LIMIT; the images are the same either way.
        split: the part of a set that has several, such as "train" or "test". None takes the training images, and says
            so on stderr.

    Raises:
        ValueError: one line that names the file: nothing there, not one of the kinds, damaged, images that are not
            square or not alike, labels that do not fit the images; max_images < 1; what `strict` forbids.
    """
    check_strictness(skip_unreadable=skip_unreadable, strict=strict)
    kept = Subset(max_images, seed)
    path = user_path(path)
    if packed := read_packed(path, split):
        chosen = kept.of(len(packed.images))
        notes = [*packed.remarks, *kept.said(path, len(packed.images))]
        for remark in notes if is_first_process() else ():
            Remarks().add(remark)
        taken = packed.labels if labels else None
        return ImageDataset(
            packed.images if len(chosen) == len(packed.images) else packed.images[chosen],
            None if taken is None else taken[chosen],
            name=str(path),
            classes=None if taken is None else packed.classes,
            xflip=xflip,
            remarks=tuple(notes),
        )
    files = open_image_files(path, split)
    remarks = remarks_on(files)
    found = read_labels(files) if labels else None
    if said := None if found is None else remark_on_classes(found, label_width(found)):
        remarks.append(f"{path}: {said}")
    for remark in remarks if is_first_process() else ():
        Remarks().add(remark)
    if strict and (said or files.left_out.beyond_system_files):
        raise ValueError(f"strict was given, and {remarks[-1]}")
    with pillow_heard() as heard:
        size = _first_shape(files, skip_unreadable=skip_unreadable)
    chosen = kept.of(len(files.names))
    for remark in kept.said(path, len(files.names)):
        remarks.append(remark)
        if is_first_process():
            Remarks().add(remark)
    latents = are_latents(files)
    kind = EncodedImages if latents else DecodedImages
    source = kind(files, [files.names[i] for i in chosen.tolist()], size, skip_unreadable=skip_unreadable)
    held = prod(source.shape) * np.dtype(source.dtype).itemsize <= memory_limit
    everything = torch.arange(len(chosen))
    kept_images: Tensor | DecodedImages = source
    if held:
        with pillow_heard() as heard:
            kept_images = source.read(everything)
        chosen = chosen[source.served(everything)]
    for remark in heard if is_first_process() else ():
        Remarks().add(f"{path}: {remark}")
    remarks += [f"{path}: {remark}" for remark in heard]
    return ImageDataset(
        kept_images,
        None if found is None else found[chosen],
        name=str(path),
        classes=None if found is None else label_width(found),
        xflip=xflip,
        remarks=(*remarks, *source.said),
        latents=latents,
    )


@dataclass(frozen=True)
class Subset:
    """Which images of a data set to keep.

    Args:
        max_images: as in `open_dataset`.
        seed: as in `open_dataset`.
        first: the first ones, not a random subset.

    Raises:
        ValueError: max_images < 1, or a seed out of its range.
    """

    max_images: int | None
    seed: int = 0
    first: bool = False

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {self.max_images}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must lie in 0…{(1 << 32) - 1}, got {self.seed}")

    def of(self, n: int) -> Tensor:
        """The numbers of the images kept out of `n`, increasing, int64."""
        order = np.arange(n)
        if self.max_images is not None and self.max_images < n:
            if not self.first:
                np.random.RandomState(self.seed).shuffle(order)
            order = np.sort(order[: self.max_images])
        return torch.from_numpy(order)

    def said(self, place: Path, n: int) -> list[str]:
        """Says which images of `place` are kept out of `n`, a line; nothing of all."""
        kept = self.max_images
        if kept is None or kept >= n:
            return []
        if self.first:
            return [f"{place}: the first {kept:,} of {n:,} images are kept, in their order"]
        return [f"{place}: {kept:,} of {n:,} images are kept, drawn at random (seed {self.seed})"]


class Packed(NamedTuple):
    """A set that is distributed as arrays."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor | None
    """(N,) int64 from 0, if it has any."""
    classes: int
    """Their number, 0 without labels."""
    title: str
    """What it is, for people."""
    label_source: str
    """Where the labels come from, for people."""
    remarks: tuple[str, ...] = ()
    """What there is to say of it, a line each."""


def read_packed(path: Path, split: str | None = None) -> Packed | None:
    """CIFAR-10 or a set in MNIST's format, where that is what lies at `path`; None where it is anything else.

    Args:
        path: of the set.
        split: which part of it, as in `open_dataset`.

    Raises:
        ValueError: it is damaged or incomplete, or has no such part; one line that names the file.
    """
    if part := mnist_part(path, split):
        images, labels, source, remarks = read_mnist(part)
        width = 0 if labels is None else label_width(labels)
        return Packed(images, labels, width, "a set in MNIST's format", source, remarks)
    if is_cifar(path) and not (path.is_file() and holds_images(path)):
        if split not in (None, "train"):
            raise ValueError(f"{path} is CIFAR-10, of which the training set alone is read: split {split} was given")
        return Packed(*read_cifar(path), CLASSES, "CIFAR-10", "CIFAR-10's")
    return None


def is_cifar(path: Path) -> bool:
    """Whether `path` is to be read as CIFAR-10: a folder with its batches, or any (packed) tar archive."""
    if path.is_dir():
        return is_cifar_folder(path) or cifar_place(path) != path
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(262)
    return start.startswith(b"\x1f\x8b") or start.endswith(b"ustar")


def open_image_files(path: Path, split: str | None = None) -> ImageFiles:
    """The images of a folder or zip.

    Args:
        path: of the set.
        split: which part of it, as in `open_dataset`.

    Raises:
        ValueError: `path` is neither, is damaged, holds no images, or has no such part.
    """
    if not path.exists():
        raise ValueError(f"{missing(path)}; a data set is {KINDS}")
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return _not_empty(TableFiles(path, split=split))
    if path.is_file() and not zipfile.is_zipfile(path) and holds_images(path):
        return _not_empty(TarFiles(path, split=split))
    if not path.is_dir() and not zipfile.is_zipfile(path):
        what = _what_else(path)
        about = f"{what}; a data set is" if what else "it must be"
        raise ValueError(f"{path} is no data set that can be read: {about} {KINDS}")
    if path.is_dir() and (shards := _shards(path, split)):
        return shards
    if split is not None:
        way = (
            f"give {path / split} instead" if (path / split).is_dir() else "leave it out, or give the part's own folder"
        )
        raise ValueError(f"{path} holds images, and no parts that have names: split {split} was given; {way}")
    files: ImageFiles = FolderFiles(path) if path.is_dir() else ZipFiles(path)
    if not files.names and (what := _what_instead(path)):
        raise ValueError(f"{path} holds no images: {what}")
    if not files.names:
        inside = [*files.left_out.get(NO_SUFFIX, ()), *files.left_out.get("files .bin", ())]
        if is_cifar100([*inside, *files.left_out.get("files .txt", ())]):
            raise ValueError(f"{path} is {CIFAR_100}")
        besides = f"; it holds {files.left_out.said()}" if files.left_out else ""
        raise ValueError(f"{path} holds no images (.png, .jpg, .webp and the like){besides}; a data set is {KINDS}")
    return files


def _shards(folder: Path, split: str | None) -> ImageFiles | None:
    """The tars or tables of a folder that has no image files; None where there are none of either.

    A program that makes tars leaves tables about them beside them: the tars have the images.
    """
    found: dict[str, list[str]] = {}
    for above, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in EXTENSIONS:
                return None
            if suffix in (".tar", *SUFFIXES) and not name.startswith("."):
                found.setdefault(suffix, []).append(os.path.relpath(os.path.join(above, name), folder))
    if ".tar" in found:
        return _not_empty(TarFiles(folder, found[".tar"], split))
    tables = found.get(".parquet") or found.get(".arrow")
    return _not_empty(TableFiles(folder, tables, split)) if tables else None


def _not_empty(files: ImageFiles) -> ImageFiles:
    if not files.names:
        besides = f"; it holds {files.left_out.said()}" if files.left_out else ""
        raise ValueError(f"{files.path} holds no images{besides}")
    return files


def check_strictness(*, skip_unreadable: bool, strict: bool) -> None:
    """Check that a reader is not told to leave out what cannot be read, and to leave out nothing.

    Raises:
        ValueError: it is.
    """
    if skip_unreadable and strict:
        raise ValueError("strict forbids to leave anything out, and skip-unreadable asks for it: give one of them")


def _first_shape(files: ImageFiles, *, skip_unreadable: bool) -> tuple[int, int, int]:
    """(C, H, W) of the first image, or (8, H, W) of latents, that can be read."""
    read = read_shape if are_latents(files) else _image_shape
    for name in files.names[:-1] if skip_unreadable else ():
        with contextlib.suppress(ValueError):
            return read(files, name)
    return read(files, files.names[-1 if skip_unreadable else 0])


def _image_shape(files: ImageFiles, name: str) -> tuple[int, int, int]:
    header = read_header(files, name)
    if header.width != header.height:
        raise ValueError(
            f"{files.where(name)} is {header.width}x{header.height}, but images must be square: "
            "`ipfm dataset --crop center` makes squares, and --fit stretch or pad does so without cutting"
        )
    return header.channels, header.height, header.width


def _what_else(path: Path) -> str | None:
    """What a file is that is no data set, where that is known."""
    if not path.is_file():
        return "it is a pipe, socket or device"
    with open(path, "rb") as file:
        start = file.read(32)
    if kind := image_kind(start):
        return f"it is a single image ({kind}); give the folder that it lies in"
    if start.startswith(b"PK\x03\x04"):
        return "it is a damaged zip, which lacks its end: fetch it again"
    if not start:
        return "it is empty"
    if start.startswith(b"\x93NUMPY"):
        return "it is a single array of NumPy"
    if packed := what_packed(start):
        return packed
    return what_place(path)


def _what_instead(path: Path) -> str | None:
    """What is known to be no data set: a folder of ours, a zip that is a program, a checkpoint or arrays."""
    if path.is_dir():
        return what_of_ours(path) or _what_container(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names) and not any(n.endswith("/constants.pkl") for n in names):
        return "it is a checkpoint, a file of torch.save"
    if names and all(name.endswith(".npy") for name in names):
        kept = ", ".join(printable(name.removesuffix(".npy")) for name in names[:4])
        return f"it is an .npz ({kept}), which is measured (ipfm evaluate): to train on images write each into a folder"
    told = any(name.endswith(("/constants.pkl", ".npy", ".pkl", ".pt", ".pth")) for name in names)
    return what_zip(names) if told else None


# Files that hold a data set of another program, and how its images are got out.
_CONTAINERS = {
    "data.mdb": "it is a database of LMDB, as LSUN's: export its images to files (LSUN's data.py does)",
    ".tfrecords": "it holds records of TensorFlow: export its images to files",
    ".tfrecord": "it holds records of TensorFlow: export its images to files",
    ".tar.gz": "it holds packed tars: unpack them (gunzip), for images are read from tars where they lie",
    ".tgz": "it holds packed tars: unpack them (gunzip), for images are read from tars where they lie",
}


def _what_container(folder: Path) -> str | None:
    """What a folder without images holds instead, where that is known."""
    names = [path.name for path in islice(folder.rglob("*"), 1000)]
    return next((said for end, said in _CONTAINERS.items() if any(name.endswith(end) for name in names)), None)


def remarks_on(files: ImageFiles) -> list[str]:
    """What is there and not taken, a line for people."""
    return [f"{files.path}: left out {files.left_out.said()}"] if files.left_out else []


def empty_classes(labels: Tensor | None, width: int) -> list[int]:
    """The classes below `width` that no image has; none where labels are not classes."""
    if labels is None or labels.ndim != 1:
        return []
    return torch.bincount(labels, minlength=width).eq(0).nonzero().flatten().tolist()


def remark_on_classes(labels: Tensor | None, width: int) -> str | None:
    """One line on the classes that no image has, None where there are none."""
    empty = empty_classes(labels, width)
    shown = ", ".join(map(str, empty[:8])) + (", …" if len(empty) > 8 else "")
    return f"{len(empty)} of {width} classes have no images: {shown}" if empty else None


def label_width(labels: Tensor) -> int:
    """How wide the labels are that a network gets: the largest class + 1, or the vectors' length."""
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
