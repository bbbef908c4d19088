"""The report as a page: one HTML file, or Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from ipfm.engine.commands.report.facts import Facts
from ipfm.engine.commands.report.pictures import Picture, Samples, is_ours, memory_timeline, samples
from ipfm.engine.commands.report.plots import curves
from ipfm.engine.evaluation.metrics.measures import FID, Measure, measures_of, notes
from ipfm.engine.runtime.files import unwritable_ancestor
from ipfm.engine.runtime.wording import significant, size
from ipfm.engine.training.run_state import RunRecord
from ipfm.models.atomic_files import atomic_write

# How a page of ours is known when it is to be replaced, within so many bytes of its start.
MARK = "a report of a run, by ipfm report"
MARKED_WITHIN = 400
SUFFIXES = (".html", ".md")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """Where a report goes.

    Attributes:
        page: the file.
        images: the folder of a Markdown page's pictures, None for HTML, which has them in itself.
    """

    page: Path
    images: Path | None = None

    def picture(self, name: str) -> Path:
        """The file of a Markdown page's picture."""
        assert self.images is not None
        return self.images / f"{self.page.stem}-{name}.png"


def target(out: Path, images: Path | None = None) -> Target:
    """Where a report goes that is asked for as `out`; nothing is written.

    Args:
        out: the page, .html or .md.
        images: folder of a Markdown page's pictures; default: NAME_files beside it.

    Raises:
        ValueError: another suffix, a file there that is no report, a folder that is none, or `images` without Markdown.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
    if images is not None and suffix != ".md":
        raise ValueError(f"images is for a Markdown page, the HTML page {out} has them in itself")
    if suffix == ".md":
        images = out.with_name(f"{out.stem}_files") if images is None else images
    for place in (out.parent, *out.parent.parents, *((images, *images.parents) if images else ())):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, the report {out} cannot be there")
    if unwritable_ancestor(out.parent) is not None:
        raise ValueError(f"{out} cannot be written: choose another --out")
    if out.exists() and not _is_report(out):
        raise ValueError(f"{out} is there and is no report of this command: choose another --out")
    return Target(out, images)


def write_page(record: RunRecord, facts: Facts, where: Target) -> None:
    """Write the page, and a Markdown page's pictures before it; each file is replaced whole or not at all.

    Raises:
        ValueError: a file that is no picture of a report is where one would go.
        OSError: the disk refuses.
    """
    drawn, grids, timeline = curves(record, facts, dark=where.images is None), samples(record), memory_timeline(record)
    files: dict[str, Picture] = dict(drawn)
    files |= {"comparison": grids.comparison} if grids.comparison else {}
    files |= {"samples": grids.last[1]} if grids.last else {}
    files |= {"samples-best": grids.best[1]} if grids.best else {}
    files |= {f"samples-{number}": found for number, (_, found) in enumerate(grids.over_time, start=1)}
    files |= {"memory": timeline} if timeline else {}
    if where.images is not None:
        places = {name: where.picture(name) for name in files}
        for place in places.values():
            if place.exists() and not is_ours(place):
                raise ValueError(f"{place} is there and is no picture of a report: choose another --images")
        for name, found in files.items():
            with atomic_write(places[name]) as file:
                file.write(found.png)
        text = _markdown(facts, drawn, grids, timeline, {id(files[n]): _link(places[n], where.page) for n in files})
    else:
        text = _html(facts, drawn, grids, timeline)
    with atomic_write(where.page) as file:
        file.write(text.encode())


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(MARKED_WITHIN)


def _link(picture: Path, page: Path) -> str:
    """The picture's place as seen from the page, with "/" between its parts."""
    return quote(Path(os.path.relpath(picture.resolve(), page.resolve().parent)).as_posix())


