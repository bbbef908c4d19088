"""Curves of several runs in one picture: every number over images, steps and time; and the losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipfm.engine.checks import number
from ipfm.engine.commands.compare.facts import ComparableSet, Comparison
from ipfm.engine.commands.compare.runs import ComparedRun
from ipfm.engine.commands.compare.settings import Group
from ipfm.engine.commands.pages.picture import Picture
from ipfm.engine.commands.pages.theme import DPI, LIGHT, Theme, figure_picture
from ipfm.engine.commands.report.plots import limits, smooth
from ipfm.engine.evaluation.metrics.measures import Measure
from ipfm.engine.evaluation.results import distance_axis
from ipfm.engine.experiments.repeats import spread
from ipfm.engine.runtime.figures import file_figure
from ipfm.engine.runtime.wording import significant

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a group, for light and for dark paper; more groups have other lines in the same colours.
ON_LIGHT = ("#1f5fa8", "#b8571a", "#2e7d4f", "#8a3fa0", "#8a6d00", "#b3304f", "#1d7f8c", "#5d6872")
ON_DARK = ("#6fb1f5", "#f0a061", "#7fcf9d", "#cf9fe6", "#e0c75a", "#f28ba2", "#6fd0dc", "#b4bfca")
LINES = ("-", ":", "-.")
# Inches, and letters of a legend in the whole width.
WIDTH, ROW, LEGEND, LEGEND_ROW, LETTERS = 12.0, 2.9, 0.55, 0.2, 165
LOSSES_A_ROW = 3
# Lines of several groups, where they cross and are pale, have more colours than one curve.
COLOURS = 200
# Above this share of an axis there is no room for a line of text.
NEAR_THE_TOP = 0.85
# The axis is logarithmic where numbers span more than this factor; its margin; the share of it that curves have.
SPAN, MARGIN, QUARTER = 8.0, 0.08, 0.25
UNITS = ((7200.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


class Style(NamedTuple):
    """How a group is drawn."""

    colour: str
    line: str


def curves(found: Comparison, *, dark: bool) -> dict[str, Picture]:
    """By name: "curves" and "losses", those of which there is anything to draw; `dark`: in both themes."""
    drawn: dict[str, Picture] = {}
    rows = [(one, measure) for one in found.sets for measure in one.measures if _is_finite(one, measure)]
    if rows:
        names = ", ".join(dict.fromkeys(measure.called(one.metric) for one, measure in rows))
        alt = f"{names} of {len(found.runs)} runs over images, steps and time"
        drawn["curves"] = figure_picture(alt, partial(_curves, found, rows), dark=dark, colours=COLOURS)
    losses = list(dict.fromkeys(name for run in found.runs for name in _losses(run)))
    if losses:
        alt = f"{' and '.join(losses)} of {len(found.runs)} runs over steps"
        drawn["losses"] = figure_picture(
            alt, lambda theme: _loss_curves(found, losses, theme), dark=dark, colours=COLOURS
        )
    return drawn


def _styles(groups: Sequence[Group], theme: Theme) -> dict[str, Style]:
    colours = ON_LIGHT if theme is LIGHT else ON_DARK
    return {
        group.label: Style(colours[i % len(colours)], LINES[i // len(colours) % len(LINES)])
        for i, group in enumerate(groups)
    }


def _is_finite(one: ComparableSet, measure: Measure) -> bool:
    return any(math.isfinite(value) for run in one.runs for _, value in _points(run, measure, "steps"))


def _points(run: ComparedRun, measure: Measure, over: str) -> list[tuple[float, float]]:
    """(place, number) of the finite ones, by place."""
    found = []
    for point in run.points:
        places = {"images": run.images(point.step), "steps": point.step, "time": run.seconds.get(point.step)}
        place, value = places[over], point.values.get(measure.key, math.nan)
        if place is not None and math.isfinite(value):
            found.append((float(place), value))
    return found


def _curves(found: Comparison, rows: Sequence[tuple[ComparableSet, Measure]], theme: Theme) -> Figure:
    styles = _styles(found.groups, theme)
    figure = file_figure(figsize=(WIDTH, _legend_height(found.groups) + ROW * len(rows)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(rows), 3, squeeze=False, sharey="row")
    for line, (one, measure) in zip(panels, rows, strict=True):
        for axes, over in zip(line, ("images", "steps", "time"), strict=True):
            _panel(axes, one, measure, over, styles, theme)
        _vertical(line, one, measure)
        _name_teachers(line[0], one, measure, theme)
        if one.name:
            line[0].set_title(f"set {one.name}", fontsize=10, loc="left")
    _legend(figure, panels.flat)
    return figure


def _panel(
    axes: Axes, one: ComparableSet, measure: Measure, over: str, styles: Mapping[str, Style], theme: Theme
) -> None:
    """The runs of a set, thin, and where a group has several their mean, strong; teachers' numbers are dashed."""
    every = [place for run in one.runs for place, _ in _points(run, measure, over)]
    scale, label = _unit(max(every, default=0.0), over)
    for group in one.groups:
        style = styles[group.label]
        alone = len(group.repeats) == 1
        for run in group.runs:
            points = _points(run, measure, over)
            if points:
                _line(axes, points, scale, style, group.label if alone else None, strong=alone or over == "time")
            if points and run.facts.state == "diverged":
                end = points[-1]
                axes.plot([end[0] / scale], [end[1]], color=style.colour, marker="x", markersize=9, markeredgewidth=2)
        mean = [] if alone else _mean([_points(run, measure, over) for run in group.repeats])
        if not alone and over != "time" and mean:
            _line(axes, mean, scale, style, f"{group.label}, mean of {len(group.repeats)}", strong=True)
    for value in _teachers(one, measure):
        axes.axhline(value, color=theme.faint, linestyle="--", linewidth=1.2, label="teacher")
    if not every:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=theme.faint)
    axes.set_xlabel(label)
    _horizontal(axes)


