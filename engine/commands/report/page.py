"""The report as a page: one HTML file, or Markdown with its pictures beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipfm.engine.commands.pages import templates as pages
from ipfm.engine.commands.pages.picture import Picture
from ipfm.engine.commands.pages.target import Target, page_target
from ipfm.engine.commands.report.facts import Facts
from ipfm.engine.commands.report.pictures import Samples, Strip, memory_timeline, samples
from ipfm.engine.commands.report.plots import curves
from ipfm.engine.evaluation.metrics.measures import FID, Measure, measures_of, notes
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.run_state import RunRecord

# How a page of ours is known when it is to be replaced.
MARK = "a report of a run, by ipfm report"
HERE = Path(__file__).parent


def target(out: Path, images: Path | None = None) -> Target:
    """Where a report goes that is asked for as `out`; nothing is written, see `page_target`."""
    return page_target(out, images, mark=MARK, what="report")


def write_page(record: RunRecord, facts: Facts, where: Target) -> None:
    """Write the page, and a Markdown page's pictures before it, see `templates.write_page`."""
    drawn, grids, timeline = curves(record, facts, dark=where.images is None), samples(record), memory_timeline(record)
    # In Markdown a table cannot have one picture below several headings.
    strip = None if grids.strip is None else grids.strip.labelled(_labels(facts, grids.strip))
    files: dict[str, Picture] = dict(drawn)
    files |= {"comparison": grids.comparison} if grids.comparison else {}
    files |= {"samples": grids.last[1]} if grids.last else {}
    files |= {"samples-best": grids.best[1]} if grids.best else {}
    files |= {"samples-over-training": strip} if strip else {}
    files |= {"memory": timeline} if timeline else {}
    pages.write_page(where, HERE, {**_content(facts, drawn, grids, timeline), "strip": strip}, files)


def _content(facts: Facts, drawn: Mapping[str, Picture], grids: Samples, timeline: Picture | None) -> dict[str, Any]:
    """What the templates speak of."""
    return {
        "mark": MARK,
        "facts": facts,
        "paper": any(row.paper for row in facts.results),
        "columns": _columns(facts),
        "measured": _capital(", ".join(measure.called(facts.metric) for measure in measures_of(facts.metrics))),
        "texts": _texts(facts, grids),
        "samples": grids,
        "labels": _labels(facts, grids.strip) if grids.strip else [],
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


def _labels(facts: Facts, strip: Strip) -> list[list[str]]:
    """Above each column of the strip: steps, images trained on, what was measured then by the metric that decides."""
    lines = [[counted(f"{step:,}", "step") for step in strip.steps]]
    if facts.batch is not None:
        lines.append([counted(_short(step * facts.batch), "image") for step in strip.steps])
    if measured := _measured_at(facts, strip):
        lines.append([measured.get(step, "-") for step in strip.steps])
    return [list(column) for column in zip(*lines, strict=True)]


def _measured_at(facts: Facts, strip: Strip) -> dict[int, str]:
    """What was measured at the strip's steps by the metric that decides, where it was finite."""
    first, *_ = measures_of(facts.metrics)
    finite = [e for e in facts.evaluations if math.isfinite(e.values.get(first.key, math.nan))]
    return {e.step: e.shown(first) for e in finite if e.step in strip.steps}


def _short(count: int) -> str:
    """A count for a narrow column: "19,200", "390.6 k", "12.8 M"."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if count >= max(10**power, 100_000):
            return f"{count / 10**power:.4g} {unit}"
    return f"{count:,}"


def _texts(facts: Facts, grids: Samples) -> dict[str, str]:
    """Sentences beside tables and pictures."""
    fid = facts.metric == FID
    distance = any("fid" in row.metrics for row in facts.results)
    said = notes(facts.results, facts.metric)
    own = f" {facts.metric}: between {facts.results[0].images:,} drawn images and the reference" if distance else ""
    own += "; it is no FID, as its features are not those of Inception" if distance and not fid else ""
    own += f"{'.' if distance else ''}{''.join(f' {_capital(note)}.' for note in said)}"
    total = sum(facts.bad.values())
    by_network = ", ".join(f"{count:,} of the {name}" for name, count in facts.bad.items() if count)
    squares = f"; a pixel is the mean of {grids.averaged} x {grids.averaged} of theirs" if grids.averaged > 1 else ""
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
        "comparison": "At the end of the run."
        f"{'' if facts.kind == 'teacher' else ' Images in the same place of two networks are of the same latent.'}"
        f"{' Without data: the run had none at hand.' if grids.has_data is False else ''}",
        "best": "" if facts.kept is None else f"the best ({facts.kept.number}), kept in {facts.kept.path}.",
        "last": f"images from fixed latents, the same ones at every step{squares}.",
        "over_time": _over_time(facts, grids.strip) if grids.strip else "",
        "losses": "Pale: each step; strong: the mean over a thirtieth of the run.",
        "pace": "Over all processes, evaluations and checkpoints left out, from the times at which losses were logged.",
        "memory": "Of one process, at the peak of each phase, the permanent state included.",
        "bad": f"In {facts.bad_steps:,} of {facts.steps_done:,} steps: {by_network}. They were left out of the updates."
        if total
        else f"None in {facts.steps_done:,} steps.",
    }


def _over_time(facts: Facts, strip: Strip) -> str:
    first, *_ = measures_of(facts.metrics)
    above = ["steps", *(["images trained on"] if facts.batch is not None else [])]
    above += [first.called(facts.metric)] if _measured_at(facts, strip) else []
    return f"The same {counted(strip.latents, 'latent')} over the training, a column a moment: {', '.join(above)}."
