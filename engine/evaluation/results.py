"""What an evaluation leaves on disk: table of results, curves of convergence, log of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipfm.engine.checks import number
from ipfm.engine.evaluation.metrics.evaluate import FrechetResult
from ipfm.engine.evaluation.metrics.measures import DISTANCE, FID, Measured, Metric, measures_of, merit, notes
from ipfm.engine.runtime.figures import file_figure
from ipfm.engine.runtime.files import StepLog, json_line
from ipfm.engine.runtime.wording import significant
from ipfm.models.atomic_files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


RESULTS = "results.json"
# The teacher's line of it, where the run goes on.
TEACHER_RESULTS = "teacher-results.json"


def is_better(value: float, than: float | None, *, higher: bool = False) -> bool:
    """Whether an evaluation beats an earlier one.

    What is not finite never wins, and of two that are equal the earlier one stays.

    Args:
        value: a distance, or another number by which the two are compared.
        than: the earlier one's, None where there is none.
        higher: larger is better, as of `merit`.
    """
    if than is None or not math.isfinite(than):
        return math.isfinite(value)
    return math.isfinite(value) and (value > than if higher else value < than)


class EvaluationHistory:
    """What was measured over training, in folder/evaluations.jsonl: a line an evaluation, by the keys of `MEASURES`.

    `step` counts the generator steps done before the evaluation, so the evaluation at `first_step` belongs to the
    checkpoint that a run resumes from: on resume, lines with step > first_step are dropped (metrics.jsonl, whose
    lines are numbered by the step they report, drops step ≥ first_step). None opens the history of another run
    without changing it. A step evaluated twice counts once, with its last value.
    """

    def __init__(self, folder: Path | str, first_step: int | None = None) -> None:
        self._log = StepLog(Path(folder) / "evaluations.jsonl", None if first_step is None else first_step + 1)

    def add(self, step: int, distance: float | None, **facts: object) -> None:
        """Append an evaluation, with further `facts` (images, seconds …), and write it at once; None: no distance."""
        measured = {} if distance is None else {"frechet": float(distance)}
        self._log.append(step, {**measured, **facts})
        self._log.flush()

    def add_result(
        self,
        step: int,
        result: FrechetResult,
        *,
        average: str = "",
        averages: Mapping[str, FrechetResult] | None = None,
    ) -> None:
        """Append all that an evaluation after `step` steps found, and write it at once.

        Args:
            step: steps done.
            result: what was found; of several averages that of the one that is exported.
            average: its name.
            averages: of several, what was found of each, under "averages" in the line.
        """
        facts: dict[str, object] = _facts_of(result)
        if averages:
            each = {name: _found_of(one) | _facts_of(one) for name, one in averages.items()}
            facts |= {"average": average, "averages": each}
        self.add(step, result.distance if "fid" in result.metrics else None, **facts)

    @property
    def points(self) -> list[tuple[int, float]]:
        """(step, Fréchet distance), see `points_of`."""
        return self.points_of("frechet")

    def points_of(self, key: str, average: str | None = None) -> list[tuple[int, float]]:
        """(step, number) by increasing step, of the evaluations that measured it; one that was not finite is NaN.

        Args:
            key: of one of MEASURES.
            average: name of one of several averages; None takes the one that was to be exported.
        """
        last = {line["step"]: line if average is None else _of(line, average) for line in self._log.read()}
        found = {step: line[key] for step, line in last.items() if key in line}
        return sorted((step, math.nan if value is None else float(value)) for step, value in found.items())

    @property
    def averages(self) -> list[str]:
        """Names of the averages that were measured, where there were several."""
        return list(dict.fromkeys(name for line in self._log.read() for name in _averages(line)))

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The evaluations by increasing step, as they were written."""
        last = {line["step"]: line for line in self._log.read()}
        return [last[step] for step in sorted(last)]

    @property
    def images_per_second(self) -> float:
        """At which the images of the fastest evaluation were drawn; NaN where no time was recorded."""
        lines = [line for line in self._log.read() if line.get("seconds") and line.get("images")]
        return max((line["images"] / line["seconds"] for line in lines), default=math.nan)


