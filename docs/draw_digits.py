"""Draws images/teacher-and-generator.png, the picture of the README: the digits' teacher beside its generator.

python docs/draw_digits.py

The images are the first of images/digits-teacher-D128.png and digits-generator-D128.png: the same latents in both.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).parent / "images"
PICTURE = IMAGES / "teacher-and-generator.png"
# An opaque light ground, so that a page may be light or dark.
GROUND, INK, QUIET, ARROW = "#f4f5f7", "#1d2430", "#5b6472", "#1f5fa8"
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

SIDE, CELL, GRID = 8, 72, 6  # of a digit; of its place in the grids, eightfold with a gap; digits in a row of them
COLUMNS, ROWS, SCALE, GAP = 6, 3, 12, 12  # of a panel; whole-number enlargement; between digits
MARGIN, BETWEEN, TOP, BOTTOM = 40, 248, 92, 66


def digits(network: str) -> list[Image.Image]:
    """The first digits of a network's grid, a pixel a pixel."""
    grid = Image.open(IMAGES / f"digits-{network}-D128.png").convert("L")
    places = [(CELL * (i % GRID), CELL * (i // GRID)) for i in range(COLUMNS * ROWS)]
    size = 8 * SIDE
    return [grid.crop((x, y, x + size, y + size)).resize((SIDE, SIDE), Image.Resampling.NEAREST) for x, y in places]


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT / f"DejaVuSans{'-Bold' * bold}.ttf", size)


def panel(picture: Image.Image, left: int, network: str, title: str, below: str) -> None:
    """A network's digits with a title above and a line below them."""
    draw = ImageDraw.Draw(picture)
    draw.text((left, 50), title, INK, font(34, bold=True), anchor="lm")
    step = SIDE * SCALE + GAP
    for i, digit in enumerate(digits(network)):
        large = digit.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST)
        picture.paste(large, (left + step * (i % COLUMNS), TOP + step * (i // COLUMNS)))
    draw.text((left, picture.height - 32), below, QUIET, font(26), anchor="lm")


def picture() -> Image.Image:
    """The whole picture."""
    width, height = (n * (SIDE * SCALE + GAP) - GAP for n in (COLUMNS, ROWS))
    whole = Image.new("RGB", (2 * (MARGIN + width) + BETWEEN, TOP + height + BOTTOM), GROUND)
    panel(whole, MARGIN, "teacher", "Teacher: 35 evaluations", "Fréchet distance 0.198")
    panel(whole, MARGIN + width + BETWEEN, "generator", "Generator: 1 evaluation", "Fréchet distance 0.362")
    draw, middle, y = ImageDraw.Draw(whole), whole.width // 2, TOP + height // 2
    draw.line((middle - 70, y, middle + 50, y), ARROW, 8)
    draw.polygon([(middle + 44, y - 22), (middle + 78, y), (middle + 44, y + 22)], ARROW)
    draw.text((middle, y - 44), "distilled", INK, font(26), anchor="mm")
    draw.text((middle, y + 46), "without data", INK, font(26), anchor="mm")
    return whole


if __name__ == "__main__":
    picture().save(PICTURE, optimize=True)
