"""Pictures of any size made into a data set of square images: what to take, how to label it, and the PNGs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.decoding import MODES, STRICT, Header, Leniency, read_header, read_picture, threads, to_array
from ipfm.engine.data.image_files import LABEL_FILE, ImageFiles, LeftOut, printable
from ipfm.engine.data.labels import MAX_CLASSES, label_file, read_labels
from ipfm.engine.data.latents import are_latents, encode_latents
from ipfm.engine.data.open_dataset import Packed, Subset, label_width, open_image_files, read_packed
from ipfm.engine.data.shaping import Shaping
from ipfm.engine.data.shards import HoldsLabels
from ipfm.engine.data.tar_files import TarFiles
from ipfm.engine.data.zip_writer import encode_png
from ipfm.engine.runtime.progress import ProgressBar
from ipfm.models.autoencoder import AT_ONCE, Autoencoder

if TYPE_CHECKING:
    from PIL.Image import Image


Labelling = Literal["auto", "folders", "none"]

_AT_ONCE = 256  # images in work: as many as wait in memory
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))
_EDMS = re.compile(r"\d{5}/img\d{8}\.\w+")
# A folder of a large data set, counted: classes have names, or are so few that four digits count them.
_SHARD = re.compile(r"\d{5,}")


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
        notes: what there is to say of what was done as asked.
        whole: number of images in the source.
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
    notes: list[str] = field(default_factory=list)
    whole: int = 0

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

    def encoded(self, autoencoder: Autoencoder) -> Iterator[bytes]:
        """The files of the images' latents, in their order; shows a bar.

        Raises:
            ValueError: an image cannot be decoded; one line that names the file.
        """

        def make(index: int) -> np.ndarray:
            return to_array(self.load(index))

        with ProgressBar("images", self.count) as bar:
            for first in range(0, self.count, AT_ONCE):
                some = np.stack(list(threads().map(make, range(first, min(first + AT_ONCE, self.count)))))
                for latents in autoencoder.encode(torch.from_numpy(some)).numpy():
                    yield encode_latents(latents)
                    bar.advance()


def find_pictures(
    source: Path,
    shaping: Shaping,
    labelling: Labelling,
    subset: Subset,
    *,
    skip_unreadable: bool = False,
    leniency: Leniency = STRICT,
    channels: Literal[1, 3] | None = None,
    split: str | None = None,
) -> Pictures:
    """Look through `source`, a folder, a zip, CIFAR-10 or MNIST; no image of a folder or zip is decoded yet.

    Args:
        source: folder, zip or archive.
        shaping: how the pictures become squares.
        labelling: "auto" takes the labels of dataset.json or of CIFAR-10; where there are none, and all images lie in
            two or more top-level folders that are not the numbered parts of a data set, five digits or more, these
            are the classes, in the order of their names. "folders" insists on that; "none" takes no labels. Folders
            that hold one folder and nothing else are passed through.
        subset: which images to keep.
        skip_unreadable: leave out, and count, the images that cannot be decoded; each is decoded once to know.
        leniency: what to do with images of which something would be lost.
        channels: of the images; None makes them RGB if one is in colour, else grey.
        split: the part of a set that has several, as in `open_dataset`.

    Raises:
        ValueError: one line that names the file: the source or an image cannot be read, an image is not square or
            (without a resolution) not of the first one's size, labels do not fit.
    """
    if packed := read_packed(source, split):
        pictures = _from_arrays(packed, source, shaping, labelling, subset)
    else:
        files = open_image_files(source, split)
        if are_latents(files):
            raise ValueError(f"{source} holds latents already, which are read as they are: a set is made of pictures")
        pictures = _from_files(files, shaping, labelling, subset, leniency, skip_unreadable=skip_unreadable)
    return pictures if channels in (None, pictures.channels) else _with_channels(pictures, source, channels)


def _with_channels(pictures: Pictures, source: Path, channels: Literal[1, 3]) -> Pictures:
    """The same pictures in grey (1) or RGB (3)."""
    said = [f"{source}: made grey, of which some were in colour"] if channels == 1 else []
    return replace(
        pictures,
        load=lambda index: pictures.load(index).convert(MODES[channels]),
        channels=channels,
        notes=[*pictures.notes, *said],
    )


def _from_arrays(packed: Packed, source: Path, shaping: Shaping, labelling: Labelling, subset: Subset) -> Pictures:
    from PIL import Image

    if labelling == "folders":
        raise ValueError(f"{source} is {packed.title}, which has labels of its own: --labels auto or none")
    images, classes = packed.images, packed.labels
    chosen = subset.of(len(images))

    def load(index: int) -> Image.Image:
        pixels = images[chosen[index]].numpy()
        return shaping.shaped(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))

    channels, height, width = images.shape[1:]
    side = shaping.side(Header(width, height, channels), str(source))
    none = labelling == "none" or classes is None
    return Pictures(
        load,
        len(chosen),
        side,
        channels,
        labels=None if none or classes is None else classes[chosen],
        label_source="none" if none else packed.label_source,
        width=0 if none else packed.classes,
        notes=[*packed.remarks, *subset.said(source, len(images))],
        whole=len(images),
    )


def _from_files(
    files: ImageFiles,
    shaping: Shaping,
    labelling: Labelling,
    subset: Subset,
    leniency: Leniency,
    *,
    skip_unreadable: bool,
) -> Pictures:
    labels, label_source, remarks = _labels(files, labelling)
    chosen = subset.of(len(files.names))
    if skip_unreadable:
        readable = torch.tensor(_readable(files, [files.names[i] for i in chosen.tolist()], leniency), dtype=torch.bool)
        files.left_out.add("images that cannot be read", (files.names[i] for i in chosen[~readable].tolist()))
        chosen = chosen[readable]
        if not len(chosen):
            raise ValueError(f"{files.path} holds no image that can be read")
    names = [files.names[i] for i in chosen.tolist()]
    side = channels = uneven = 0
    headers = _headers(files, names, leniency)
    for name, header in zip(names, headers, strict=True):
        found = shaping.side(header, files.where(name))
        side = side or found
        channels = max(channels, header.channels)
        uneven += header.width != header.height
        if found != side:
            raise ValueError(
                f"{files.where(name)} gives an image of {found} pixels a side, the first one {side}: "
                "--resolution resizes all of them"
            )

    def load(index: int) -> Image:
        return shaping.shaped(read_picture(files, names[index], channels, leniency))

    width = 0 if labels is None else label_width(labels)
    kept = None if labels is None else labels[chosen]
    notes = subset.said(files.path, len(files.names))
    if said := shaping.said(uneven, len(names)):
        notes.append(f"{files.path}: {said}")
    whole = len(files.names)
    return Pictures(load, len(names), side, channels, kept, label_source, width, files.left_out, remarks, notes, whole)


def _readable(files: ImageFiles, names: list[str], leniency: Leniency) -> list[bool]:
    """Whether each image can be decoded."""

    def tried(name: str) -> bool:
        try:
            read_picture(files, name, 3, leniency)
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


def _headers(files: ImageFiles, names: list[str], leniency: Leniency) -> Iterator[Header]:
    def read(name: str) -> Header:
        return read_header(files, name, leniency)

    with ProgressBar("looking", len(names)) as bar:
        for first in range(0, len(names), _AT_ONCE):
            for header in threads().map(read, names[first : first + _AT_ONCE]):
                yield header
                bar.advance()


def _labels(files: ImageFiles, labelling: Labelling) -> tuple[Tensor | None, str, list[str]]:
    """Labels of all images, where they come from, and what there is to say of that."""
    if labelling == "none":
        return None, "none", []
    if labelling == "auto" and isinstance(files, HoldsLabels):
        labels = read_labels(files)
        if labels is not None:
            return labels, files.label_source, []
        # A tar alone may hold a folder for each class; the names of shards say nothing.
        if files.path.is_dir() or not isinstance(files, TarFiles):
            return None, "none", []
    if labelling == "auto" and label_file(files) is not None:
        labels = read_labels(files)
        return labels, "none" if labels is None else f"those of {LABEL_FILE}", []
    names = _without_outer_folders(files.names)
    tops = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if labelling == "auto":
        if len(classes) < 2 or all(map(_EDMS.fullmatch, names)):
            return None, "none", []
        if None not in tops and all(map(_SHARD.fullmatch, classes)):
            taken = "are taken for parts of a data set, not for classes: --labels folders makes them classes"
            return None, "none", [f"{files.path}: the folders {_listed(classes)} {taken}"]
        if None in tops:
            stray = printable(names[tops.index(None)])
            return (
                None,
                "none",
                [f"{files.path}: no labels, for {stray} lies beside the folders, not in one of them: move it"],
            )
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
    remarks = []
    if all(map(_EDMS.fullmatch, names)):
        parts = "are numbered as the parts of a data set in EDM's format, whose classes are those of its dataset.json"
        remarks = [f"{files.path}: the folders {_listed(classes)} {parts}; as asked for, they are classes here"]
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[top] for top in tops if top is not None])
    return labels, f"the folders {_listed(classes)}", remarks


def _listed(classes: list[str]) -> str:
    shown = [printable(name) for name in classes]
    if len(shown) > 12:
        shown[6:-3] = ["…"]
    return ", ".join(shown)


def _without_outer_folders(names: list[str]) -> list[str]:
    """`names` below the folders that all of them share, as long as each still lies in a folder."""
    while len({name.partition("/")[0] for name in names}) == 1:
        inner = [name.partition("/")[2] for name in names]
        if not all("/" in name for name in inner):
            break
        names = inner
    return names
