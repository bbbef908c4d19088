"""Grids of samples, as an array and as a PNG."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipfm.models.atomic_files import atomic_write

# Side in pixels to which small images are enlarged, and the grey level between images.
VISIBLE_SIDE = 64
PADDING_GREY = 96
# The largest side of a picture that common programs open.
MOST_PIXELS = 65_500
# Files that are written at a time.
AT_ONCE = 16
# What a grid's PNG says of itself: the pixels between its images, how many it has, how many a row, and how often each
# pixel is repeated; and what holds of one that does not say it, a run's of an earlier version. UNSAID: its pixels tell.
UNSAID = 0
BEFORE = {"Gap": 1, "Images": 64, "Columns": 8, "Scale": UNSAID}


class Layout(NamedTuple):
    """How images are laid out in a grid, row by row."""

    rows: int
    columns: int
    scale: int
    """How often each pixel is repeated."""
    gap: int
    """Pixels between two images: one of theirs, and at least two. There are none around the grid."""
    height: int
    """Of an image, enlarged."""
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the whole grid."""
        return (
            self.rows * (self.height + self.gap) - self.gap,
            self.columns * (self.width + self.gap) - self.gap,
        )


def layout(count: int, shape: tuple[int, int, int], columns: int | None = None, scale: int | None = None) -> Layout:
    """The layout of `count` > 0 images (C, H, W) = `shape`; see `image_grid` for the rest.

    Raises:
        ValueError: columns or scale below 1.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        width = channels * (width + 1) - 1
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    largest = max(1, round(VISIBLE_SIDE / max(height, width))) if scale is None else scale
    if columns < 1 or largest < 1:
        raise ValueError(f"columns and scale must be positive, got {columns} and {largest}")
    for s in range(largest, 0, -1):
        found = Layout(-(-count // columns), columns, s, max(2, s), height * s, width * s)
        if scale is not None or max(found.size) <= MOST_PIXELS:
            break
    return found


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1], row by row in one picture, uint8 (H', W', 3); nothing is interpolated.

    A value v becomes clip(127.5·v + 128, 0, 255), truncated; NaN becomes black; grey is repeated in three channels.
    Of another number of channels than 1 and 3 each is grey, one beside the other. Between images and behind the last
    is PADDING_GREY, see `Layout`.

    Args:
        images: (B, C, H, W), of any floating dtype, on any device.
        columns: images a row, about √B when None.
        scale: integer factor by which each pixel is repeated; when None the one that brings the images to some 64
            pixels, or a smaller one, for the picture to fit in MOST_PIXELS.

    Raises:
        ValueError: another shape, no images, columns or scale below 1.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must have shape (B, C, H, W) with B > 0, got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    placed = layout(count, (channels, height, width), columns, scale)
    grid = np.full((*placed.size, 3), PADDING_GREY, dtype=np.uint8)
    for i, image in enumerate(_as_rgb(pixels(images)).numpy()):
        top = i // placed.columns * (placed.height + placed.gap)
        left = i % placed.columns * (placed.width + placed.gap)
        tile = image.repeat(placed.scale, axis=0).repeat(placed.scale, axis=1)
        grid[top : top + placed.height, left : left + placed.width] = tile
    return grid


def save_grid(images: Tensor, path: Path | str, columns: int | None = None, scale: int | None = None) -> None:
    """Write `image_grid` of `images` as a PNG; an existing file is replaced whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = Image.fromarray(image_grid(images, columns, scale))
    count, channels, height, width = images.shape
    placed, about = layout(count, (channels, height, width), columns, scale), PngInfo()
    for key, value in zip(BEFORE, (placed.gap, count, placed.columns, placed.scale), strict=True):
        about.add_text(key, str(value))
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=about)


