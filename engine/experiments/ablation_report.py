"""What an ablation leaves: curves of the distance, their spread over seeds, where they diverged; CSV, PNG, table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.evaluation.results import DISTANCE, distance_axis
from ipfm.engine.experiments.repeats import spread
from ipfm.engine.runtime.figures import file_figure
from ipfm.engine.runtime.wording import significant
from ipfm.models.atomic_files import atomic_write

# A run has diverged where its distance stays beyond so many times its best one.
GROWTH = 5.0
COLUMNS = ("variant", "seed", "step", "kimg", "distance", "diverged")


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        variant: its name.
        seed: of the run.
        batch: images a step.
        points: (generator steps, distance) by increasing step, NaN where the training failed or the distance was not
            finite.
        nfe: network evaluations of an image.
        images_per_second: at which images were drawn, NaN where it was not measured.
    """

    variant: str
    seed: int
    batch: int
    points: tuple[tuple[int, float], ...]
    nfe: int = 1
    images_per_second: float = math.nan

    @property
    def diverged(self) -> int | None:
        """The step at which the run diverged; None where it did not, or recovered.

        From that step on every distance is not finite or more than `GROWTH` times the best of the run.
        """
        best = min((value for _, value in self.points if math.isfinite(value)), default=0.0)
        since = None
        for step, value in reversed(self.points):
            if math.isfinite(value) and value <= GROWTH * best:
                break
            since = step
        return since

    @property
    def best(self) -> float:
        """The lowest distance; NaN where none is finite."""
        return min((value for _, value in self.points if math.isfinite(value)), default=math.nan)

    @property
    def last(self) -> float:
        """The distance at the end; NaN for a run that failed."""
        return self.points[-1][1] if self.points else math.nan


def by_variant(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves of each variant, in the order in which variants come."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.variant, []).append(curve)
    return groups


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """Write a line for each evaluation, of `COLUMNS`.

    kimg: thousands of images that the generator was trained on; diverged, 0 or 1: whether the evaluation is one of
    those from `Curve.diverged` on.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for curve in curves:
        since = math.inf if curve.diverged is None else curve.diverged
        for step, value in curve.points:
            kimg = f"{step * curve.batch / 1000:g}"
            writer.writerow([curve.variant, curve.seed, step, kimg, repr(value), int(step >= since)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def table(
    curves: Sequence[Curve],
    teachers: Mapping[str, float],
    metric: str = DISTANCE,
    costs: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Markdown, a row for each variant.

    It has network evaluations of an image and images a second (of the fastest of its runs), its teacher's distance and,
    over its seeds, the mean and the smallest and largest of the distance at the start, of the best and of the last one;
    and how many runs diverged, and when. With `costs`, those of an iteration too: its passes, and its memory.
    """
    cost = "passes | memory | " if costs else ""
    lines = [
        f"| variant | NFE | images/s | {cost}teacher | {metric}: start | best | last | diverged |",
        f"|---|---|---|{'---|---|' if costs else ''}---|---|---|---|---|",
    ]
    for variant, group in by_variant(curves).items():
        start = spread([curve.points[0][1] for curve in group if curve.points])
        rate = max((c.images_per_second for c in group if math.isfinite(c.images_per_second)), default=math.nan)
        drawn = significant(rate) if math.isfinite(rate) else "-"
        cost = "".join(f"{part} | " for part in costs[variant]) if costs else ""
        lines.append(
            f"| {variant} | {group[0].nfe} | {drawn} | {cost}{significant(teachers[variant])} | {start} "
            f"| {ended(group)} |"
        )
    return "\n".join(lines) + "\n"


def ended(curves: Sequence[Curve]) -> str:
    """Three cells of a variant's row: its best and its last distances, and how many runs diverged, and when."""
    best, last = spread([curve.best for curve in curves]), spread([curve.last for curve in curves])
    since = [curve.diverged for curve in curves if curve.diverged is not None]
    when = f", from step {min(since)}" if since else ""
    return f"{best} | {last} | {len(since)} of {len(curves)}{when}"


def sentence(curves: Sequence[Curve]) -> str:
    """Which variant ends lowest, which comes next, whether their seeds overlap, and which diverged: the facts alone."""
    groups = by_variant(curves)
    ends = {
        variant: spread([curve.last for curve in group])
        for variant, group in groups.items()
        if all(curve.diverged is None for curve in group)
    }
    ranking = sorted((end.mean, variant) for variant, end in ends.items() if math.isfinite(end.mean))
    gone = [variant for variant in groups if variant not in ends]
    parts = ["In every variant some run diverged"] if not ranking else [f"{ranking[0][1]} ends lowest"]
    if len(ranking) > 1:
        first, second = ends[ranking[0][1]], ends[ranking[1][1]]
        overlap = "overlap" if second.low <= first.high else "do not overlap"
        parts[0] += f" ({significant(first.mean)}), before {ranking[1][1]} ({significant(second.mean)})"
        if all(len(group) > 1 for group in groups.values()):
            parts.append(f"the ranges of their seeds {overlap}")
    if gone and ranking:
        parts.append(f"some run of {', '.join(gone)} diverged")
    return "; ".join(parts) + "."


def plot(
    curves: Sequence[Curve], teachers: Mapping[str, float], path: Path, title: str = "", metric: str = DISTANCE
) -> None:
    """Write a PNG of the distance over thousands of images.

    It has a line for each variant's mean over the seeds whose distance is finite, a band from the smallest to the
    largest, a cross where a run diverged, dashed lines for teachers. The axis is logarithmic where the distances span
    more than a factor of 5.

    Raises:
        ValueError: nothing finite to draw.
    """
    groups = by_variant(curves)
    finite = [value for curve in curves for _, value in curve.points if math.isfinite(value)]
    if not finite:
        raise ValueError(f"no finite {metric} to plot")
    figure = file_figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(groups) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    known = {v: d for v, d in teachers.items() if v in groups and math.isfinite(d)}
    shared = len(set(known.values())) == 1
    for number, (variant, group) in enumerate(groups.items()):
        colour = colours[number % len(colours)]
        steps = sorted({step for curve in group for step, value in curve.points if math.isfinite(value)})
        spreads = [spread([value for curve in group for s, value in curve.points if s == step]) for step in steps]
        images = [step * group[0].batch / 1000 for step in steps]
        gone = [curve for curve in group if curve.diverged is not None]
        label = f"{variant} (diverged: {len(gone)} of {len(group)})" if gone else variant
        axes.plot(images, [s.mean for s in spreads], color=colour, marker="o", markersize=3, label=label)
        axes.fill_between(
            images, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.18, linewidth=0
        )
        for curve in gone:
            step = curve.diverged
            assert step is not None
            height = dict(curve.points)[step]
            top = height if math.isfinite(height) else max(finite)
            axes.plot([step * curve.batch / 1000], [top], color=colour, marker="x", markersize=9, markeredgewidth=2)
        if variant in known and not shared:
            axes.axhline(known[variant], color=colour, linestyle="--", linewidth=1, alpha=0.8)
    if known and shared:
        distance = next(iter(known.values()))
        axes.axhline(distance, color="#555555", linestyle="--", linewidth=1, label=f"teacher {significant(distance)}")
    elif known:
        axes.plot([], [], color="#555555", linestyle="--", linewidth=1, label="teachers, by colour")
    distance_axis(axes, [*finite, *known.values()], span=5, metric=metric)
    axes.set_xlabel("thousands of images")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
