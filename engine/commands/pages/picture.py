"""Pictures of pages: PNGs that are known as ours, and read from files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipfm.engine.data.comparison import TITLE_KEY

# How a picture of ours is known when it is to be replaced.
SOFTWARE = "ipfm report"
# What PIL raises for a file that is damaged or no picture.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, OverflowError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """A PNG with words for those who do not see it; `dark`: the same for a dark page, where it is drawn anew."""

    alt: str
    png: bytes
    dark: bytes | None = None


def is_ours(path: Path) -> bool:
    """Whether a PNG was made for a page of this project."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except DAMAGED:
        return False


def opened(path: Path) -> Image.Image:
    """The picture in grey or RGB, read whole; one of `DAMAGED` where it cannot be."""
    with Image.open(path, formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
        about = {k: v for k, v in image.info.items() if k == TITLE_KEY}
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    found = Image.fromarray(pixels)
    found.info.update(about)
    return found


def png(image: Image.Image) -> bytes:
    """The picture as a file by which `is_ours` knows it."""
    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True, pnginfo=about)
    return file.getvalue()
