"""What a comparison says: tables, statistics over seeds, sentences; each number is one that a run's own report has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, Literal

from ipfm.engine.commands.compare.runs import ComparedRun, comparable_sets, incomparable, same_latents, surroundings
from ipfm.engine.commands.compare.settings import SEED, DifferenceRow, Group, differences, grouped, letter
from ipfm.engine.evaluation.metrics.measures import Measure, Metric, measures_of
from ipfm.engine.experiments.repeats import PairedDifference, Spread, paired_difference, spread
from ipfm.engine.runtime.json_output import plain
from ipfm.engine.runtime.versions import installed
from ipfm.engine.runtime.wording import counted, significant
from ipfm.engine.training.run_state import EvaluationPoint

At = Literal["equal images", "best"]
# With more groups each is compared with the first alone.
MOST_PAIRED = 4
ALONE = (
    "One run each says little: in the digits recipe the number of processes alone moved a distance by 0.06, and alpha "
    "by less. Repeat the runs with other seeds (--seed) to see which differences are more than chance."
)


@dataclass(frozen=True)
class Common:
    """Where the runs of a set are compared: the largest number of images after which all of them were measured.

    Attributes:
        images: that the networks were trained on; None where no two runs have one.
        exact: they were measured after that very number; else each at its last evaluation before.
        points: the evaluation of each run by its name; where all have none together, of as many as possible.
    """

    images: int | None
    exact: bool
    points: Mapping[str, EvaluationPoint]


@dataclass(frozen=True)
class GroupNumbers:
    """A measure of a group: its spread over the runs."""

    group: str
    measure: Measure
    at: At
    spread: Spread


@dataclass(frozen=True)
class GroupDifference:
    """A measure of one group minus that of another, by the seeds that both have."""

    one: str
    other: str
    measure: Measure
    at: At
    found: PairedDifference


@dataclass(frozen=True)
class ComparableSet:
    """Runs whose numbers compare."""

    name: str
    """A letter; of the only set nothing."""
    runs: tuple[ComparedRun, ...]
    groups: tuple[Group, ...]
    metric: str
    """What the distance is called."""
    by: Metric | None
    """What best evaluations are chosen by; None where the runs share no metric: each by its own."""
    common: Common
    numbers: tuple[GroupNumbers, ...]
    differences: tuple[GroupDifference, ...]
    sentences: tuple[str, ...]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers that some run has."""
        return measures_of(metric for run in self.runs for metric in run.record.measured)

    def best(self, run: ComparedRun) -> EvaluationPoint | None:
        """The best evaluation of a run by what decides here."""
        return run.best(self.by or run.record.measured[0])

    def chosen_by(self) -> str:
        """What best evaluations are chosen by, for people."""
        if self.by is None:
            return "the metric that each run names first"
        return " and ".join(measure.called(self.metric) for measure in measures_of((self.by,)))


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other."""

    runs: tuple[ComparedRun, ...]
    groups: tuple[Group, ...]
    sets: tuple[ComparableSet, ...]
    differences: tuple[DifferenceRow, ...]
    remarks: tuple[str, ...]
    """What must not be overlooked: a sentence each."""
    other_latents: str | None
    """Why images in the same place are not of the same latent; None where they are."""
    made: str

    @property
    def sentences(self) -> list[str]:
        """Those of all sets: what holds for several of them once, what is of one set alone with its letter."""
        every = [(one.name, sentence) for one in self.sets for sentence in one.sentences]
        shared = {text for _, text in every if sum(text == other for _, other in every) > 1}
        own = [f"Set {name}: {text}" if name else text for name, text in every if text not in shared]
        return [*own, *dict.fromkeys(text for _, text in every if text in shared)]

    def group_of(self, run: ComparedRun) -> str:
        """The name of a run's group."""
        return next(group.label for group in self.groups if run in group.runs)

    def set_of(self, run: ComparedRun) -> ComparableSet:
        """The set that a run is in."""
        return next(one for one in self.sets if run in one.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, see `plain`."""
        labels = [group.label for group in self.groups]
        found: dict[str, Any] = plain(
            {
                "format": 1,
                "runs": [self._run(run) for run in self.runs],
                "groups": [{"group": g.label, "runs": [r.name for r in g.runs], "seeds": g.seeds} for g in self.groups],
                "differences": [
                    {"kind": row.kind, "name": row.name, "values": dict(zip(labels, row.values, strict=True))}
                    for row in self.differences
                ],
                "sets": [_set(one) for one in self.sets],
                "same_latents": self.other_latents is None,
                "remarks": self.remarks,
                "made": self.made,
            }
        )
        return found

    def _run(self, run: ComparedRun) -> dict[str, Any]:
        ours = self.set_of(run)
        facts, best, at = run.facts, ours.best(run), ours.common.points.get(run.name)
        names = ("kind", "state", "steps_done", "total_steps", "batch", "images", "metric", "metrics")
        return {
            "run": run.name,
            "path": str(run.record.path),
            "group": self.group_of(run),
            "set": ours.name,
            "seed": run.record.config.get("seed"),
            **{name: getattr(facts, name) for name in names},
            "nfe": run.nfe,
            "last": None if run.last is None else run.last.to_json(),
            "best": None if best is None else best.to_json(),
            "at_equal_images": None if at is None else at.to_json(),
            "averages": {name: [point.to_json() for point in points] for name, points in run.record.averages.items()},
            "teacher_values": run.teacher_values,
            "evaluations": [
                {
                    **point.to_json(),
                    "trained_images": run.images(point.step),
                    "trained_seconds": run.seconds.get(point.step),
                }
                for point in run.points
            ],
            "results": [row.to_json() for row in facts.results],
            "images_per_second": facts.images_per_second,
            "logged_seconds": facts.logged_seconds,
            "surroundings": surroundings(run),
            "problems": run.record.problems,
        }


def _set(one: ComparableSet) -> dict[str, Any]:
    return {
        "set": one.name,
        "runs": [run.name for run in one.runs],
        "metric": one.metric,
        "best_by": one.by,
        "equal_images": one.common.images,
        "equal_images_exact": one.common.exact,
        "groups": [{"group": n.group, "measure": n.measure.key, "at": n.at, **n.spread._asdict()} for n in one.numbers],
        "paired_differences": [
            {"group": d.one, "minus": d.other, "measure": d.measure.key, "at": d.at, **d.found._asdict()}
            for d in one.differences
        ],
        "sentences": one.sentences,
    }


def comparison(runs: Sequence[ComparedRun]) -> Comparison:
    """See `Comparison`."""
    groups = grouped(runs)
    found = comparable_sets(runs)
    sets = tuple(
        _comparable(letter(number) if len(found) > 1 else "", members, groups) for number, members in enumerate(found)
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Comparison(
        runs=tuple(runs),
        groups=tuple(groups),
        sets=sets,
        differences=tuple(differences(groups)),
        remarks=tuple(_remarks(runs, groups, sets)),
        other_latents=same_latents(runs),
        made=f"Made by ipfm {installed('ipfm')} on {made}.",
    )


def _comparable(name: str, runs: Sequence[ComparedRun], groups: Sequence[Group]) -> ComparableSet:
    own = [replace(group, runs=tuple(run for run in group.runs if run in runs)) for group in groups]
    own = [group for group in own if group.runs]
    shared = [m for m in runs[0].record.measured if all(m in run.record.measured for run in runs)]
    measured = [run for run in runs if run.points] or runs
    found = ComparableSet(
        name=name,
        runs=tuple(runs),
        groups=tuple(own),
        metric=measured[0].record.metric,
        by=shared[0] if shared else None,
        common=_common(runs),
        numbers=(),
        differences=(),
        sentences=(),
    )
    found = replace(found, numbers=tuple(_numbers(found)))
    found = replace(found, differences=tuple(_differences(found)))
    return replace(found, sentences=tuple(_sentences(found)))


def _common(runs: Sequence[ComparedRun]) -> Common:
    """Of the runs that have not diverged: the values of one that has say where it was when it did."""
    going = [run for run in runs if run.facts.state != "diverged" and run.points]
    at = {run.name: {images: point for point in run.points if (images := run.images(point.step))} for run in going}
    if len(going) < 2 or not all(at.values()):
        return Common(None, False, {})
    shared = set.intersection(*(set(points) for points in at.values()))
    if shared:
        most = max(shared)
        return Common(most, True, {name: points[most] for name, points in at.items()})
    reached = min(max(points) for points in at.values())
    before = {name: max((n for n in points if n <= reached), default=None) for name, points in at.items()}
    if None in before.values():
        return _shared_by_most(at)
    return Common(reached, False, {name: at[name][n] for name, n in before.items() if n is not None})


def _shared_by_most(at: Mapping[str, Mapping[int, EvaluationPoint]]) -> Common:
    """After which images most of the runs were measured, the largest such number; a branch begins where others end."""
    counts = Counter(images for points in at.values() for images in points)
    images, count = max(counts.items(), key=lambda found: (found[1], found[0]))
    if count < 2:
        return Common(None, False, {})
    return Common(images, True, {name: points[images] for name, points in at.items() if images in points})


def _values(one: ComparableSet, run: ComparedRun, measure: Measure, at: At) -> float:
    """A measure of a run; NaN where it has none."""
    point = one.common.points.get(run.name) if at == "equal images" else one.best(run)
    return math.nan if point is None else point.values.get(measure.key, math.nan)


def _numbers(one: ComparableSet) -> Iterator[GroupNumbers]:
    for measure in one.measures:
        for at in _places(one):
            for group in one.groups:
                found = spread([_values(one, run, measure, at) for run in group.repeats])
                yield GroupNumbers(group.label, measure, at, found)


def _places(one: ComparableSet) -> tuple[At, ...]:
    return ("equal images", "best") if one.common.points else ("best",)


def _differences(one: ComparableSet) -> Iterator[GroupDifference]:
    repeated = [group for group in one.groups if len(set(group.seeds)) > 1]
    # Of two runs that are alone the table says it.
    pairs = [pair for pair in combinations(one.groups, 2) if pair[0] in repeated or pair[1] in repeated]
    if len(one.groups) > MOST_PAIRED:
        pairs = [pair for pair in pairs if pair[0] == one.groups[0]]
    for measure in one.measures:
        for at in _places(one):
            for first, second in pairs:
                found = paired_difference(_by_seed(one, first, measure, at), _by_seed(one, second, measure, at))
                if found.pairs:
                    yield GroupDifference(first.label, second.label, measure, at, found)


def _by_seed(one: ComparableSet, group: Group, measure: Measure, at: At) -> dict[int, float]:
    """Seed -> value; of several runs of one seed their mean."""
    found: dict[int, list[float]] = {}
    for run in group.repeats:
        if isinstance(seed := run.record.config.get(SEED), int):
            found.setdefault(seed, []).append(_values(one, run, measure, at))
    return {seed: spread(values).mean for seed, values in found.items()}


# -- what is said in sentences ------------------------------------------------------------------------------------


def _sentences(one: ComparableSet) -> Iterator[str]:
    if len(one.groups) > 1 and one.by is not None:
        yield from _ranking(one, one.by)
    yield from _of_equal_images(one)
    for run in one.runs:
        if words := run.record.averages_in_words:
            yield (
                f"{run.name} was measured by each of its averages, at its last evaluation {words}; the tables have the "
                "one that is exported."
            )
    if len(one.runs) > 1 and any(run.facts.evaluations for run in one.runs):
        yield (
            f"Best evaluations are chosen by {one.chosen_by()}, from the numbers that they are then given with: a new "
            "measurement of the same network is rather worse."
        )
    if sum(bool(run.points) for run in one.runs) > 1 and all(len(set(group.seeds)) == 1 for group in one.groups):
        yield ALONE


def _of_equal_images(one: ComparableSet) -> Iterator[str]:
    """What the comparison at equal images is not."""
    images, points = one.common.images, one.common.points
    measured = [run for run in one.runs if run.points and run.facts.state != "diverged"]
    if images is None:
        if len(measured) > 1:
            yield "There is no number of images after which two of them were measured: only their best are compared."
        return
    if not one.common.exact:
        yield (
            f"There is no number of images after which all were measured: each is taken at its last evaluation before "
            f"{images:,}."
        )
    if left := [run.name for run in measured if run.name not in points]:
        yield f"After {images:,} images {', '.join(left)} {'was' if len(left) == 1 else 'were'} not measured."


def _ranking(one: ComparableSet, by: Metric) -> Iterator[str]:
    """Which group is ahead at equal images, else by its best, and whether pairs tell it from the next."""
    at: At = "equal images" if one.common.points else "best"
    measure = measures_of((by,))[0]
    means = {n.group: n.spread for n in one.numbers if n.measure == measure and n.at == at}
    known = [group for group, found in means.items() if math.isfinite(found.mean)]
    ranked = sorted(known, key=lambda group: means[group].mean, reverse=measure.higher)
    if len(ranked) < 2:
        return
    first, second = ranked[:2]
    where = f"After {one.common.images:,} images" if at == "equal images" else "By its best evaluation"
    name = measure.called(one.metric)
    mean = "mean " if means[first].n > 1 else ""
    if significant(means[first].mean) == significant(means[second].mean):
        yield f"{where} {first} and {second} have the same {mean}{name}, {_shown(means[first])}."
        return
    yield (
        f"{where} {first} has the {measure.best} {mean}{name}, {_shown(means[first])}, before {second}, "
        f"{_shown(means[second])}."
    )
    for found in one.differences:
        if found.measure == measure and found.at == at and {found.one, found.other} == {first, second}:
            yield _said(found, name)
    seeds = [sorted({str(seed) for seed in group.seeds}) for group in one.groups if group.label in (first, second)]
    if seeds[0] != seeds[1]:
        texts = " and ".join(", ".join(found) for found in seeds)
        yield f"They have other seeds ({texts}), which are a part of the difference between them."


def _shown(found: Spread) -> str:
    if found.n < 2:
        return significant(found.mean)
    return f"{significant(found.mean)} over {found.n} runs (SD {significant(found.deviation)}, {_range(found)})"


def _range(found: Spread) -> str:
    return f"{significant(found.low)} to {significant(found.high)}"


def _said(difference: GroupDifference, name: str) -> str:
    """Whether the pairs tell two groups apart."""
    found = difference.found
    what = f"{difference.one} minus {difference.other}"
    if found.pairs < 2:
        return f"They share one seed: there {what} is {significant(found.mean)}, which says little."
    apart = found.low > 0 or found.high < 0
    judged = "does not hold 0" if apart else "holds 0: these runs do not tell the two apart"
    return (
        f"By the {counted(found.pairs, 'seed')} that both have, {what} is {significant(found.mean)} in the {name} "
        f"(SD of the differences {significant(found.deviation)}); its 95 % interval by Student's t, "
        f"{significant(found.low)} to {significant(found.high)}, {judged}."
    )


def _remarks(runs: Sequence[ComparedRun], groups: Sequence[Group], sets: Sequence[ComparableSet]) -> Iterator[str]:
    if len(sets) > 1:
        yield from _why(sets)
    for together in sets:
        yield from _unknown_data(together)
    for run in runs:
        yield from _of_run(run)
    for one, other in combinations(runs, 2):
        if one.is_copy_of(other):
            yield (
                f"{one.name} and {other.name} have the same seed and the very same numbers: they may be copies of one "
                "run, and count once in a group."
            )
    for group in groups:
        yield from _of_group(group)
    for together in sets:
        yield from _lengths(together)


def _lengths(one: ComparableSet) -> Iterator[str]:
    """That some runs of a set are longer than others, where their numbers after as many images are known."""
    lengths = sorted({run.facts.total_steps for run in one.runs if run.facts.total_steps is not None})
    if len(lengths) > 1:
        whose = f"The runs of set {one.name}" if one.name else "The runs"
        steps = ", ".join(f"{n:,}" for n in lengths)
        there = ": see the numbers at equal images" if one.common.points else ""
        yield f"{whose} have different lengths ({steps} steps){there}."


def _why(sets: Sequence[ComparableSet]) -> Iterator[str]:
    """That, and why, numbers of different sets do not compare."""
    for one, other in combinations(sets, 2):
        reasons = (incomparable(a, b) for a in one.runs for b in other.runs)
        reason = next((found for found in reasons if found), "they do not fit together")
        yield (
            f"The numbers of set {one.name} ({_listed(one)}) and set {other.name} ({_listed(other)}) do not compare, "
            f"and are not ranked: {reason}."
        )


def _listed(one: ComparableSet) -> str:
    names = [run.name for run in one.runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _unknown_data(one: ComparableSet) -> Iterator[str]:
    teachers = {run.record.identity.get("teacher") for run in one.runs if run.record.kind == "distill"}
    if len(teachers) > 1 and any(run.data[0] is None for run in one.runs):
        yield (
            "The folders do not say of all teachers what they were trained on: that all runs were measured against "
            "the same reference is for you to know."
        )


def _of_run(run: ComparedRun) -> Iterator[str]:
    facts = run.facts
    if facts.state == "going on":
        yield f"{run.name} is going on, at step {facts.steps_done:,}: its numbers are those so far."
    elif facts.state == "stopped":
        of = "" if facts.total_steps is None else f" of {facts.total_steps:,}"
        yield f"{run.name} is unfinished, at step {facts.steps_done:,}{of}: its numbers are those so far."
    elif facts.state == "diverged":
        yield f"{run.name} diverged at step {run.record.diverged:,}: it is left out at equal images."
    if not run.points:
        yield f"{run.name} was never measured."
    drawn = {point.images for point in run.points} - {None}
    if len(drawn) > 1:
        yield (
            f"{run.name} was measured over {' and '.join(f'{n:,}' for n in sorted(filter(None, drawn)))} images along "
            "the way: its own evaluations do not all compare."
        )
    start = run.record.identity.get("start")
    if isinstance(start, dict) and run.record.identity.get("continues"):
        seen = start.get("images_seen")
        after = f" after {seen:,} images" if isinstance(seen, int) else ""
        source = f"{start.get('source')}{after}"
        yield f"{run.name} went on from {source}, which its images and steps count, its time does not."
    yield from (f"{run.name}: {problem}." for problem in run.record.problems)


def _of_group(group: Group) -> Iterator[str]:
    seeds = group.seeds
    if len(set(seeds)) < len(seeds):
        yield f"Runs of {group.label} share a seed ({', '.join(map(str, seeds))}): for pairs their mean counts."
    places = {surroundings(run).get("processes") for run in group.runs} - {None}
    if len(places) > 1:
        counts = ", ".join(sorted(filter(None, places)))
        yield f"Runs of {group.label} were made by different numbers of processes ({counts}), which moves results too."