def best_average(line: Mapping[str, Any], names: Sequence[str], metric: Metric) -> str:
    """Name of the average that an evaluation found the best, the first of equal ones; "" where it says nothing of them.

    Args:
        line: of `EvaluationHistory.lines`.
        names: of the averages that are asked about.
        metric: what decides.
    """
    best, most = "", None
    for name in names:
        worth = merit(metric, {k: number(v) for k, v in _of(line, name).items() if isinstance(v, (int, float))})
        if is_better(worth, most, higher=True):
            best, most = name, worth
    return best


def _averages(line: Mapping[str, Any]) -> Mapping[str, Any]:
    found = line.get("averages")
    return found if isinstance(found, dict) else {}


def _of(line: Mapping[str, Any], average: str) -> Mapping[str, Any]:
    found = _averages(line).get(average)
    return found if isinstance(found, dict) else {}


def _found_of(result: FrechetResult) -> dict[str, object]:
    return {"frechet": result.distance} if "fid" in result.metrics else {}


def _facts_of(result: FrechetResult) -> dict[str, object]:
    facts: dict[str, object] = {"images": result.images, "seconds": round(result.seconds, 3)}
    if result.left_out:
        facts["left_out"] = result.left_out
    if result.name == FID:
        facts["name"] = result.name
    return facts | {name: value for name, value in result.to_json().items() if name in result.others}


@dataclass(frozen=True)
class EvaluationRow(Measured):
    """One line of the table of results; `Measured` has what it may have beside the distance.

    Args:
        label: which network, such as "generator" or "teacher".
        steps: K of a few-step generator, None for a teacher.
        nfe: network evaluations an image.
        frechet: distance of `images` images, NaN where it was not measured.
        images: how many were drawn.
        images_per_second: over all ranks.
        paper: the published figure as text, None where there is none. It compares only where `frechet` is an FID, with
            Inception features and 50 000 images.
        metric: what the distance is called, "FID" for those features.
        left_out: how many images more were drawn, which were not finite.
    """

    label: str
    steps: int | None
    nfe: int
    frechet: float
    images: int
    images_per_second: float
    paper: str | None = None
    metric: str = DISTANCE
    left_out: int = 0


def results_table(rows: Sequence[EvaluationRow]) -> str:
    """Aligned plain text, a line per row in the order given; the column of the paper only if a row has a figure.

    Below it is a line for each network that made images that were not finite, and for what is to be known of a number.
    """
    names = {row.metric for row in rows}
    distance = names.pop() if len(names) == 1 else DISTANCE
    measures = measures_of([metric for row in rows for metric in row.metrics] or ("fid",))
    header = ["network", "steps", "NFE", *(one.called(distance) for one in measures), "images", "images/s"]
    cells = [
        [
            row.label,
            "-" if row.steps is None else str(row.steps),
            str(row.nfe),
            *map(row.shown, measures),
            str(row.images),
            significant(row.images_per_second),
        ]
        for row in rows
    ]
    if any(row.paper for row in rows):
        header.append("paper")
        cells = [[*line, row.paper or "-"] for line, row in zip(cells, rows, strict=True)]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    # Text to the left, numbers to the right.
    align = ["<" if name in ("network", "paper") else ">" for name in header]

    def join(line: Sequence[str]) -> str:
        return "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip()

    remarks = [
        f"{row.label}: {row.left_out:,} of {row.images + row.left_out:,} images were not finite and are left out"
        for row in rows
        if row.left_out
    ]
    lines = [join(header), "  ".join("-" * w for w in widths), *map(join, cells), *remarks, *notes(rows, distance)]
    return "\n".join(lines) + "\n"


def write_results(folder: Path | str, rows: Sequence[EvaluationRow]) -> None:
    """Write folder/results.json, a list of the rows' fields (non-finite numbers null), and folder/results.txt."""
    _write_rows(Path(folder) / RESULTS, rows)
    with atomic_write(Path(folder) / "results.txt") as file:
        file.write(results_table(rows).encode())
    (Path(folder) / TEACHER_RESULTS).unlink(missing_ok=True)


def forget_results(folder: Path) -> None:
    """Remove results.json, which no longer holds where a run goes on; its teacher's line does, and is kept.

    Raises:
        OSError: the disk refuses.
    """
    teacher = [row for row in read_results(folder) if row.label == "teacher"]
    if teacher:
        _write_rows(folder / TEACHER_RESULTS, teacher)
    (folder / RESULTS).unlink(missing_ok=True)


