"""Pictures of any size made into a data set of square images: what to take, how to label it, and the PNGs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ipfm.engine.data.cifar import read_cifar
from ipfm.engine.data.decoding import Header, read_header, read_picture, threads, to_array
from ipfm.engine.data.image_files import LABEL_FILE, ImageFiles, LeftOut, printable
from ipfm.engine.data.labels import MAX_CLASSES, label_file, read_labels
from ipfm.engine.data.open_dataset import Subset, is_cifar, label_width, open_image_files
from ipfm.engine.data.zip_writer import encode_png
from ipfm.engine.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from PIL.Image import Image


Labelling = Literal["auto", "folders", "none"]

MAX_RESOLUTION = 4096
_AT_ONCE = 256  # images in work: as many as wait in memory
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))
_SHARD = re.compile(r"\d{5}/img\d{8}\.\w+")


@dataclass(frozen=True)
class Shaping:
    """How pictures become squares of one size.

    Args:
        resolution: side in pixels to which they are resized with Lanczos' filter; None leaves the size.
        crop: cut out the middle before.

    Raises:
        ValueError: an impossible resolution.
    """

    resolution: int | None = None
    crop: bool = False

    def __post_init__(self) -> None:
        if self.resolution is not None and not 1 <= self.resolution <= MAX_RESOLUTION:
            raise ValueError(f"resolution must lie in 1…{MAX_RESOLUTION}, got {self.resolution}")

    def side(self, header: Header, where: str) -> int:
        """Side in pixels of what becomes of a picture.

        Raises:
            ValueError: it is not square, and not to be cropped; `where` begins the message.
        """
        if header.width != header.height and not self.crop:
            raise ValueError(
                f"{where} is {header.width}x{header.height}, but images must be square: "
                "--crop center cuts out the middle"
            )
        return self.resolution or min(header.width, header.height)

    def shaped(self, image: Image) -> Image:
        """The square."""
        from PIL.Image import Resampling

        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (side, side):
            image = image.crop((left, top, left + side, top + side))
        size = self.resolution or side
        return image if size == side else image.resize((size, size), Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a data set to be.

    Attributes:
        load: load(i) decodes image number i and shapes it.
        count: number of images.
        side: side of each image in pixels.
        channels: of each image, 1 or 3.
        labels: (count,) integers, (count, K) floats or None.
        label_source: where they come from, for people.
        width: how wide they are in the whole source.
        left_out: what is in the source and not taken.
        remarks: what else there is to say of the source.
    """

    load: Callable[[int], Image]
    count: int
    side: int
    channels: int
    labels: Tensor | None
    label_source: str
    width: int
    left_out: LeftOut = field(default_factory=LeftOut)
    remarks: list[str] = field(default_factory=list)

    def pngs(self) -> Iterator[bytes]:
        """The images in their order, as PNGs, made by several threads; shows a bar.

        Raises:
            ValueError: an image cannot be decoded; one line that names the file.
        """

        def make(index: int) -> bytes:
            return encode_png(to_array(self.load(index)))

        with ProgressBar("images", self.count) as bar:
            for first in range(0, self.count, _AT_ONCE):
                for png in threads().map(make, range(first, min(first + _AT_ONCE, self.count))):
                    yield png
                    bar.advance()


def find_pictures(
    source: Path, shaping: Shaping, labelling: Labelling, subset: Subset, *, skip_unreadable: bool = False
) -> Pictures:
    """Look through `source`, a folder, zip or CIFAR-10 archive; no image is decoded yet, but for CIFAR-10.

    Args:
        source: folder, zip or archive.
        shaping: how the pictures become squares.
        labelling: "auto" takes the labels of dataset.json or of CIFAR-10; where there are none, and all images lie in
            two or more top-level folders that are not the numbered ones of EDM's format, these are the classes, in the
            order of their names. "folders" insists on that; "none" takes no labels. Folders that hold one folder and
            nothing else are passed through.
        subset: which images to keep.
        skip_unreadable: leave out, and count, the images that cannot be decoded; each is decoded once to know.

    Raises:
        ValueError: one line that names the file: the source or an image cannot be read, an image is not square or
            (without a resolution) not of the first one's size, labels do not fit.
    """
    if is_cifar(source):
        return _from_cifar(source, shaping, labelling, subset)
    return _from_files(open_image_files(source), shaping, labelling, subset, skip_unreadable=skip_unreadable)


