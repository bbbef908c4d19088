"""Grids of samples, as an array and as a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipfm.models.atomic_files import atomic_write

# Side in pixels to which small images are enlarged, and the grey level between images.
VISIBLE_SIDE = 64
PADDING_GREY = 96


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1], C = 1 or 3, row by row in one picture, uint8 (H', W', 3).

    A value v becomes clip(127.5·v + 128, 0, 255), truncated; NaN becomes black; grey is repeated in three channels.
    One pixel lies between images, none around them.

    Args:
        images: (B, C, H, W), of any floating dtype, on any device.
        columns: images a row, about √B when None.
        scale: integer factor by which each pixel is repeated; when None the smallest that brings the images to some 64
            pixels.

    Raises:
        ValueError: another shape, no images, columns or scale below 1.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images must have shape (B, 1 or 3, H, W) with B > 0, got {tuple(images.shape)}")
    count, _, height, width = images.shape
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    scale = max(1, round(VISIBLE_SIDE / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be positive, got {columns} and {scale}")

    shown = pixels(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    tiles = shown.numpy().repeat(scale, axis=1).repeat(scale, axis=2)

    rows = -(-count // columns)
    tall, wide = height * scale + 1, width * scale + 1
    grid = np.full((rows * tall - 1, columns * wide - 1, 3), PADDING_GREY, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * tall, i % columns * wide
        grid[top : top + tall - 1, left : left + wide - 1] = tile
    return grid


def save_grid(images: Tensor, path: Path | str, columns: int | None = None, scale: int | None = None) -> None:
    """Write `image_grid` of `images` as a PNG; an existing file is replaced whole or not at all."""
    from PIL import Image

    picture = Image.fromarray(image_grid(images, columns, scale))
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def save_pngs(images: Tensor, paths: Sequence[Path | str]) -> None:
    """Write each of the images (B, C, H, W) in [-1, 1], C = 1 or 3, as a PNG of its own, grey or RGB, replaced whole.

    Pixels as in `image_grid`.

    Raises:
        ValueError: another shape, or not one path for each image.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(paths):
        raise ValueError(f"images must have shape ({len(paths)}, 1 or 3, H, W), got {tuple(images.shape)}")
    for shown, path in zip(pixels(images).numpy(), paths, strict=True):
        picture = Image.fromarray(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0))
        with atomic_write(path) as file:
            picture.save(file, format="PNG")


def save_images(images: Tensor, path: Path | str) -> None:
    """Write images (B, C, H, W) in [-1, 1] as the entry "images" of an npz, uint8 (B, H, W, C), replaced whole."""
    with atomic_write(path) as file:
        np.savez_compressed(file, images=pixels(images).permute(0, 2, 3, 1).numpy())


def pixels(images: Tensor) -> Tensor:
    """uint8 pixels on the CPU: clip(127.5·v + 128, 0, 255), truncated; NaN becomes 0."""
    # float32 on the CPU: half precision cannot hold 127.5·v + 128 to a unit.
    levels = images.detach().to("cpu", torch.float32).nan_to_num(nan=-1.0) * 127.5 + 128
    return levels.clamp(0, 255).to(torch.uint8)
