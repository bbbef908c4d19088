"""Images decoded with Pillow: 8-bit grey or RGB, one at a time or many on several threads."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.formats import formats_of, what_instead
from ipfm.engine.data.image_files import ImageFiles, printable
from ipfm.engine.runtime.remarks import Remarks
from ipfm.engine.runtime.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PIXELS = 80_000_000
"""Largest image that is decoded."""

_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
MODES = {1: "L", 3: "RGB"}
# Grey of 16 bits.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
GO_ON = "; --skip-unreadable goes on without it"


class Header(NamedTuple):
    """Size in pixels, and 1 channel for grey images or 3 for all others."""

    width: int
    height: int
    channels: int


@dataclass(frozen=True)
class Leniency:
    """What to do with images of which something would be lost, in place of refusing them."""

    background: str | None = None
    """Colour, by Pillow's name, on which transparent ones are put."""
    first_frame: bool = False
    """Take the first of several pictures in a file."""
    eight_bits: bool = False
    """Keep the upper 8 of more bits a value."""


STRICT = Leniency()


def read_header(files: ImageFiles, name: str, leniency: Leniency = STRICT) -> Header:
    """What the beginning of an image says.

    Raises:
        ValueError: no image, too large, or, as far as `leniency` does not allow it, of more than 8 bits a value or of
            several pictures.
    """
    with _opened(files, name) as image:
        return _header(image, files.where(name), leniency)


def read_picture(files: ImageFiles, name: str, channels: int, leniency: Leniency = STRICT) -> Image:
    """An image in Pillow's mode "L" (1 channel) or "RGB" (3), decoded and turned as its EXIF orientation says.

    Grey becomes RGB where 3 channels are asked for, palettes and other colour spaces are converted, an alpha channel
    that is opaque throughout is dropped.

    Raises:
        ValueError: one line that names the file: it cannot be decoded, is in colour where 1 channel is asked for, or,
            as far as `leniency` does not allow it, has more than 8 bits a value or several pictures or is transparent.
    """
    where = files.where(name)
    with _opened(files, name) as image:
        if _header(image, where, leniency).channels > channels:
            raise ValueError(f"{where} is in colour, but the data set is grey: ipfm dataset makes all of them alike")
        try:
            image.load()
            if image.mode in _DEEP:
                image = _upper_bits(image)
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = _opaque(image, leniency)
            return _upright(image).convert(MODES[channels])
        except _Refused as error:
            raise ValueError(f"{where} {error}") from None
        except Exception as error:  # Pillow's decoders raise whatever a damaged file makes of their arithmetic
            raise ValueError(f"{where} cannot be decoded: {printable(str(error))}{GO_ON}") from None


