"""A picture of a step's memory: bytes over time, with the phases, the permanent state and what was predicted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ipfm.engine.objectives.phases import Phase
from ipfm.engine.runtime.figures import file_figure
from ipfm.models.atomic_files import atomic_write

# A network's phases share a hue.
COLOURS: Mapping[Phase, str] = {
    "student: samples": "#dce9f7",
    "student: forward and backward": "#a9cdf0",
    "student: forward and backward, real": "#8bbae6",
    "student: optimiser": "#6ba3dc",
    "generator: samples": "#fdebd3",
    "generator: student": "#fbd3a0",
    "generator: teacher": "#f6b26b",
    "generator: backward": "#e8935a",
    "generator: optimiser": "#cc6f3c",
    "teacher: forward and backward": "#cfe8cf",
    "teacher: optimiser": "#8fc58f",
}


@dataclass(frozen=True)
class Span:
    """A phase from `start` to `end`, in seconds since the epoch of `time.perf_counter`."""

    phase: Phase
    start: float
    end: float

    @classmethod
    def starting(cls, phase: Phase) -> Span:
        """A phase that starts now."""
        now = time.perf_counter()
        return cls(phase, now, now)

    def ended(self) -> Span:
        """The same, ending now."""
        return replace(self, end=time.perf_counter())


@dataclass(frozen=True)
class Timeline:
    """One measured step; times in seconds since the epoch of `time.perf_counter`."""

    live: tuple[tuple[float, int], ...]
    """(time, bytes of tensors alive)."""
    resident: tuple[tuple[float, int], ...]
    """(time, resident bytes of the process)."""
    spans: tuple[Span, ...]
    """The phases in the order in which they ran."""

    def plot(self, path: Path | str, *, state: int, predicted: Mapping[str, int], title: str = "") -> None:
        """Write a PNG.

        Args:
            path: of the PNG.
            state: bytes of the permanent state, a horizontal line.
            predicted: by phase, bytes at its peak, permanent state included: dashed steps.
            title: above the plot.

        Raises:
            ValueError: there is no phase to draw.
        """
        if not self.spans:
            raise ValueError("no phase was measured: there is nothing to plot")
        origin, end = self.spans[0].start, self.spans[-1].end
        largest = max(state, *(value for _, value in self.live), *predicted.values(), 1)
        unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")

        figure = file_figure(figsize=(9, 5.4), dpi=150, layout="constrained")
        from matplotlib.patches import Patch

        axes = figure.add_subplot()
        for span in self.spans:
            axes.axvspan(span.start - origin, span.end - origin, color=COLOURS.get(span.phase, "#eeeeee"), linewidth=0)
        lines = []
        # Modules and libraries are resident too: the two curves start together.
        before = _since(self.resident, origin, end)[:1]
        shift = state - before[0][1] if before else 0
        resident = tuple((t, value + shift) for t, value in self.resident)
        for points, colour, label in (
            (resident, "#a0a0a0", "resident memory, from the state on"),
            (self.live, "#1f3f66", "tensors alive"),
        ):
            # What the last change before the first phase left, too.
            shown = [(max(t, origin) - origin, v / unit) for t, v in _since(points, origin, end)]
            if shown:
                times, values = zip(*shown, strict=True)
                lines += axes.plot(times, values, color=colour, linewidth=1.2, label=label, drawstyle="steps-post")
        lines.append(axes.axhline(state / unit, color="#444444", linewidth=1, linestyle=":", label="permanent state"))
        steps = [(span, predicted[span.phase] / unit) for span in self.spans if span.phase in predicted]
        for span, level in steps:
            axes.hlines(level, span.start - origin, span.end - origin, color="#b02020", linestyle="--", linewidth=1.2)
        if steps:
            lines += axes.plot([], [], color="#b02020", linestyle="--", linewidth=1.2, label="predicted peak")
        axes.set_xlim(0, max(end - origin, 1e-6))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel(name)
        axes.set_title(title)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        phases = list(dict.fromkeys(span.phase for span in self.spans))
        patches = [Patch(color=COLOURS.get(phase, "#eeeeee"), label=phase) for phase in phases]
        figure.legend(handles=[*lines, *patches], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        with atomic_write(path) as file:
            figure.savefig(file, format="png")


def _since(points: tuple[tuple[float, int], ...], start: float, end: float) -> list[tuple[float, int]]:
    """The points within [start, end], and the last one before."""
    before = [point for point in points if point[0] < start][-1:]
    return [*before, *(point for point in points if start <= point[0] <= end)]