def _html(facts: Facts, drawn: Mapping[str, Picture], grids: Samples, timeline: Picture | None) -> str:
    environment = _environment(autoescape=True)
    environment.filters |= {"data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    return environment.get_template("page.html.j2").render(_content(facts, drawn, grids, timeline))


def _markdown(
    facts: Facts, drawn: Mapping[str, Picture], grids: Samples, timeline: Picture | None, links: Mapping[int, str]
) -> str:
    environment = _environment(autoescape=False)
    # What is printed is escaped here, as autoescape does it for HTML; the filters below are exempt.
    environment.finalize = lambda value: value if isinstance(value, _Verbatim) else _escaped(str(value))
    environment.filters |= {
        "file": lambda found: _Verbatim(links[id(found)]),
        "code": lambda text: _Verbatim(f"<code>{html.escape(text)}</code>"),
        "block": lambda text: _Verbatim("\n".join(f"    {line}" for line in text.splitlines())),
    }
    text = environment.get_template("page.md.j2").render(_content(facts, drawn, grids, timeline))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _Verbatim(str):
    """Text that is Markdown already."""


def _escaped(text: str) -> str:
    """Text with what Markdown or HTML would read as more than letters made plain."""

    def plain(found: re.Match[str]) -> str:
        return f"&#{ord(found[0])};" if found[0] in "<>&|" else f"\\{found[0]}"

    # Within a word an underscore is one.
    return re.sub(r"[<>&|\\`*\[\]#]|(?<!\w)_|_(?!\w)", plain, text)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "significant": significant,
        "bytes": lambda count: "" if count is None else size(count),
        "percent": lambda share: "" if share is None else f"{share:+.1f} %",
    }
    return environment


def _content(facts: Facts, drawn: Mapping[str, Picture], grids: Samples, timeline: Picture | None) -> dict[str, Any]:
    """What the templates speak of."""
    return {
        "mark": MARK,
        "facts": facts,
        "paper": any(row.paper for row in facts.results),
        "columns": _columns(facts),
        "chosen_by": measures_of(facts.metrics)[0].called(facts.metric),
        "measured": _capital(", ".join(measure.called(facts.metric) for measure in measures_of(facts.metrics))),
        "texts": _texts(facts),
        "samples": grids,
        "distances": _captions(facts, grids),
        "curves": {name: drawn.get(name) for name in ("distance", "losses", "pace")},
        "timeline": timeline,
        "changed": [setting for setting in facts.settings if setting.changed],
        "unchanged": [setting for setting in facts.settings if not setting.changed],
        "missing": [*facts.missing, *grids.problems],
    }


def _columns(facts: Facts) -> list[tuple[str, Measure]]:
    """What the table of results has a column of, by its heading."""
    asked = [metric for row in facts.results for metric in row.metrics] or ["fid"]
    return [(measure.called(facts.metric), measure) for measure in measures_of(asked)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _captions(facts: Facts, grids: Samples) -> dict[int, str | None]:
    """Step -> what was measured then, by the metric that decides, for the pictures over time."""
    first, *_ = measures_of(facts.metrics)
    measured = {e.step: e.shown(first) for e in facts.evaluations if math.isfinite(e.values.get(first.key, math.nan))}
    return {step: None for step, _ in grids.over_time} | measured


def _texts(facts: Facts) -> dict[str, str]:
    """Sentences beside tables and pictures."""
    fid = facts.metric == FID
    first, *_ = measures_of(facts.metrics)
    distance = any("fid" in row.metrics for row in facts.results)
    said = notes(facts.results, facts.metric)
    own = f" {facts.metric}: between {facts.results[0].images:,} drawn images and the reference" if distance else ""
    own += "; it is no FID, as its features are not those of Inception" if distance and not fid else ""
    own += f"{'.' if distance else ''}{''.join(f' {_capital(note)}.' for note in said)}"
    total = sum(facts.bad.values())
    by_network = ", ".join(f"{count:,} of the {name}" for name, count in facts.bad.items() if count)
    return {
        "table": f"NFE: network evaluations an image.{own}"
        f"{' Published figures are of 50,000 images.' if any(row.paper for row in facts.results) else ''}"
        + "".join(
            f" {row.left_out:,} further images of the {row.label} were not finite and are left out."
            for row in facts.results
            if row.left_out
        )
        if facts.results
        else "",
        "settings": "The defaults are those of the settings themselves; a recipe has its own for its data.",
        "comparison": "At the end of the run. Images in the same place of two networks are of the same latent.",
        "best": "" if facts.kept is None else f"the best ({facts.kept.number}), kept in {facts.kept.path}.",
        "last": "images from fixed latents, the same ones at every step.",
        "over_time": "The first of these images over time"
        f"{f', with the {first.called(facts.metric)}' if facts.evaluations else ''}:",
        "losses": "Pale: each step; strong: the mean over a thirtieth of the run.",
        "pace": "Over all processes, evaluations and checkpoints left out, from the times at which losses were logged.",
        "memory": "Of one process, at the peak of each phase, the permanent state included.",
        "bad": f"In {facts.bad_steps:,} of {facts.steps_done:,} steps: {by_network}. They were left out of the updates."
        if total
        else f"None in {facts.steps_done:,} steps.",
    }
