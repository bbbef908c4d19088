"""Grids of samples side by side: what each run drew last from the latents that all runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ipfm.engine.commands.compare.runs import ComparedRun
from ipfm.engine.commands.pages.picture import DAMAGED, Picture, opened, png
from ipfm.engine.data.comparison import TITLE_KEY
from ipfm.engine.data.image_grid import image_grid, read_grid
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.monitor import COMPARISON_FILE

# Images of a run that are shown, a row, and pixels in width of all of them; runs whose pictures are shown.
IMAGES, COLUMNS, WIDTH, MOST = 16, 4, 256, 24


@dataclass(frozen=True)
class Grids:
    """Pictures of the runs, each with its run and the step."""

    last: tuple[tuple[ComparedRun, int, Picture], ...]
    comparisons: tuple[tuple[ComparedRun, Picture], ...]
    """Teacher, generator and data side by side, at the end."""
    problems: tuple[str, ...]
    """A sentence on each file that cannot be read, and on runs that are not shown."""


def grids(runs: Sequence[ComparedRun]) -> Grids:
    """The runs' own pictures, in order; files that cannot be read are left out."""
    problems: list[str] = []
    last, comparisons = [], []
    for run in runs[:MOST]:
        if (found := _last(run, problems)) is not None:
            last.append((run, *found))
        if (beside := _comparison(run, problems)) is not None:
            comparisons.append((run, beside))
    if len(runs) > MOST:
        problems.append(f"Pictures are shown of the first {MOST} runs.")
    return Grids(tuple(last), tuple(comparisons), tuple(problems))


def _last(run: ComparedRun, problems: list[str]) -> tuple[int, Picture] | None:
    for step, path in reversed(run.record.pictures):
        try:
            images = read_grid(path)[:IMAGES]
        except DAMAGED:
            problems.append(f"samples/{path.name} of {run.name} cannot be read.")
            continue
        grid = image_grid(images, COLUMNS, max(1, WIDTH // (COLUMNS * images.shape[-1])))
        return step, Picture(f"samples of {run.name} after {counted(step, 'step')}", png(Image.fromarray(grid)))
    return None


def _comparison(run: ComparedRun, problems: list[str]) -> Picture | None:
    path = run.record.path / COMPARISON_FILE
    if not path.is_file():
        return None
    try:
        image = opened(path)
    except DAMAGED:
        problems.append(f"{path.name} of {run.name} cannot be read.")
        return None
    return Picture(f"{run.name}, side by side: {image.info.get(TITLE_KEY, 'the networks')}", png(image))
