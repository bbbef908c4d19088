"""The tables of a comparison: cells for people, text for a terminal, CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ipfm.engine.commands.compare.facts import ComparableSet, Comparison
from ipfm.engine.commands.compare.runs import ComparedRun, length_of, place_of, surroundings
from ipfm.engine.commands.pages.target import check_place
from ipfm.engine.evaluation.metrics.measures import Measure, Measured
from ipfm.engine.runtime.wording import duration, significant
from ipfm.models.atomic_files import atomic_write

# What the first line of a file of ours begins with.
RUNS_BEGIN, EVALUATIONS_BEGIN = "run,group,set,seed,state,", "run,group,set,seed,step,"
MISSING = "-"


def is_numeric(heading: str) -> bool:
    """Whether a column has numbers, which stand to the right."""
    return heading not in ("run", "group", "set", "state", "made by", "network", "difference", "measure", "at")


def results(found: Comparison, one: ComparableSet) -> list[list[str]]:
    """The heading and a row for each run of a set, and for each teacher; numbers as the runs' own reports show them.

    Of several measures the best evaluation, and that at equal images, have the one that decides; CSV and JSON have all.
    """
    measures = one.measures
    names = [measure.called(one.metric) for measure in measures]
    decide = [measure for measure in measures if measure.metric == one.by] or list(measures[:1])
    images = one.common.images
    # Where there is one measure its name need not be said three times.
    whose = [f" {measure.called(one.metric)}" for measure in decide] if len(names) > 1 else [""]
    equal = [f"after {images:,} images{name}" for name in whose] if images is not None else []
    begin = ["run", "group", "state", "steps", "images", "NFE"]
    rows = [[*begin, *names, *(f"best{name}" for name in whose), "at step", *equal, "images/s", "time"]]
    for run in one.runs:
        best, at, facts = one.best(run), one.common.points.get(run.name), run.facts
        rows.append(
            [
                run.name,
                found.group_of(run),
                facts.state,
                length_of(run),
                _count(facts.images),
                MISSING if run.nfe is None else str(run.nfe),
                *(_shown(run.last, measure) for measure in measures),
                *(_shown(best, measure) for measure in decide),
                MISSING if best is None else f"{best.step:,}",
                *((_shown(at, measure) for measure in decide) if equal else ()),
                MISSING if facts.images_per_second is None else significant(facts.images_per_second),
                MISSING if facts.logged_seconds is None else duration(facts.logged_seconds),
            ]
        )
    return rows + [[*row, *[""] * (len(rows[0]) - len(row))] for row in _teachers(one, measures)]


def _teachers(one: ComparableSet, measures: Sequence[Measure]) -> Iterator[list[str]]:
    """A row for each different teacher's line; runs that measured more and less of one share it."""
    known: list[tuple[list[str], list[str]]] = []
    for run in one.runs:
        if run.teacher is None:
            continue
        cells = [str(run.teacher.nfe), *(run.teacher.shown(measure) for measure in measures)]
        for others, names in known:
            if all(a == b or MISSING in (a, b) for a, b in zip(cells, others, strict=True)):
                others[:] = [a if b == MISSING else b for a, b in zip(cells, others, strict=True)]
                names.append(run.name)
                break
        else:
            known.append((cells, [run.name]))
    for cells, names in known:
        whose = "teacher" if len(known) == 1 else f"teacher of {', '.join(names)}"
        yield [whose, "", "", "", "", *cells]


def spreads(one: ComparableSet) -> list[list[str]]:
    """The heading and a row for each group and measure: the spread over the runs; of groups of one run nothing."""
    rows = [["group", "measure", "at", "n", "mean", "SD", "smallest", "largest"]]
    for found in one.numbers:
        if found.spread.n > 1:
            mean, low, high, deviation, n = found.spread
            numbers = [significant(value) for value in (mean, deviation, low, high)]
            rows.append([found.group, found.measure.called(one.metric), _at(one, found.at), str(n), *numbers])
    return rows if len(rows) > 1 else []


def pairs(one: ComparableSet) -> list[list[str]]:
    """The heading and a row for each difference between two groups by the seeds that both have."""
    rows = [["difference", "measure", "at", "pairs", "mean", "SD", "95 % from", "to", "p"]]
    for one_found in one.differences:
        found = one_found.found
        numbers = (found.mean, found.deviation, found.low, found.high, found.p)
        shown = [significant(value) if math.isfinite(value) else MISSING for value in numbers]
        names = [f"{one_found.one} minus {one_found.other}", one_found.measure.called(one.metric)]
        rows.append([*names, _at(one, one_found.at), str(found.pairs), *shown])
    return rows if len(rows) > 1 else []


def places(found: Comparison) -> list[list[str]]:
    """The heading and a row for each run: where it was made."""
    return [["run", "made by"], *([run.name, place_of(run)] for run in found.runs)]


def differences(found: Comparison) -> dict[str, list[list[str]]]:
    """Kind of setting -> the heading and a row for each that differs, a column for each group."""
    tables: dict[str, list[list[str]]] = {}
    heading = ["", *(group.label for group in found.groups)]
    for row in found.differences:
        tables.setdefault(row.kind, [heading]).append([row.name, *row.values])
    return tables