def _from_cifar(source: Path, shaping: Shaping, labelling: Labelling, subset: Subset) -> Pictures:
    from PIL import Image

    if labelling == "folders":
        raise ValueError(f"{source} is CIFAR-10, which has labels of its own: --labels auto or none")
    images, classes = read_cifar(source)
    chosen = subset.of(len(images))

    def load(index: int) -> Image.Image:
        return shaping.shaped(Image.fromarray(images[chosen[index]].permute(1, 2, 0).numpy()))

    side = shaping.resolution or images.shape[-1]
    if labelling == "none":
        return Pictures(load, len(chosen), side, 3, None, "none", 0)
    return Pictures(load, len(chosen), side, 3, classes[chosen], "CIFAR-10's", label_width(classes))


def _from_files(
    files: ImageFiles, shaping: Shaping, labelling: Labelling, subset: Subset, *, skip_unreadable: bool
) -> Pictures:
    labels, label_source, remarks = _labels(files, labelling)
    chosen = subset.of(len(files.names))
    if skip_unreadable:
        readable = torch.tensor(_readable(files, [files.names[i] for i in chosen.tolist()]), dtype=torch.bool)
        files.left_out.add("images that cannot be read", (files.names[i] for i in chosen[~readable].tolist()))
        chosen = chosen[readable]
        if not len(chosen):
            raise ValueError(f"{files.path} holds no image that can be read")
    names = [files.names[i] for i in chosen.tolist()]
    side = channels = 0
    headers = _headers(files, names)
    for name, header in zip(names, headers, strict=True):
        found = shaping.side(header, files.where(name))
        side = side or found
        channels = max(channels, header.channels)
        if found != side:
            raise ValueError(
                f"{files.where(name)} gives an image of {found} pixels a side, the first one {side}: "
                "--resolution resizes all of them"
            )

    def load(index: int) -> Image:
        return shaping.shaped(read_picture(files, names[index], channels))

    width = 0 if labels is None else label_width(labels)
    kept = None if labels is None else labels[chosen]
    return Pictures(load, len(names), side, channels, kept, label_source, width, files.left_out, remarks)


def _readable(files: ImageFiles, names: list[str]) -> list[bool]:
    """Whether each image can be decoded."""

    def tried(name: str) -> bool:
        try:
            read_picture(files, name, 3)
        except ValueError:
            return False
        return True

    found: list[bool] = []
    with ProgressBar("reading", len(names)) as bar:
        for first in range(0, len(names), _AT_ONCE):
            for readable in threads().map(tried, names[first : first + _AT_ONCE]):
                found.append(readable)
                bar.advance()
    return found


def _headers(files: ImageFiles, names: list[str]) -> Iterator[Header]:
    with ProgressBar("looking", len(names)) as bar:
        for first in range(0, len(names), _AT_ONCE):
            for header in threads().map(lambda name: read_header(files, name), names[first : first + _AT_ONCE]):
                yield header
                bar.advance()


def _labels(files: ImageFiles, labelling: Labelling) -> tuple[Tensor | None, str, list[str]]:
    """Labels of all images, where they come from, and what there is to say of that."""
    if labelling == "none":
        return None, "none", []
    if labelling == "auto" and label_file(files) is not None:
        labels = read_labels(files)
        return labels, "none" if labels is None else f"those of {LABEL_FILE}", []
    names = _without_outer_folders(files.names)
    tops = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if labelling == "auto":
        if len(classes) < 2 or all(map(_SHARD.fullmatch, names)):
            return None, "none", []
        if None in tops:
            stray = printable(names[tops.index(None)])
            return None, "none", [f"{files.path}: no labels, for {stray} lies beside the folders, not in one of them"]
        if _SPLITS.issuperset(name.lower() for name in classes):
            raise ValueError(
                f"{files.path} holds {' and '.join(classes)}, the parts of a split, which are no classes: give one of "
                "them, or --labels none; --labels folders takes them all the same"
            )
    if None in tops:
        raise ValueError(
            f"{files.where(files.names[tops.index(None)])} lies in no folder, so it has no class: --labels none"
        )
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{files.path} has {len(classes)} folders, more than {MAX_CLASSES} classes")
    number = {name: index for index, name in enumerate(classes)}
    shown = [printable(name) for name in classes]
    if len(shown) > 12:
        shown[6:-3] = ["…"]
    labels = torch.tensor([number[top] for top in tops if top is not None])
    return labels, f"the folders {', '.join(shown)}", []


def _without_outer_folders(names: list[str]) -> list[str]:
    """`names` below the folders that all of them share, as long as each still lies in a folder."""
    while len({name.partition("/")[0] for name in names}) == 1:
        inner = [name.partition("/")[2] for name in names]
        if not all("/" in name for name in inner):
            break
        names = inner
    return names
