"""The comparison as a page: one HTML file, or Markdown with its pictures beside it; and its picture of curves alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipfm.engine.commands.compare import tables
from ipfm.engine.commands.compare.facts import ComparableSet, Comparison
from ipfm.engine.commands.compare.grids import IMAGES, Grids, grids
from ipfm.engine.commands.compare.runs import ComparedRun
from ipfm.engine.commands.compare.selection import MARK
from ipfm.engine.commands.pages import templates as pages
from ipfm.engine.commands.pages.picture import Picture, is_ours
from ipfm.engine.commands.pages.target import Target, check_place, page_target
from ipfm.engine.evaluation.metrics.measures import measures_of, notes
from ipfm.engine.runtime.wording import counted
from ipfm.models.atomic_files import atomic_write

HERE = Path(__file__).parent


def target(out: Path, images: Path | None = None) -> Target:
    """Where a comparison goes that is asked for as `out`; nothing is written, see `page_target`."""
    return page_target(out, images, mark=MARK, what="comparison")


def check_picture(path: Path) -> None:
    """Check that the picture of the curves can be written there.

    Raises:
        ValueError: it is no .png, cannot be written, or another file is there.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"picture must end in .png, got {path}")
    check_place(path, "picture", "picture")
    if path.exists() and not is_ours(path):
        raise ValueError(f"{path} is there and is no picture of this command: choose another --picture")


def write_picture(drawn: Mapping[str, Picture], path: Path) -> bool:
    """Write the curves of `drawn`, see `curves`; whether there are any.

    Raises:
        OSError: the disk refuses.
    """
    if (picture := drawn.get("curves")) is None:
        return False
    with atomic_write(path) as file:
        file.write(picture.png)
    return True


def write_page(found: Comparison, where: Target, drawn: Mapping[str, Picture]) -> None:
    """Write the page with the curves of `drawn`, and a Markdown page's pictures before it."""
    shown = grids(found.runs)
    files: dict[str, Picture] = dict(drawn)
    files |= {f"samples-{number}": picture for number, (_, _, picture) in enumerate(shown.last, start=1)}
    files |= {f"comparison-{number}": picture for number, (_, picture) in enumerate(shown.comparisons, start=1)}
    pages.write_page(where, HERE, _content(found, drawn, shown), files)


def _content(found: Comparison, drawn: Mapping[str, Picture], shown: Grids) -> dict[str, Any]:
    """What the templates speak of."""
    return {
        "mark": MARK,
        "found": found,
        "title": f"{counted(len(found.runs), 'run')} compared",
        "results": [(one, tables.results(found, one), tables.spreads(one), tables.pairs(one)) for one in found.sets],
        "places": tables.places(found),
        "differences": tables.differences(found),
        "is_numeric": tables.is_numeric,
        "curves": {name: drawn.get(name) for name in ("curves", "losses")},
        "grids": shown,
        "captions": {run.name: _caption(found, run, step) for run, step, _ in shown.last},
        "texts": _texts(found, shown),
        "notes": {one.name: _notes(one) for one in found.sets},
        "missing": shown.problems,
    }


def _caption(found: Comparison, run: ComparedRun, step: int) -> str:
    """Under a grid: the run, how far it was, what was measured then."""
    one = found.set_of(run)
    measure = measures_of((one.by or run.record.measured[0],))[0]
    point = next((point for point in run.points if point.step == step), None)
    measured = "" if point is None else f", {measure.called(one.metric)} {point.shown(measure)}"
    group = found.group_of(run)
    named = run.name if group == run.name else f"{run.name} ({group})"
    return f"{named}, after {counted(f'{step:,}', 'step')}{measured}"


def _texts(found: Comparison, shown: Grids) -> dict[str, str]:
    """Sentences beside tables and pictures."""
    steps = {step for _, step, _ in shown.last}
    latents = "Images in the same place are of the same latent: pictures do not depend on a run's seed."
    if found.other_latents is not None:
        latents = f"Images in the same place are not of the same latents: {found.other_latents}."
    more = " The runs were at different steps." if len(steps) > 1 else ""
    return {
        "results": "steps: of the optimiser. NFE: network evaluations an image. time: of the training, evaluations "
        "and checkpoints included. images/s: of the training, over all processes.",
        "pairs": "Student's t over the pairs; its intervals take the differences for normally distributed, and of few "
        "pairs they are wide." + (" Of many comparisons some show a difference by chance." if _many(found) else ""),
        "curves": "Thin: single runs; strong: the mean of a group, or its only run; dashed: the teacher; a cross: then "
        "it diverged. Time counts from the first logged step, evaluations and checkpoints included.",
        "losses": "The mean over a thirtieth of the run.",
        "latents": f"The first {IMAGES} images of each. {latents}{more}",
        "settings": 'A column for each group; only what differs. "not recorded": the run is of a version without this '
        'setting, or its record is damaged; "-": there is none in such a run; left out where all '
        "others have its default.",
    }


def _many(found: Comparison) -> bool:
    return any(len({(d.one, d.other) for d in one.differences}) > 2 for one in found.sets)


def _notes(one: ComparableSet) -> list[str]:
    """What to know of numbers that are not measured as usual."""
    return notes([run.last for run in one.runs if run.last is not None], one.metric)
