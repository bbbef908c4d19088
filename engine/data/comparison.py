"""Images of several networks, and data, side by side in one picture: in each the same places, under a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.image_grid import PADDING_GREY, image_grid, layout
from ipfm.engine.runtime.wording import counted
from ipfm.models.atomic_files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

# Images a row and rows of a panel; fewer of larger images, whose panel is to be of some 256 pixels.
COLUMNS, PANEL_SIDE = 4, 256
# With so many classes or fewer each has a row; as many images as then are drawn hold some of each.
ROWS_OF_CLASSES, IMAGES_OF_CLASSES = 10, 64
# Where the PNG names its panels.
TITLE_KEY = "Title"
PAPER, INK = "white", "#1d242b"
# The value in [-1, 1] of a place without an image: the colour between images.
BLANK = (PADDING_GREY + 0.5 - 128) / 127.5


@dataclass(frozen=True)
class Panel:
    """What the images are of, and the images (B, C, H, W) in [-1, 1]."""

    title: str
    images: Tensor


@dataclass(frozen=True)
class Places:
    """Which of the images that are drawn are shown, and where: row by row."""

    rows: tuple[tuple[int | None, ...], ...]
    """Indices of images; None is a place without one."""
    classes: tuple[int, ...] | None = None
    """The class of each drawn image; None without classes."""
    titles: tuple[str, ...] = ()
    """Of the rows; empty without any."""

    @property
    def drawn(self) -> int:
        """Number of images to be drawn."""
        return 1 + max(index for row in self.rows for index in row if index is not None)

    def shown(self, images: Tensor) -> Tensor:
        """The drawn images (B, C, H, W) in their places, row by row; where there is none, the colour of the gaps."""
        blank = torch.full_like(images[:1], BLANK)
        return torch.cat([blank if i is None else images[i : i + 1] for row in self.rows for i in row])


def places(shape: tuple[int, int, int], labels: Tensor | None) -> Places:
    """Places for images (C, H, W) = `shape`.

    Args:
        shape: of an image.
        labels: the one-hot labels (IMAGES_OF_CLASSES, classes) with which the images will be drawn; None without.
    """
    columns = max(2, min(COLUMNS, PANEL_SIDE // max(shape[1:])))
    numbered = tuple(tuple(range(first, first + columns)) for first in range(0, columns * columns, columns))
    if labels is None:
        return Places(numbered)
    classes = tuple(labels.argmax(1).tolist())
    if labels.shape[1] > ROWS_OF_CLASSES:
        return Places(numbered, classes)
    rows = []
    for one in range(labels.shape[1]):
        found = [index for index, kind in enumerate(classes) if kind == one][:columns]
        rows.append((*found, *[None] * (columns - len(found))))
    return Places(tuple(rows), classes, tuple(f"class {one}" for one in range(len(rows))))


def examples(data: ImageDataset, where: Places) -> Tensor:
    """Images of the data for these places, (B, C, H, W) in [-1, 1] on the CPU: of the same classes, if they are known.

    They are spread evenly over the data, or over a class, and the same ones at every call. Where there are too few, a
    place has none.

    Raises:
        ValueError: an image cannot be read.
    """
    labels = None if data.labels is None or data.labels.ndim != 1 or where.classes is None else data.labels.cpu()
    indices = [index for row in where.rows for index in row]
    kinds = [-1 if labels is None or i is None or where.classes is None else where.classes[i] for i in indices]
    spread = {}
    for kind in set(kinds):
        pool = torch.arange(len(data)) if labels is None else (labels == kind).nonzero()[:, 0]
        wanted = min(len(pool), kinds.count(kind))
        spread[kind] = iter([int(pool[i * len(pool) // wanted]) for i in range(wanted)])
    chosen = [None if index is None else next(spread[kind], None) for index, kind in zip(indices, kinds, strict=True)]
    blank = torch.full((1, *data.shape), BLANK)
    return torch.cat([blank if i is None else data.take(i, 1).float().cpu() for i in chosen])


def save_comparison(panels: Sequence[Panel], where: Places, path: Path) -> np.ndarray:
    """Write `side_by_side` as a PNG, which is replaced whole or not at all; the picture, uint8 (H, W, 3)."""
    from PIL.PngImagePlugin import PngInfo

    picture, about = side_by_side(panels, where), PngInfo()
    about.add_text(TITLE_KEY, ", ".join(map(_title, panels)))
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=about)
    return np.asarray(picture)


def compared(path: Path) -> tuple[str, ...]:
    """What the picture that `save_comparison` left shows, such as ("teacher", "generator", "data"); () without one."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            titles = str(picture.info.get(TITLE_KEY, ""))
    except (OSError, SyntaxError, ValueError):
        return ()
    # The rest of a title counts: network evaluations, images that are not finite.
    return tuple(part for part in titles.split(", ") if part and not part[0].isdecimal())


def comparison_said(path: Path) -> str | None:
    """A line on that picture, at the end of a run: what it shows, and where it is; None where there is none."""
    shown = compared(path)
    if not shown:
        return None
    names = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{names} side by side{'' if 'data' in shown else ', no data at hand'}: {path}"


def side_by_side(panels: Sequence[Panel], where: Places) -> Image:
    """The panels from the left to the right, each with its title above; the rows' titles are on the left.

    Images are enlarged as in `image_grid`: by whole numbers, without interpolation. A title also counts the images that
    are not finite.
    """
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    columns = len(where.rows[0])
    grids = [Images.fromarray(image_grid(panel.images, columns)) for panel in panels]
    height = max(16, grids[0].width // 20)
    font, space, top = ImageFont.load_default(height), 3 * height // 2, 5 * height // 2
    titles = [_title(panel) for panel in panels]
    widths = [max(grid.width, round(font.getlength(title))) for grid, title in zip(grids, titles, strict=True)]
    left = space + max((round(font.getlength(title)) + space for title in where.titles), default=0)
    size = left + sum(width + space for width in widths), top + max(grid.height for grid in grids) + space
    picture = Images.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    placed = layout(len(panels[0].images), _shape(panels[0].images), columns)
    for row, title in enumerate(where.titles):
        middle = top + row * (placed.height + placed.gap) + placed.height // 2
        draw.text((space, middle), title, INK, font, anchor="lm")
    for grid, title, width in zip(grids, titles, widths, strict=True):
        draw.text((left, top // 2), title, INK, font, anchor="lm")
        picture.paste(grid, (left, top))
        left += width + space
    return picture


def _shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _title(panel: Panel) -> str:
    bad = int((~panel.images.isfinite().flatten(1).all(1)).sum())
    return f"{panel.title}, {counted(bad, 'image')} not finite" if bad else panel.title