def text(found: Comparison) -> str:
    """What the terminal shows: the tables of results, the differences between groups, the sentences."""
    parts = []
    for one in found.sets:
        parts.append((f"set {one.name}\n" if one.name else "") + aligned(results(found, one)))
        parts += [aligned(table) for table in (spreads(one), pairs(one)) if table]
    parts += found.sentences
    what = differences(found)
    parts += [f"differs, {kind}:\n{aligned(table)}" for kind, table in list(what.items())[:2]]
    return "\n\n".join([*parts, *found.remarks])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [i > 0 and is_numeric(name) for i, name in enumerate(rows[0])]

    def line(row: Sequence[str]) -> str:
        cells = (f"{cell:{'>' if r else '<'}{w}}" for cell, r, w in zip(row, right, widths, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])


# -- CSV ----------------------------------------------------------------------------------------------------------


def evaluations_path(path: Path) -> Path:
    """The second file beside the one of the runs."""
    return path.with_name(f"{path.stem}-evaluations{path.suffix}")


def check_csv(path: Path) -> None:
    """Check that both files can be written there and replace none but older ones.

    Raises:
        ValueError: they cannot.
    """
    check_place(path, "table", "csv")
    for place, begin in ((path, RUNS_BEGIN), (evaluations_path(path), EVALUATIONS_BEGIN)):
        if place.is_dir() or (place.exists() and not _begins(place, begin)):
            raise ValueError(f"{place} is there and is no table of this command: choose another --csv")


def _begins(path: Path, begin: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(begin)) == begin.encode()


def write_csv(found: Comparison, path: Path) -> None:
    """Write a line for each run into `path`, and a line for each evaluation into the file beside it.

    A cell is empty where something was not measured, and nan where it was not finite.

    Raises:
        OSError: the disk refuses.
    """
    for place, rows in ((path, _run_rows(found)), (evaluations_path(path), _evaluation_rows(found))):
        file_text = io.StringIO()
        csv.writer(file_text, lineterminator="\n").writerows(rows)
        with atomic_write(place) as file:
            file.write(file_text.getvalue().encode())


def _run_rows(found: Comparison) -> Iterator[list[object]]:
    measures = _all_measures(found)
    settings = [row for row in found.differences if row.name != "seed"]
    names = [name for m in measures for name in (m.key, f"best_{m.key}", f"equal_images_{m.key}", f"teacher_{m.key}")]
    yield [
        *RUNS_BEGIN.rstrip(",").split(","), "kind", "steps", "total_steps", "batch", "images", "nfe", "distance",
        "evaluated_images", "best_step", "equal_images", *names, "images_per_second", "seconds", "processes", "device",
        "precision", *(f"setting {row.name}" for row in settings),
    ]  # fmt: skip
    places = {run.name: (i, j) for i, group in enumerate(found.groups) for j, run in enumerate(group.runs)}
    for run in found.runs:
        one = found.set_of(run)
        best, at, facts, made = one.best(run), one.common.points.get(run.name), run.facts, surroundings(run)
        cells = [
            value
            for m in measures
            for value in (_csv(run.last, m), _csv(best, m), _csv(at, m), _number(run.teacher_values.get(m.key)))
        ]
        group, member = places[run.name]
        yield [
            *_begin(found, run), facts.state, facts.kind, facts.steps_done, _empty(facts.total_steps),
            _empty(facts.batch), _empty(facts.images), _empty(run.nfe), facts.metric,
            _empty(run.points[-1].images if run.points else None), _empty(best and best.step),
            _empty(at and run.images(at.step)), *cells, _number(facts.images_per_second),
            _number(facts.logged_seconds), made.get("processes", ""), made.get("device of a process", ""),
            _empty(run.record.config.get("precision")), *(row.of_runs[group][member] for row in settings),
        ]  # fmt: skip


def _evaluation_rows(found: Comparison) -> Iterator[list[object]]:
    measures = _all_measures(found)
    begin = EVALUATIONS_BEGIN.rstrip(",").split(",")
    yield [*begin, "images", "training_seconds", "evaluated_images", *(m.key for m in measures)]
    for run in found.runs:
        for point in run.points:
            yield [
                *_begin(found, run), point.step, _empty(run.images(point.step)), _number(run.seconds.get(point.step)),
                _empty(point.images), *(_csv(point, m) for m in measures),
            ]  # fmt: skip


def _begin(found: Comparison, run: ComparedRun) -> list[object]:
    return [run.name, found.group_of(run), found.set_of(run).name, _empty(run.record.config.get("seed"))]


def _all_measures(found: Comparison) -> list[Measure]:
    return list(dict.fromkeys(measure for one in found.sets for measure in one.measures))


def _csv(measured: Measured | None, measure: Measure) -> str:
    return _number(None if measured is None else measured.values.get(measure.key))


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _empty(value: object) -> object:
    return "" if value is None else value


def _shown(measured: Measured | None, measure: Measure) -> str:
    return MISSING if measured is None else measured.shown(measure)


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _at(one: ComparableSet, at: str) -> str:
    return f"{one.common.images:,} images" if at == "equal images" and one.common.images is not None else at
