"""Samples as a page shows them: those of a step as a grid, a few over the training as one strip.

A strip has a column for each of some moments, and in it a row for each of a few latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ipfm.engine.data.comparison import INK, PAPER
from ipfm.engine.data.image_grid import image_grid, layout

# Latents, and moments at most: what lies side by side on a page.
LATENTS, MOMENTS = 4, 7
# Pixels of a page's width, and of an image in a strip, at most; and those to which a strip enlarges one at least.
WIDTH, SIDE, LEAST_SIDE = 950, 128, 105
# Height of the letters, as long as a line has room in its column, and at least.
LETTERS, LEAST_LETTERS = 15, 9


def averaged(images: Tensor) -> int:
    """The side in pixels of the squares that `grid_of` makes one of, for the images (B, C, H, W) to fit on a page."""
    count, channels, *sides = images.shape
    columns = math.ceil(math.sqrt(count))
    for times in range(1, max(sides)):
        height, width = (-(-side // times) for side in sides)
        if layout(count, (channels, height, width), columns).size[1] <= WIDTH:
            return times
    return max(sides)


def grid_of(images: Tensor) -> np.ndarray:
    """The images (B, 3, H, W) in [-1, 1] as `image_grid`, but no wider than a page, uint8 (H', W', 3).

    Small ones are enlarged by a whole number; large ones are made smaller by one, each pixel the mean of a square.
    """
    return image_grid(_smaller(images, averaged(images)))


def strip_of(moments: Sequence[Tensor]) -> np.ndarray:
    """The first images of each moment, one below the other, uint8 (H, W, 3); enlarged and made smaller likewise.

    Args:
        moments: each (B, 3, H, W) in [-1, 1], of one shape.
    """
    images = torch.stack([images[:LATENTS] for images in moments], 1).flatten(0, 1)
    images = _smaller(images, -(-max(images.shape[2:]) // SIDE))
    scale = -(-LEAST_SIDE // max(images.shape[2:]))
    while scale > 1 and layout(len(images), _shape(images), len(moments), scale).size[1] > WIDTH:
        scale -= 1
    return image_grid(images, len(moments), scale)


def _smaller(images: Tensor, times: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, times, ceil_mode=True) if times > 1 else images


def _shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def labelled(strip: np.ndarray, labels: Sequence[Sequence[str]]) -> Image.Image:
    """The strip with the lines of each column's label above it, on white.

    Args:
        strip: of `strip_of`.
        labels: a few lines each, as many of one column as of another.
    """
    pitch = -(-strip.shape[1] // len(labels))
    texts = [text for lines in labels for text in lines]
    for letters in range(LETTERS, LEAST_LETTERS - 1, -1):
        font = ImageFont.load_default(letters)
        if max(map(font.getlength, texts)) < pitch:
            break
    line = letters * 4 // 3
    top = line * len(labels[0]) + letters // 2
    picture = Image.new("RGB", (strip.shape[1], top + strip.shape[0]), PAPER)
    picture.paste(Image.fromarray(strip), (0, top))
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(labels):
        for row, text in enumerate(lines):
            draw.text((pitch * column + pitch // 2, line * row), text, INK, font, anchor="ma")
    return picture