def read_pixels(files: ImageFiles, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """An image as (C, H, W) uint8.

    Raises:
        ValueError: its size is not that of `shape`, or as of `read_picture`.
    """
    channels, height, width = shape
    image = read_picture(files, name, channels)
    if image.size != (width, height):
        raise ValueError(
            f"{files.where(name)} is {image.width}x{image.height}, but the data set's first image is {width}x{height}: "
            "ipfm dataset --resolution N resizes all of them"
        )
    return to_array(image)


def to_array(image: Image) -> np.ndarray:
    """(C, H, W) uint8 of an image in mode "L" or "RGB"."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """An `ipfm.engine.data.dataset.ImageSource` of files, decoded when they are asked for, several at a time.

    Args:
        files: the folder or zip.
        chosen: names of the images, in their order.
        size: (C, H, W) that all of them must have; an image that has not is found when it is read.
        device: where `read` puts the images.
        skip_unreadable: the next image that can be read stands for one that cannot; said on stderr once a file.
        said: what was said so.
    """

    files: ImageFiles
    chosen: Sequence[str]
    size: tuple[int, int, int]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    skip_unreadable: bool = False
    said: list[str] = field(default_factory=list, repr=False)
    _stand_ins: dict[int, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    dtype: ClassVar[type[np.generic]] = np.uint8
    """Of what is read."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (len(self.chosen), *self.size)

    def one(self, name: str) -> np.ndarray:
        """The image `name`, (C, H, W).

        Raises:
            ValueError: as of `read_pixels`.
        """
        return read_pixels(self.files, name, self.size)

    def to(self, device: torch.device | str) -> DecodedImages:
        """The same images, read to `device`."""
        return replace(self, device=torch.device(device))

    def read(self, indices: Tensor) -> Tensor:
        """Images `indices` (B,) int64 on the CPU: (B, C, H, W) uint8.

        Raises:
            ValueError: as of `read_pixels`.
        """
        out = np.empty((len(indices), *self.size), dtype=self.dtype)

        def decode(row: int, index: int) -> None:
            out[row] = self._pixels(index)

        for _ in threads().map(decode, range(len(indices)), indices.tolist()):
            pass
        return torch.from_numpy(out).to(self.device)

    def served(self, indices: Tensor) -> Tensor:
        """The numbers of the images that `read` gave for `indices` (B,): others where a file could not be read."""
        if not self._stand_ins:
            return indices
        return torch.tensor([self._stand_ins.get(i, i) for i in indices.tolist()], dtype=torch.int64).to(indices.device)

    def _pixels(self, index: int) -> np.ndarray:
        if not self.skip_unreadable:
            return self.one(self.chosen[index])
        count, reason = len(self.chosen), ""
        for step in range(count):
            other = (self._stand_ins.get(index, index) + step) % count
            try:
                pixels = self.one(self.chosen[other])
            except ValueError as error:
                reason = reason or str(error).removesuffix(GO_ON)
                continue
            if reason:
                self._note(index, other, reason)
            return pixels
        raise ValueError(f"{self.files.path} holds no image that can be read: {reason}")

    def _note(self, index: int, other: int, reason: str) -> None:
        with self._lock:
            known = index in self._stand_ins
            self._stand_ins[index] = other
            number = len(self._stand_ins)
        if not known:
            stands = self.files.where(self.chosen[other])
            said = f"image {number} left out: {reason}; {stands} stands in its place"
            self.said.append(said)
            Remarks().add(said)


@cache
def threads() -> ThreadPoolExecutor:
    """The threads that decode images; Pillow and zlib let them run side by side."""
    return ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))), thread_name_prefix="decode")


