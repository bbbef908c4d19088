"""How pictures of any size become squares: what is cut away, squeezed or filled, and with which filter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ipfm.engine.data.decoding import Header

if TYPE_CHECKING:
    from PIL.Image import Image

Crop = Literal["center", "wide", "adm", "none"]
Fit = Literal["stretch", "pad", "none"]

MAX_RESOLUTION = 4096


@dataclass(frozen=True)
class Shaping:
    """How pictures become squares of one size.

    Args:
        resolution: side in pixels to which they are resized; with the wide crop (width, height); None leaves the size.
        crop: "center" cuts out the largest square in the middle; "wide" the largest rectangle there of the shape that
            `resolution` says, which becomes as large as it says, with black above and below; "adm" resizes in the way
            of Dhariwal and Nichol's data, then cuts out the middle; "none" nothing.
        fit: "stretch" squeezes the whole picture into the square; "pad" puts black beside it; "none" neither.

    Raises:
        ValueError: an impossible resolution, or what does not go together.
    """

    resolution: int | tuple[int, int] | None = None
    crop: Crop = "none"
    fit: Fit = "none"

    def __post_init__(self) -> None:
        given = self.resolution
        for side in given if isinstance(given, tuple) else (given,):
            if side is not None and not 1 <= side <= MAX_RESOLUTION:
                raise ValueError(f"resolution must lie in 1…{MAX_RESOLUTION}, got {side}")
        if self.crop != "none" and self.fit != "none":
            raise ValueError("crop and fit exclude each other: one cuts away what the other keeps")
        if self.crop == "wide":
            if not isinstance(given, tuple):
                raise ValueError("crop wide needs a width and a height: --resolution 512x384, say")
            if given[0] < given[1]:
                raise ValueError(f"crop wide needs a width not below the height, got {given[0]}x{given[1]}")
        elif isinstance(given, tuple):
            raise ValueError(
                f"resolution must be one side, for images are square, got {given[0]}x{given[1]}: --crop wide puts a "
                "picture of that shape into a square"
            )
        if self.crop == "adm" and given is None:
            raise ValueError("crop adm needs --resolution, to which it shrinks in steps")

    def side(self, header: Header, where: str) -> int:
        """Side in pixels of what becomes of a picture.

        Raises:
            ValueError: it is not square, and nothing is to be done about it; `where` begins the message.
        """
        if header.width != header.height and (self.crop, self.fit) == ("none", "none"):
            raise ValueError(
                f"{where} is {header.width}x{header.height}, but images must be square: "
                "--crop center cuts out the middle, --fit stretch squeezes all of it, --fit pad puts black beside it"
            )
        if isinstance(self.resolution, tuple):
            return self.resolution[0]
        return self.resolution or (max if self.fit == "pad" else min)(header.width, header.height)

    def said(self, uneven: int, count: int) -> str | None:
        """What is to be said of `uneven` pictures of `count` that are not square; None where there is nothing."""
        if not uneven or self.fit == "none":
            return None
        done = "squeezed into squares" if self.fit == "stretch" else "filled up to squares with black"
        return f"{uneven:,} of {count:,} images are not square and were {done}"

    def shaped(self, image: Image) -> Image:
        """The square."""
        if self.fit != "none":
            return self._whole(image)
        if isinstance(self.resolution, tuple):
            return _in_black(_resized(_middle(image, *_largest(image, *self.resolution)), self.resolution))
        if self.crop == "adm":
            assert self.resolution is not None
            return _middle(_shrunk(image, self.resolution), self.resolution, self.resolution)
        side = min(image.size)
        size = self.resolution or side
        return _resized(_middle(image, side, side), (size, size))

    def _whole(self, image: Image) -> Image:
        assert not isinstance(self.resolution, tuple)
        if self.fit == "stretch":
            size = self.resolution or min(image.size)
            return _resized(image, (size, size))
        longer = max(image.size)
        size = self.resolution or longer
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        return _in_black(_resized(image, (width, height)))


def read_resolution(given: int | str | None) -> int | tuple[int, int] | None:
    """A side, "64", or a width and a height, "512x384"; both where they are alike is a side.

    Raises:
        ValueError: neither.
    """
    if given is None or isinstance(given, int):
        return given
    found = re.fullmatch(r"([0-9]{1,9})(?:[xX×]([0-9]{1,9}))?", given.strip())
    if found is None:
        raise ValueError(f"resolution must be a side, as in 64, or with --crop wide WxH, as in 512x384, got {given!r}")
    width, height = int(found[1]), int(found[2] or found[1])
    return width if width == height else (width, height)


def _largest(image: Image, width: int, height: int) -> tuple[int, int]:
    """The largest rectangle in an image that has the shape width x height."""
    if image.width * height > image.height * width:
        return max(1, round(image.height * width / height)), image.height
    return image.width, max(1, round(image.width * height / width))


def _middle(image: Image, width: int, height: int) -> Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resized(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.LANCZOS)


def _shrunk(image: Image, side: int) -> Image:
    """`image` with a shorter side of `side`: halved by a box filter as often as that goes, then bicubic.

    So were the images prepared that ADM was trained on [Dhariwal and Nichol 2021].
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    shorter = min(image.size)
    size = (round(image.width * side / shorter), round(image.height * side / shorter))
    return image.resize(size, Resampling.BICUBIC)


def _in_black(image: Image) -> Image:
    """An image in the middle of a black square as large as its longer side."""
    from PIL import Image as Images

    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Images.new(image.mode, (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
