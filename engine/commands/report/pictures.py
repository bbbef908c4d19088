"""The pictures of a report: grids of samples over time, and the memory of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ipfm.engine.commands.pages.picture import DAMAGED, Picture, enlarged, opened, png
from ipfm.engine.data.comparison import TITLE_KEY
from ipfm.engine.data.image_grid import GAP_KEY
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.loop import PICTURE_IMAGES
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.run_state import RunRecord

SHOWN = 6
# Images a row of a grid, and of the part that is shown over time.
COLUMNS, FEW = round(PICTURE_IMAGES**0.5), 4
# Pixels that a picture has at least, by repeating its own.
LEAST, LEAST_LARGE = 240, 480


@dataclass(frozen=True)
class Samples:
    """Pictures from fixed latents: the first 16 over time, and all 64 at the end. Steps done are in front."""

    comparison: Picture | None
    """Teacher, generator and data side by side, at the end."""
    over_time: tuple[tuple[int, Picture], ...]
    last: tuple[int, Picture] | None
    best: tuple[int, Picture] | None
    """Of the best network that the run keeps, where it is not the last."""
    problems: tuple[str, ...]
    """A sentence for each file that cannot be read."""


def samples(record: RunRecord) -> Samples:
    """A few of the run's grids, in order; files that cannot be read are left out."""
    problems: list[str] = []

    def readable(path: Path) -> Image.Image | None:
        try:
            return opened(path)
        except DAMAGED:
            problems.append(f"samples/{path.name} cannot be read.")
            return None

    last = None
    whole = list(record.pictures)
    while whole and last is None:
        step, path = whole[-1]
        if (image := readable(path)) is not None:
            last = step, Picture(f"samples after {counted(step, 'step')}", png(enlarged(image, LEAST_LARGE)))
        else:
            whole.pop()
    over_time = []
    for step, path in _evenly(whole, SHOWN) if len(whole) > 1 else ():
        if (image := readable(path)) is not None:
            part = enlarged(_corner(image), LEAST)
            over_time.append((step, Picture(f"samples after {counted(step, 'step')}", png(part))))
    best = None
    for step, path in whole:
        kept = record.best is not None and step == record.best.step and last is not None and step != last[0]
        if kept and (image := readable(path)) is not None:
            best = (
                step,
                Picture(f"samples of the best, after {counted(step, 'step')}", png(enlarged(image, LEAST_LARGE))),
            )
    comparison = _comparison(record.path / COMPARISON_FILE, problems)
    # A file that is shown twice is named once.
    return Samples(comparison, tuple(over_time), last, best, tuple(dict.fromkeys(problems)))


def _comparison(path: Path, problems: list[str]) -> Picture | None:
    if not path.is_file():
        return None
    try:
        image = opened(path)
        return Picture(f"side by side: {image.info.get(TITLE_KEY, 'the networks')}", png(image))
    except DAMAGED:
        problems.append(f"{path.name} cannot be read.")
        return None


def memory_timeline(record: RunRecord) -> Picture | None:
    """The run's memory/timeline.png; None where there is none to read."""
    if record.memory_picture is None:
        return None
    try:
        return Picture("memory over a step, by phase", png(opened(record.memory_picture)))
    except DAMAGED:
        return None


def _corner(grid: Image.Image) -> Image.Image:
    """The first images of a grid, those of the same latents whatever the step; all of it if it is no grid of ours."""
    try:
        gap = int(grid.info[GAP_KEY])
    except ValueError:
        return grid
    if (grid.width + gap) % COLUMNS or (grid.height + gap) % COLUMNS or gap < 0:
        return grid
    wide, tall = (grid.width + gap) // COLUMNS, (grid.height + gap) // COLUMNS
    return grid.crop((0, 0, FEW * wide - gap, FEW * tall - gap))


def _evenly(items: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of them, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