@contextmanager
def pillow_heard() -> Iterator[list[str]]:
    """Gathers what Pillow warns of while pictures are read, which names no file: one line with how often, at the end.

    For one thread at a time; the warnings of others are passed on.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", module=r"PIL\.")
        yield said
    own = [one for one in caught if "PIL" in Path(one.filename).parts]
    for one in caught:
        if one not in own:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if own:
        text = printable(" ".join(str(own[0].message).split()))
        said.append(f"Pillow warned {counted(len(own), 'time')} and read the images all the same: {text[:120]}")


class _Refused(Exception):
    pass


@contextmanager
def _opened(files: ImageFiles, name: str) -> Iterator[Image]:
    from PIL import Image

    try:
        opened = files.open(name)
    except ValueError as error:
        raise ValueError(f"{error}{GO_ON}") from None
    with opened as file:
        try:
            image = Image.open(file, formats=formats_of(name))
        except Image.UnidentifiedImageError:
            file.seek(0)
            raise ValueError(f"{files.where(name)} {what_instead(file.read(512))}{GO_ON}") from None
        except Image.DecompressionBombError:
            raise ValueError(f"{files.where(name)} is larger than is decoded: {_too_many()}") from None
        except Exception as error:
            raise ValueError(f"{files.where(name)} cannot be read: {printable(str(error))}{GO_ON}") from None
        yield image


def _too_many() -> str:
    return f"more than {MAX_PIXELS // 10**6} million pixels: make it smaller with another program{GO_ON}"


def _header(image: Image, where: str, leniency: Leniency) -> Header:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{where} is {image.width}x{image.height}, {_too_many()}")
    channels = 1 if image.mode in _DEEP else _CHANNELS.get(image.mode)
    if channels is None:
        raise ValueError(f"{where} has pixels of the kind {image.mode}; possible: 8-bit grey or RGB{GO_ON}")
    bits = max(_bits(image), 16) if image.mode in _DEEP else _bits(image)
    if bits > 8 and not leniency.eight_bits:
        raise ValueError(
            f"{where} has {bits} bits a value, of which {bits - 8} would be lost; possible: 8-bit grey or RGB: "
            "ipfm dataset --to-8-bits keeps the upper 8"
        )
    # A second picture of a photo (MPO) is its preview, or the other eye's.
    if not leniency.first_frame and image.format != "MPO" and (pictures := _pictures(image)) > 1:
        raise ValueError(
            f"{where} holds {pictures} pictures, of which one would be taken: make a file of each, or "
            "ipfm dataset --first-frame takes the first"
        )
    # Turning exchanges the sides; looking whether a PNG is to be turned decodes it, which a square one is spared.
    turned = image.width != image.height and image.format != "TIFF" and _orientation(image) in _LYING
    return Header(*((image.height, image.width) if turned else image.size), channels)


_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


def _orientation(image: Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or the EXIF data are damaged, which the picture is not."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow makes of damaged data
        return 1


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    if _orientation(image) not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def _opaque(image: Image, leniency: Leniency) -> Image:
    """A picture with an alpha channel or a transparent colour without it."""
    from PIL import Image as Images

    image, info = image.convert("RGBA"), image.info
    if image.getchannel("A").getextrema() == (255, 255):
        return image
    if leniency.background is None:
        raise _Refused("is transparent: ipfm dataset --background white (or black, grey) puts it on a colour")
    flat = Images.alpha_composite(Images.new("RGBA", image.size, leniency.background), image)
    flat.info = info  # the orientation
    return flat


def _upper_bits(image: Image) -> Image:
    """The upper 8 bits of grey values, as Pillow itself takes them of colour; it has made 16 of 9 to 15 bits."""
    from PIL import Image as Images

    values = np.asarray(image).astype(np.int64) >> (24 if (image.format, image.mode) == ("TIFF", "I") else 8)
    grey = Images.fromarray(values.clip(0, 255).astype(np.uint8))
    grey.info = image.info
    return grey


def _pictures(image: Image) -> int:
    """How many pictures a file holds; where its tail is damaged, 1."""
    try:
        return int(getattr(image, "n_frames", 1)) if getattr(image, "is_animated", False) else 1
    except Exception:  # as above
        return 1


def _bits(image: Image) -> int:
    """Bits a value in the file; Pillow makes 8 of more without a word."""
    if image.format == "TIFF":
        found = getattr(image, "tag_v2", {}).get(258, 8)
        return max(found) if isinstance(found, tuple) else int(found)
    tiles = getattr(image, "tile", None)
    if not tiles:
        return 8
    options = tiles[0][3]
    if image.format == "PNG":
        return 16 if "16" in str(options) else 8
    if image.format == "PPM" and isinstance(options, tuple) and type(options[-1]) is int:
        return max(8, options[-1].bit_length())
    if image.format == "AVIF":
        return _avif_bits(image)
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8))
    return _jpeg2000_bits(image) or 8


def _start(image: Image) -> bytes:
    """The first bytes of an image's file, which is left where it was."""
    file = getattr(image, "fp", None)
    if file is None:
        return b""
    place = file.tell()
    file.seek(0)
    start = file.read(1 << 14)
    file.seek(place)
    return start


def _avif_bits(image: Image) -> int:
    """8, 10 or 12, by the configuration of AV1: a flag for more than 8 bits, and one for 12."""
    _, found, rest = _start(image).partition(b"av1C")
    if not found or len(rest) < 3 or not rest[2] & 0x40:
        return 8
    return 12 if rest[2] & 0x20 else 10


def _jpeg2000_bits(image: Image) -> int | None:
    """The most bits of a component, by the marker SIZ of a JPEG 2000; None of other images."""
    if image.format != "JPEG2000":
        return None
    _, found, rest = _start(image).partition(b"\xff\x4f\xff\x51")
    components = int.from_bytes(rest[36:38], "big")
    sizes = rest[38 : 38 + 3 * components : 3] if found else b""
    return max((size & 0x7F) + 1 for size in sizes) if sizes else None