def _write_rows(path: Path, rows: Sequence[EvaluationRow]) -> None:
    lines = ",\n".join(f"  {json_line(row.to_json())}" for row in rows)
    with atomic_write(path) as file:
        file.write(f"[\n{lines}\n]\n".encode())


@dataclass(frozen=True)
class Curve:
    """A number over training.

    Args:
        points: (step, number), in any order; those that are not finite are left out.
        teacher: the teacher's, None where it was not measured.
        name: of the number, for people.
    """

    points: Sequence[tuple[int, float]]
    teacher: float | None
    name: str

    @property
    def is_finite(self) -> bool:
        """There is anything to draw."""
        return any(math.isfinite(value) for _, value in self.points)


def plot_convergence(
    history: Sequence[tuple[int, float]],
    teacher: float | None,
    path: Path | str,
    title: str = "",
    metric: str = DISTANCE,
    others: Sequence[Curve] = (),
) -> None:
    """Write a PNG of the Fréchet distance over generator steps, with the teacher's as a dashed line.

    The axis is logarithmic where the distances span more than a factor of 20. Non-finite distances are left out.

    Args:
        history: (step, distance), in any order.
        teacher: the teacher's distance, None where it was not measured.
        path: of the PNG, which is replaced whole or not at all.
        title: above the plot.
        metric: what the distance is called.
        others: further numbers, each in a panel of its own below; a panel without a finite number is left out.

    Raises:
        ValueError: nothing finite to draw.
    """
    curves = [Curve(history, teacher, metric), *others]
    drawn = [curve for curve in curves if curve.is_finite]
    if not drawn:
        raise ValueError(f"no finite {' or '.join(curve.name for curve in curves)} to plot")
    figure = file_figure(figsize=(7, 1.2 + 3 * len(drawn)), dpi=150, layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for axes, curve in zip(panels, drawn, strict=True):
        draw_convergence(axes, curve.points, curve.teacher, curve.name)
        axes.label_outer()
    panels[0].set_title(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def draw_convergence(
    axes: Axes,
    history: Sequence[tuple[int, float]],
    teacher: float | None,
    metric: str,
    *,
    label: str = "generator",
    colour: str = "#1f5fa8",
    ink: str = "#555555",
) -> None:
    """Draw what `plot_convergence` writes: the network `label` in `colour`, the teacher in `ink`.

    Raises:
        ValueError: nothing finite to draw.
    """
    from matplotlib.ticker import MaxNLocator

    points = sorted((step, value) for step, value in history if math.isfinite(value))
    if not points:
        raise ValueError(f"no finite {metric} to plot")
    teacher = teacher if teacher is not None and math.isfinite(teacher) else None
    steps, distances = zip(*points, strict=True)
    axes.plot(steps, distances, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
    # To the right, where no curve is.
    axes.annotate(
        significant(distances[-1]), (steps[-1], distances[-1]), xytext=(7, 0), textcoords="offset points", va="center"
    )
    if teacher is not None:
        axes.axhline(teacher, color=ink, linestyle="--", linewidth=1.2, label=f"teacher {significant(teacher)}")
    distance_axis(axes, [*distances, *([] if teacher is None else [teacher])], span=20, metric=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.set_xlabel("generator steps" if label == "generator" else "steps")
    axes.legend(frameon=False)


def distance_axis(axes: Axes, values: Sequence[float], *, span: float, metric: str) -> None:
    """Make the vertical axis one of distances, or of other numbers.

    It is logarithmic where `values`, all finite, span more than a factor `span`, else it has 0 at its bottom; where
    some are negative, as a kernel distance may be, it has all of them, and a line at 0.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    if min(values) > 0 and max(values) > span * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
    else:
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="major")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def read_results(folder: Path | str, name: str = "results.json") -> list[EvaluationRow]:
    """The rows that `write_results` left in `folder`, or the file `name` has; none where there are none to read."""
    known = {f.name for f in fields(EvaluationRow)}
    try:
        lines = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        return [EvaluationRow(**{k: v for k, v in line.items() if k in known}) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