def _line(
    axes: Axes, points: Sequence[tuple[float, float]], scale: float, style: Style, label: str | None, *, strong: bool
) -> None:
    places, values = zip(*points, strict=True)
    axes.plot(
        [place / scale for place in places],
        values,
        color=style.colour,
        linestyle=style.line,
        linewidth=1.9 if strong else 0.9,
        alpha=1.0 if strong else 0.55,
        marker="o",
        markersize=3.4 if strong else 2.0,
        label=label,
    )


def _mean(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean where all runs of a group that were measured have a number."""
    known = [dict(points) for points in runs if points]
    if len(known) < 2:
        return []
    shared = sorted(set.intersection(*(set(points) for points in known)))
    return [(place, spread([points[place] for points in known]).mean) for place in shared]


def _teachers(one: ComparableSet, measure: Measure) -> dict[float, list[str]]:
    """The teachers' finite numbers, and the groups that each is of."""
    found: dict[float, list[str]] = {}
    for group in one.groups:
        for run in group.runs:
            value = run.teacher_values.get(measure.key, math.nan)
            if math.isfinite(value):
                same = next((known for known in found if significant(known) == significant(value)), value)
                names = found.setdefault(same, [])
                names += [group.label] * (group.label not in names)
    return found


def _vertical(line: Sequence[Axes], one: ComparableSet, measure: Measure) -> None:
    """The axis of the numbers, which the three panels share: it ends near the curves, to tell them apart."""
    values = [value for run in one.runs for _, value in _points(run, measure, "steps")]
    near = [value for value in _teachers(one, measure) if _is_near(value, values)]
    distance_axis(line[0], [*values, *near], span=SPAN, metric=measure.called(one.metric))
    low, high = min(*values, *near, math.inf), max(*values, *near, -math.inf)
    if line[0].get_yscale() == "log":
        line[0].set_ylim(low / 1.15, high * 1.15)
    else:
        margin = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
        line[0].set_ylim(low - margin, high + margin)
    for axes in line[1:]:
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def _name_teachers(axes: Axes, one: ComparableSet, measure: Measure, theme: Theme) -> None:
    """Each teacher's number beside its line, or in the corner towards which it lies outside."""
    teachers, (low, high) = _teachers(one, measure), axes.get_ylim()
    # Where no curve is: they fall where smaller is better, and rise elsewhere.
    upper, lower = (0.02, 0.98) if measure.higher else (0.98, 0.02)
    for value, names in teachers.items():
        whose = "" if len(teachers) == 1 else f" of {', '.join(names)}"
        text, system, place = f"teacher{whose} {significant(value)}", axes.transAxes, (upper, 0.97)
        _, at = axes.transAxes.inverted().transform(axes.transData.transform((0, value)))
        if low <= value <= high:
            system, place = axes.get_yaxis_transform(), (upper, value)
        elif value < low:
            text, place = f"{text}, below", (lower, 0.03)
        else:
            text += ", above"
        upwards = "bottom" if at < NEAR_THE_TOP else "top"
        axes.text(
            *place,
            text,
            transform=system,
            ha="right" if place[0] > 0.5 else "left",
            va=upwards,
            fontsize=8,
            color=theme.faint,
        )


def _is_near(teacher: float, values: Sequence[float]) -> bool:
    """Whether a teacher's number leaves the curves at least a quarter of the axis that has it."""
    low, high = min(values), max(values)
    all_low, all_high = min(low, teacher), max(high, teacher)
    if all_low > 0 and all_high > SPAN * all_low:
        low, high, all_low, all_high = map(math.log, (low, high, all_low, all_high))
    return all_low == all_high or (high - low) >= QUARTER * (all_high - all_low)


def _unit(most: float, over: str) -> tuple[float, str]:
    """What one mark of the axis is, and its name."""
    if over == "time":
        scale, unit = next((scale, unit) for least, scale, unit in UNITS if most >= least)
        return scale, f"training, {unit}"
    if over == "images":
        return (1000.0, "thousands of images") if most >= 10_000 else (1.0, "images")
    return 1.0, "steps"


def _horizontal(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlim(left=0)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, below them; what several of them have is named once."""
    named: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        columns = _legend_columns(list(named))
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )


def _legend_columns(labels: Sequence[str]) -> int:
    """How many fit beside each other; a line and the space around it are as wide as ten letters."""
    return max(1, min(len(labels), LETTERS // (max(map(len, labels)) + 10)))


def _legend_height(groups: Sequence[Group]) -> float:
    """Inches, of what names the groups."""
    counts = [len(group.repeats) for group in groups]
    labels = [f"{group.label}, mean of {n}" if n > 1 else group.label for group, n in zip(groups, counts, strict=True)]
    return LEGEND + LEGEND_ROW * (len(labels) // _legend_columns(labels))


def _losses(run: ComparedRun) -> list[str]:
    return [name for name in run.record.losses if np.isfinite(_values(run, name)[1]).any()]


def _values(run: ComparedRun, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps done, and the loss of each, NaN where it was not finite, of the lines that have it."""
    lines = [line for line in run.record.metrics if name in line]
    steps = np.array([line["step"] + 1 for line in lines])
    return steps, np.array([number(line.get(name)) for line in lines], dtype=float)


def _loss_curves(found: Comparison, names: Sequence[str], theme: Theme) -> Figure:
    styles, rows = _styles(found.groups, theme), -(-len(names) // LOSSES_A_ROW)
    columns = min(len(names), LOSSES_A_ROW)
    figure = file_figure(figsize=(WIDTH, _legend_height(found.groups) + ROW * rows), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        drawn = []
        for group in found.groups:
            for at, run in enumerate(group.runs):
                if name not in _losses(run):
                    continue
                steps, raw = _values(run, name)
                curve = smooth(steps, raw)
                drawn.append(curve.values)
                style = styles[group.label]
                label = group.label if at == 0 else None
                axes.plot(
                    curve.steps, curve.values, color=style.colour, linestyle=style.line, linewidth=1.2, alpha=0.8,
                    label=label,
                )  # fmt: skip
        every = np.concatenate(drawn)
        if ends := limits(every, every):
            axes.set_ylim(*ends)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        _horizontal(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    _legend(figure, panels)
    return figure
