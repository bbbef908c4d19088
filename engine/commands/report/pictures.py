"""The pictures of a report: grids of samples over time, and the memory of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipfm.engine.commands.pages.picture import DAMAGED, Picture, opened, png
from ipfm.engine.commands.report.strip import LATENTS, MOMENTS, averaged, grid_of, labelled, strip_of
from ipfm.engine.data.comparison import TITLE_KEY, compared
from ipfm.engine.data.image_grid import read_grid
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.run_state import RunRecord

T = TypeVar("T")
# Pixels in width of a picture as the run left it, beyond which squares of them are averaged: twice a page's.
WIDEST = 1900


@dataclass(frozen=True)
class Strip:
    """The same few latents at some moments of the training, a column each."""

    steps: tuple[int, ...]
    """Steps done, of each column."""
    latents: int
    pixels: np.ndarray
    """uint8 (H, W, 3)"""
    shown: Picture
    """The same, for a page that has the columns' labels in words."""

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    def labelled(self, labels: Sequence[Sequence[str]]) -> Picture:
        """With these lines above each column."""
        return Picture(self.shown.alt, png(labelled(self.pixels, labels)))


@dataclass(frozen=True)
class Samples:
    """Pictures from fixed latents: a few of them over time, and all at the end. Steps done are in front."""

    comparison: Picture | None
    """Teacher, generator and data side by side, at the end."""
    has_data: bool | None
    """The data are in it; None where it does not say what it shows."""
    strip: Strip | None
    """None where the run has pictures of one moment, or none."""
    last: tuple[int, Picture] | None
    best: tuple[int, Picture] | None
    """Of the best network that the run keeps, where it is not the last."""
    averaged: int
    """Side in pixels of the squares of which each is one in `last` and `best`, for them to fit on a page."""
    problems: tuple[str, ...]
    """A sentence for each file that cannot be read."""

    def to_json(self, record: RunRecord) -> dict[str, Any]:
        """Where the pictures are within the run folder, and which of them a page shows."""
        places = {step: path.relative_to(record.path).as_posix() for step, path in record.pictures}
        memory = record.memory_picture
        return {
            "comparison": None if self.comparison is None else COMPARISON_FILE,
            "comparison_has_data": self.has_data,
            "samples": [{"step": step, "file": place} for step, place in places.items()],
            "over_time": [] if self.strip is None else list(self.strip.steps),
            "last": None if self.last is None else self.last[0],
            "best": None if self.best is None else self.best[0],
            "memory": None if memory is None else memory.relative_to(record.path).as_posix(),
        }


def samples(record: RunRecord) -> Samples:
    """A few of the run's grids, in order; files that cannot be read are left out."""
    problems: list[str] = []

    def readable(path: Path, read: Callable[[Path], T]) -> T | None:
        try:
            return read(path)
        except DAMAGED:
            problems.append(f"{path.relative_to(record.path).as_posix()} cannot be read.")
            return None

    def looked_at(step: int) -> Tensor | None:
        """The step's images; a few of them are kept, since all of all steps may fill the memory."""
        images = readable(places[step], read_grid)
        if images is not None:
            few[step] = images.shape, images[:LATENTS].clone()
        return images

    places, few = dict(record.pictures), dict[int, tuple[torch.Size, Tensor]]()
    steps, last, best, squares = list(places), None, None, 1
    while steps and last is None:
        if (images := looked_at(steps[-1])) is None:
            steps.pop()
        else:
            last, squares = (steps[-1], _grid(images, f"samples after {_steps(steps[-1])}")), averaged(images)
    kept = None if record.best is None else record.best.step
    if kept in steps[:-1] and (images := looked_at(kept)) is not None:
        best = kept, _grid(images, f"samples of the best, after {_steps(kept)}")
    shown = _evenly(steps, MOMENTS)
    for step in shown:
        if step not in few:
            looked_at(step)
    strip = _strip({step: few[step] for step in shown if step in few})
    comparison = None
    path = record.path / COMPARISON_FILE
    if path.is_file() and (image := readable(path, opened)) is not None:
        titles = image.info.get(TITLE_KEY, "the networks")
        comparison = Picture(f"side by side: {titles}", png(image.reduce(-(-image.width // WIDEST))))
    # A file that is looked at twice is named once.
    shows = compared(path)
    has_data = "data" in shows if shows else None
    return Samples(comparison, has_data, strip, last, best, squares, tuple(dict.fromkeys(problems)))


def _strip(over_time: dict[int, tuple[torch.Size, Tensor]]) -> Strip | None:
    """Of the moments whose images are as many and as large as the last one's: step -> size of all images, a few."""
    sizes = [size for size, _ in over_time.values()]
    alike = {step: images for step, (size, images) in over_time.items() if size == sizes[-1]}
    if len(alike) < 2:
        return None
    pixels, latents = strip_of(list(alike.values())), len(next(iter(alike.values())))
    first, end = ", ".join(map(str, list(alike)[:-1])), list(alike)[-1]
    alt = f"the same {counted(latents, 'latent')} after {first} and {_steps(end)}"
    return Strip(tuple(alike), latents, pixels, Picture(alt, png(Image.fromarray(pixels))))


def _grid(images: Tensor, alt: str) -> Picture:
    return Picture(alt, png(Image.fromarray(grid_of(images))))


def _steps(count: int) -> str:
    return counted(count, "step")


def memory_timeline(record: RunRecord) -> Picture | None:
    """The run's memory/timeline.png; None where there is none to read."""
    if record.memory_picture is None:
        return None
    try:
        return Picture("memory over a step, by phase", png(opened(record.memory_picture)))
    except DAMAGED:
        return None


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[int(i * (len(items) - 1) / (count - 1) + 0.5)] for i in range(count)]
