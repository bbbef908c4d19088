"""The curves of a report as PNG, for a light and for a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipfm.engine.checks import number
from ipfm.engine.commands.pages.picture import Picture
from ipfm.engine.commands.pages.theme import DPI, Theme, figure_picture
from ipfm.engine.commands.report.facts import Facts
from ipfm.engine.evaluation.metrics.measures import measures_of
from ipfm.engine.evaluation.results import Curve, draw_convergence
from ipfm.engine.runtime.figures import file_figure
from ipfm.engine.runtime.wording import significant
from ipfm.engine.training.run_state import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The smoothed curve is the mean over this share of the steps.
WINDOW = 1 / 30
# Where single values reach further than this many times the range of the 98 % in the middle, the axis leaves them out.
OUTLYING = 3.0


class Smoothed(NamedTuple):
    """A curve without its noise; `values` (N,) are NaN where nothing near was finite."""

    steps: np.ndarray
    values: np.ndarray


def curves(record: RunRecord, facts: Facts, *, dark: bool) -> dict[str, Picture]:
    """By name: "distance", "losses" and "pace", those of which there is anything to draw; `dark`: in both themes."""

    def both(alt: str, draw: Callable[[Theme], Figure]) -> Picture:
        return figure_picture(alt, draw, dark=dark)

    found: dict[str, Picture] = {}
    drawn = [curve for curve in _measured(facts) if curve.is_finite]
    if drawn:
        alt = ", ".join(_said(curve) for curve in drawn)
        found["distance"] = both(alt, lambda theme: _distance(drawn, facts, theme))
    if any(np.isfinite(_values(record, loss.name)).any() for loss in facts.losses):
        alt = f"{' and '.join(loss.name for loss in facts.losses)} over steps"
        found["losses"] = both(alt, lambda theme: _losses(record, facts, theme))
    if len(facts.pace) > 1 and facts.images_per_second is not None:
        alt = f"images/s over steps, {significant(facts.images_per_second)} in the median"
        found["pace"] = both(alt, lambda theme: _pace(facts, theme))
    return found


def smooth(steps: np.ndarray, values: np.ndarray) -> Smoothed:
    """The mean of the finite values around each step; the window is cut at the ends."""
    half = max(1, round(len(values) * WINDOW)) // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    count = counts[last] - counts[first]
    means = np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)
    return Smoothed(steps, means)


def limits(raw: np.ndarray, smoothed: np.ndarray) -> tuple[float, float] | None:
    """Ends of an axis that leaves single far values out; None where all fit."""
    raw, smoothed = raw[np.isfinite(raw)], smoothed[np.isfinite(smoothed)]
    low, high = np.percentile(raw, [1, 99])
    if not raw.max() - raw.min() > OUTLYING * (high - low) > 0:
        return None
    low, high = min(low, smoothed.min()), max(high, smoothed.max())
    margin = 0.1 * (high - low)
    return float(low - margin), float(high + margin)


def _measured(facts: Facts) -> list[Curve]:
    """What was measured over training."""
    return [
        Curve(
            [(e.step, e.values[measure.key]) for e in facts.evaluations if measure.key in e.values],
            facts.teacher_values.get(measure.key),
            measure.called(facts.metric),
        )
        for measure in measures_of(facts.metrics)
    ]


def _said(curve: Curve) -> str:
    finite = [value for _, value in sorted(curve.points) if math.isfinite(value)]
    return f"{curve.name} over steps, from {significant(finite[0])} to {significant(finite[-1])}"


def _distance(drawn: Sequence[Curve], facts: Facts, theme: Theme) -> Figure:
    figure = file_figure(figsize=(9, 0.9 + 3 * len(drawn)), dpi=DPI, layout="constrained")
    whose = "teacher" if facts.kind == "teacher" else "generator"
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for axes, curve in zip(panels, drawn, strict=True):
        draw_convergence(
            axes, curve.points, curve.teacher, curve.name, label=whose, colour=theme.curves[0], ink=theme.faint
        )
        axes.set_xlim(left=0)
        axes.label_outer()  # the steps are below the last one
    return figure


def _losses(record: RunRecord, facts: Facts, theme: Theme) -> Figure:
    names = [loss.name for loss in facts.losses]
    figure, all_axes = _figure(len(names), 9, 3.4)
    for axes, name, colour in zip(all_axes, names, theme.curves * len(names), strict=False):
        steps = np.array([line["step"] + 1 for line in record.metrics])
        raw = _values(record, name)
        axes.set_title(name, fontsize=10)
        if not np.isfinite(raw).any():
            axes.text(0.5, 0.5, "never finite", transform=axes.transAxes, ha="center")
            continue
        curve = smooth(steps, raw)
        axes.plot(steps, raw, color=colour, alpha=0.28, linewidth=0.8, label="each step")
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.8, label="smoothed")
        if ends := limits(raw, curve.values):
            axes.set_ylim(*ends)
            axes.set_title("single values lie outside", fontsize=7.5, loc="right", color=theme.faint)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=theme.faint, linewidth=0.9, linestyle=":")
        # "best" looks at every point, of which there may be half a million.
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        _plain_axes(axes, "steps")
    return figure


def _pace(facts: Facts, theme: Theme) -> Figure:
    figure, (axes,) = _figure(1, 9, 2.6)
    steps, speeds = zip(*facts.pace, strict=True)
    median = facts.images_per_second
    assert median is not None
    axes.plot(steps, speeds, color=theme.curves[0], linewidth=1.2, marker="o", markersize=2.5)
    axes.axhline(median, color=theme.faint, linestyle="--", linewidth=1, label=f"median {significant(median)}")
    axes.set_ylim(0, 1.15 * min(max(speeds), 3 * median))
    _plain_axes(axes, "steps")
    axes.set_ylabel("images/s")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _figure(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = file_figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _plain_axes(axes: Axes, label: str) -> None:
    """Once everything is drawn."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _values(record: RunRecord, name: str) -> np.ndarray:
    """(lines,) of metrics.jsonl, NaN where the loss is missing or was not finite."""
    return np.array([number(line.get(name)) for line in record.metrics], dtype=float)