def read_grid(path: Path | str) -> Tensor:
    """The images of a grid that `save_grid` wrote, also of version 0.1.0: (B, 3, H, W) in [-1, 1], float32.

    They are as `image_grid` showed them, so it makes the same of them again.

    Raises:
        OSError, SyntaxError: it cannot be read as a PNG.
        ValueError: it is no such grid.
    """
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as picture:
        grid, about = np.asarray(picture.convert("RGB")), picture.info
        gap, count, columns, scale = (_said(about, key) for key in BEFORE)
    rows = -(-count // columns) if columns > 0 else 0
    height, width = ((side + gap) // max(1, n) - gap for side, n in zip(grid.shape, (rows, columns), strict=False))
    if (
        min(gap, count - 1, columns - 1, scale, height - 1, width - 1) < 0
        or Layout(rows, columns, scale, gap, height, width).size != grid.shape[:2]
        or (scale != UNSAID and height % scale + width % scale)
    ):
        raise ValueError(f"{path} is no grid of images")
    corners = [(i // columns * (height + gap), i % columns * (width + gap)) for i in range(count)]
    images = np.stack([grid[top : top + height, left : left + width] for top, left in corners])
    scale = scale if scale != UNSAID else _repeats(images)
    images = images[:, ::scale, ::scale]
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() + 0.5 - 128) / 127.5


def _repeats(images: np.ndarray) -> int:
    """How often each pixel of images (B, H, W, 3) is repeated; at most so often that eight pixels a side are left."""
    height, width = images.shape[1:3]
    for scale in range(min(height, width) // 8, 1, -1):
        few = images[:, ::scale, ::scale]
        if height % scale + width % scale == 0 and np.array_equal(few.repeat(scale, 1).repeat(scale, 2), images):
            return scale
    return 1


def _said(about: Mapping[Any, Any], key: str) -> int:
    """A number that a grid's PNG says of itself; -1 where it is none."""
    said = str(about.get(key, BEFORE[key]))
    return int(said) if re.fullmatch("[0-9]{1,6}", said) else -1


def _as_rgb(levels: Tensor) -> Tensor:
    """(B, C, H, W) uint8 as (B, H, W', 3): grey and RGB as they are, else the channels side by side, a pixel apart."""
    count, channels, height, width = levels.shape
    if channels not in (1, 3):
        apart = torch.nn.functional.pad(levels, (0, 1), value=PADDING_GREY)
        levels = apart.permute(0, 2, 1, 3).reshape(count, 1, height, channels * (width + 1))[..., :-1]
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def save_pngs(images: Tensor, paths: Sequence[Path | str]) -> None:
    """Write each of the images (B, C, H, W) in [-1, 1], C = 1 or 3, as a PNG of its own, grey or RGB, replaced whole.

    Pixels as in `image_grid`.

    Raises:
        ValueError: another shape, or not one path for each image.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(paths):
        raise ValueError(f"images must have shape ({len(paths)}, 1 or 3, H, W), got {tuple(images.shape)}")

    def write(path: Path | str, png: bytes) -> None:
        with atomic_write(path) as file:
            file.write(png)

    # Each waits for the disk, which takes many at a time.
    with ThreadPoolExecutor(AT_ONCE) as threads:
        writes = []
        for shown, path in zip(pixels(images).numpy(), paths, strict=True):
            encoded = io.BytesIO()
            Image.fromarray(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0)).save(encoded, format="PNG")
            writes.append(threads.submit(write, path, encoded.getvalue()))
        for one in writes:
            one.result()


def save_images(images: Tensor, path: Path | str) -> None:
    """Write images (B, C, H, W) in [-1, 1] as the entry "images" of an npz, uint8 (B, H, W, C), replaced whole."""
    with atomic_write(path) as file:
        np.savez_compressed(file, images=pixels(images).permute(0, 2, 3, 1).numpy())


def pixels(images: Tensor) -> Tensor:
    """uint8 pixels on the CPU: clip(127.5·v + 128, 0, 255), truncated; NaN becomes 0."""
    # float32 on the CPU: half precision cannot hold 127.5·v + 128 to a unit.
    levels = images.detach().to("cpu", torch.float32).nan_to_num(nan=-1.0) * 127.5 + 128
    return levels.clamp(0, 255).to(torch.uint8)
