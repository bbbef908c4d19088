"""Where samples go: one picture, one array, or a folder with a file each; nothing is mixed with others unasked."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, cat

from ipfm.engine.checks import option_name
from ipfm.engine.data.image_files import EXTENSIONS
from ipfm.engine.data.image_grid import MOST_PIXELS, layout, pixels, save_grid, save_pngs
from ipfm.engine.evaluation.reference_data import LATENTS_ARRAY
from ipfm.engine.evaluation.subject import SAMPLES_FILE
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.host_memory import check_memory
from ipfm.engine.runtime.wording import size
from ipfm.models.atomic_files import atomic_write
from ipfm.models.autoencoder import is_latent
from ipfm.models.checkpoints.recognise import what_of_ours

PER_FOLDER = 1000
"""Images of a sub-folder."""
_ADD = "name another folder, or add to it with --add"


class Destination(ABC):
    """Takes the images of a command in their order, batch by batch. An error leaves what was there."""

    remarks: Sequence[str] = ()
    """What is to be said beside the answer."""

    @abstractmethod
    def write(self, first: int, images: Tensor) -> None:
        """Take images first..first + B - 1, (B, C, H, W) in [-1, 1], on the host."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The block writes all images."""
        yield


class Picture(Destination):
    """One PNG with all images in a grid.

    Args:
        path: of the PNG.
        count: number of images.
        shape: (C, H, W) of each.
        in_a_row: one beside the other, and not in a square.

    Raises:
        ValueError: no picture can hold so many.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int], *, in_a_row: bool = False) -> None:
        self._path, self._kept = path, list[Tensor]()
        self._columns = count if in_a_row else None
        side = max(shape[1:])
        tall, wide = layout(count, shape, self._columns).size
        if max(tall, wide) > MOST_PIXELS:
            # Two pixels lie between images that are not enlarged.
            row = (MOST_PIXELS + 2) // (side + 2)
            takes = f"a row takes {row:,}" if in_a_row else f"a picture takes {row**2:,}"
            raise ValueError(f"out must be a folder or end in .npz for {count:,} images {side}x{side}: {takes}")
        channels, height, width = shape
        needed = count * height * width * (4 * channels + 3) + 3 * tall * wide
        check_memory(needed, f"a picture of {count:,} images", _FOLDER)

    def write(self, first: int, images: Tensor) -> None:
        """See `Destination.write`."""
        self._kept.append(images)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See `Destination.opened`."""
        yield
        save_grid(cat(self._kept), self._path, self._columns)


class Array(Destination):
    """One .npz with the entry "images", uint8 (N, H, W, C), written as the images come.

    Latents are the entry "latents", float32 (N, C, H, W), as they are.

    Args:
        path: of the .npz.
        count: number of images.
        shape: (C, H, W) of each.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self._path, self._latents = path, is_latent(shape)
        self._shape = (count, *shape) if self._latents else (count, height, width, channels)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See `Destination.opened`."""
        descr, name = ("<f4", LATENTS_ARRAY) if self._latents else ("|u1", "images")
        header = {"descr": descr, "fortran_order": False, "shape": self._shape}
        with (
            atomic_write(self._path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as self._member,
        ):
            np.lib.format.write_array_header_1_0(self._member, header)
            yield

    def write(self, first: int, images: Tensor) -> None:
        """See `Destination.write`."""
        if self._latents:
            self._member.write(images.float().contiguous().numpy().tobytes())
            return
        self._member.write(pixels(images).permute(0, 2, 3, 1).contiguous().numpy().tobytes())


class Folder(Destination):
    """A folder with a PNG for each image, named by a number.

    Args:
        path: the folder.
        names: number of each image.
        made_by: what makes the images: the model, and all that changes them but their numbers.
        add: put them beside other images.
        subdirs: put each thousand into a folder of their own, named by the first number, as EDM's generate.py can.

    Raises:
        ValueError: it holds images that were made otherwise, or the disk has no room for so many.
    """

    def __init__(
        self, path: Path, names: Sequence[int], made_by: Mapping[str, Any], *, add: bool, subdirs: bool = False
    ) -> None:
        if what := what_of_ours(path):
            raise ValueError(f"{path} is no place for samples: {what}")
        self._path, self._names, self._record = path, names, json.loads(json.dumps(made_by))
        self._subdirs = subdirs
        if subdirs:  # in one folder an image could be there twice
            self._record["subdirs"] = True
        first = next(_images(path), None)
        if first is None:
            _check_disk(path, len(names))
            return
        known = read_json(path / SAMPLES_FILE)
        if not add and known != self._record:
            raise ValueError(f"{path} holds images already ({first} …), {_difference(known, self._record)}: {_ADD}")
        if known != self._record:
            self._record = {"mixed": True}
        if others := self._others():
            self.remarks = (f"{path} holds {others:,} other images too",)

    def file(self, index: int) -> Path:
        """Where image `index` goes."""
        return self._path / self._name(self._names[index])

    def _name(self, number: int) -> str:
        inside = f"{number - number % PER_FOLDER:06d}/" if self._subdirs else ""
        return f"{inside}{number:06d}.png"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """See `Destination.opened`."""
        with atomic_write(self._path / SAMPLES_FILE) as file:
            file.write(json.dumps(self._record, allow_nan=False).encode())
        yield

    def write(self, first: int, images: Tensor) -> None:
        """See `Destination.write`. Written at once: a folder may hold more than memory does."""
        save_pngs(images, [self.file(index) for index in range(first, first + len(images))])

    def _others(self) -> int:
        """Images there that will not be replaced."""
        own = self._names if isinstance(self._names, range) else set(self._names)

        def replaced(name: str) -> bool:
            stem = os.path.basename(name).removesuffix(".png")
            return stem.isdecimal() and len(stem) < 21 and self._name(int(stem)) == name and int(stem) in own

        return sum(not replaced(name) for name in _images(self._path))


_FOLDER = "give a folder as --out, which takes any number"


def _images(folder: Path) -> Iterator[str]:
    """Names of the images in a folder and below, but for hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def _difference(known: Mapping[str, Any] | None, record: Mapping[str, Any]) -> str:
    if known is None or "model" not in known:
        return "of which it does not say what made them, and would mix them with these"
    if known["model"] != record["model"]:
        return "of another model, and would mix them with these"
    differ = [option_name(name) for name in {**record, **known} if known.get(name) != record.get(name)]
    return f"of this model with other {', '.join(differ)}, and would mix them with these"


def _check_disk(folder: Path, count: int) -> None:
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    room = os.statvfs(above)
    needed, free = count * room.f_frsize, room.f_bavail * room.f_frsize
    if needed > free:
        raise ValueError(
            f"{count:,} images need at least {size(needed)} on the disk of {above}, of which {size(free)} is free: "
            "give a smaller --n, or another --out"
        )
    if room.f_files and count > room.f_favail:
        raise ValueError(
            f"{count:,} images are more files than the disk of {above} can take, {room.f_favail:,}: give a smaller "
            "--n, or an .npz as --out"
        )
