"""A paper's claims and what decides each of them: stated before the runs, judged by what they measured."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from ipfm.engine.experiments.ablation_report import GROWTH, Curve
from ipfm.engine.experiments.repeats import CONFIDENCE, paired_difference, spread
from ipfm.engine.runtime.wording import counted, significant
from ipfm.models.atomic_files import atomic_write

Outcome = Literal["confirmed", "refuted", "undecided"]
# Pairs, and seeds, below which nothing is decided.
LEAST_PAIRS = 3
# Sets of samples that a distance is measured on where chance among samples matters.
SETS = 3
COLUMNS = ("claim", "source", "criterion", "outcome", "estimate", "low", "high", "p", "n", "said")
_LEVEL = f"{CONFIDENCE:.0%}".replace("%", " %")


@dataclass(frozen=True)
class Found:
    """What was measured of a variant.

    Attributes:
        curves: of its runs, one a seed.
        teacher: the distance of its teacher's samples.
        sets: seed -> distances of `SETS` sets of the last generator's samples; only where a criterion asks for them.
        teacher_sets: likewise of its teacher's.
    """

    curves: Sequence[Curve]
    teacher: float
    sets: Mapping[int, Sequence[float]] = field(default_factory=dict)
    teacher_sets: Sequence[float] = ()

    @property
    def diverged(self) -> int:
        """How many of the runs did."""
        return sum(curve.diverged is not None for curve in self.curves)


@dataclass(frozen=True)
class Verdict:
    """What a criterion says.

    Attributes:
        outcome: in a word.
        said: the numbers, in words.
        estimate: what was decided by; NaN where it is no number.
        low: end of its interval, NaN where there is none.
        high: its other end.
        p: two-sided p value, likewise.
        n: pairs or runs that it is of.
    """

    outcome: Outcome
    said: str
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    n: int = 0


class Criterion(Protocol):
    """What decides a claim."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Labels of the variants that it needs."""

    @property
    def stated(self) -> str:
        """In words: what counts as confirmed, and as refuted."""

    @property
    def sets(self) -> bool:
        """Whether it needs `SETS` sets of samples of teachers and generators."""

    def judge(self, found: Mapping[str, Found]) -> Verdict:
        """Decide by what was measured of each of `variants`."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence, whose it is, and what decides it."""

    text: str
    source: str
    criterion: Criterion


class Judged(NamedTuple):
    """A claim, in words what decides it, and what that says."""

    text: str
    source: str
    stated: str
    verdict: Verdict


def below_zero(one: Mapping[int, float], other: Mapping[int, float]) -> Verdict:
    """Whether `one` minus `other`, by seed, lies below 0: its interval decides, of at least `LEAST_PAIRS` pairs.

    Args:
        one: seed -> value; those that are not finite have no pair.
        other: seed -> value.
    """
    found = paired_difference(one, other)
    outcome: Outcome = "undecided"
    if found.pairs < LEAST_PAIRS:
        return Verdict(outcome, f"{counted(found.pairs, 'pair')}, {LEAST_PAIRS} are needed", found.mean, n=found.pairs)
    if found.high < 0:
        outcome = "confirmed"
    elif found.low > 0:
        outcome = "refuted"
    p = f", p = {found.p:.2g}" if math.isfinite(found.p) else ""
    said = (
        f"mean difference {significant(found.mean)}, {_LEVEL} interval {significant(found.low)} to "
        f"{significant(found.high)}{p}, {counted(found.pairs, 'pair')}"
    )
    return Verdict(outcome, said, found.mean, found.low, found.high, found.p, found.pairs)


# What `below_zero` decides by.
BELOW_ZERO = (
    f"confirmed where the {_LEVEL} t interval of the mean over at least {LEAST_PAIRS} seeds lies below 0, refuted "
    "where it lies above, else undecided"
)


@dataclass(frozen=True, kw_only=True)
class EndsLower:
    """`lower` has a smaller distance than `higher` at the end. See `Criterion`.

    A run that diverged counts as what it is: had one of `lower`, the claim would be refuted.
    """

    lower: str
    higher: str
    sets: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """See `Criterion.variants`."""
        return (self.lower, self.higher)

    @property
    def stated(self) -> str:
        """See `Criterion.stated`."""
        return (
            f"distance at the end of {self.lower} minus that of {self.higher}, by seed: {BELOW_ZERO}; a run of "
            f"{self.lower} that diverged refutes it"
        )

    def judge(self, found: Mapping[str, Found]) -> Verdict:
        """See `Criterion.judge`."""
        lower, higher = found[self.lower], found[self.higher]
        verdict = below_zero(*({curve.seed: curve.last for curve in side.curves} for side in (lower, higher)))
        if lower.diverged:
            said = f"{lower.diverged} of {len(lower.curves)} runs of {self.lower} diverged"
            return Verdict("refuted", said, verdict.estimate, n=verdict.n)
        return verdict


def way_left(curve: Curve, teacher: float, until: float) -> float:
    """The way from the start to the teacher's distance that is left, on average over the images up to `until`.

    It is ln(distance / teacher's) / ln(first distance / teacher's), 1 at the start and 0 at the teacher, integrated by
    trapezoids.

    Args:
        curve: of a run.
        teacher: the distance of its teacher.
        until: generator steps.

    Returns:
        The mean; NaN where the run was not measured at the start and as far as `until`, where a distance is no positive
        number, or where it begins no further away than its teacher.
    """
    points: list[tuple[float, float]] = [point for point in curve.points if point[0] <= until]
    after = next((point for point in curve.points if point[0] > until), None)
    if points and points[-1][0] < until and after is not None:
        (left, low), (right, high) = points[-1], after
        points.append((until, low + (high - low) * (until - left) / (right - left)))
    whole = len(points) > 1 and points[0][0] == 0 and points[-1][0] == until
    if not whole or not all(math.isfinite(value) and value > 0 for value in (teacher, *(v for _, v in points))):
        return math.nan
    start = math.log(points[0][1] / teacher)
    if start <= 0:
        return math.nan
    ways = [(step, math.log(value / teacher) / start) for step, value in points]
    return math.fsum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(ways)) / until


@dataclass(frozen=True, kw_only=True)
class FasterEarly:
    """`faster` comes closer to its teacher than `slower` in the first part of a run, see `way_left`, `Criterion`."""

    faster: str
    slower: str
    share: float = 0.5
    """Of the run's images, up to which it is looked at."""
    sets: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """See `Criterion.variants`."""
        return (self.faster, self.slower)

    @property
    def stated(self) -> str:
        """See `Criterion.stated`."""
        return (
            "way to the teacher that is left, ln(distance / its teacher's) / ln(first distance / its teacher's), mean "
            f"over the first {100 * self.share:g} % of the images, that of {self.faster} minus that of {self.slower}, "
            f"by seed: {BELOW_ZERO}"
        )

    def judge(self, found: Mapping[str, Found]) -> Verdict:
        """See `Criterion.judge`."""
        sides = [found[label] for label in self.variants]
        # Runs that ended early, and others, are looked at up to the same step.
        length = max((curve.points[-1][0] for side in sides for curve in side.curves if curve.points), default=0)
        until = self.share * length
        ways = [{curve.seed: way_left(curve, side.teacher, until) for curve in side.curves} for side in sides]
        verdict = below_zero(*ways)
        batch = sides[0].curves[0].batch
        means = [significant(spread(list(values.values())).mean) for values in ways]
        said = (
            f"up to {until * batch / 1000:g} thousand images {self.faster} {means[0]}, {self.slower} "
            f"{means[1]}; {verdict.said}"
        )
        return Verdict(verdict.outcome, said, verdict.estimate, verdict.low, verdict.high, verdict.p, verdict.n)


@dataclass(frozen=True, kw_only=True)
class ReachesTeacher:
    """The generators of `label` end at their teacher's distance, as far as sets of samples tell. See `Criterion`."""

    label: str
    sets: bool = True

    @property
    def variants(self) -> tuple[str, ...]:
        """See `Criterion.variants`."""
        return (self.label,)

    @property
    def stated(self) -> str:
        """See `Criterion.stated`."""
        return (
            f"distances of {SETS} sets of samples of each last generator of {self.label} and of its teacher: confirmed "
            f"where the mean of the generators', over at least {LEAST_PAIRS} seeds, exceeds the mean of the teacher's "
            "by no more than the teacher's sets are apart; refuted where every set of every generator lies above all "
            "of the teacher's, or a run diverged; else undecided"
        )

    def judge(self, found: Mapping[str, Found]) -> Verdict:
        """See `Criterion.judge`."""
        its = found[self.label]
        teacher = spread(its.teacher_sets)
        values = [value for sets in its.sets.values() for value in sets]
        generators = spread(values)
        excess, apart, n = generators.mean - teacher.mean, teacher.high - teacher.low, len(its.sets)
        said = f"generators {generators}, teacher {teacher}: excess {significant(excess)}, sets apart by "
        said += significant(apart) if math.isfinite(apart) else "-"
        outcome: Outcome = "undecided"
        if its.diverged or generators.n < len(values):
            outcome, said = "refuted", f"{its.diverged} of {len(its.curves)} runs diverged; {said}"
        elif n < LEAST_PAIRS:
            said = f"{counted(n, 'seed')}, {LEAST_PAIRS} are needed; {said}"
        elif excess <= apart:
            outcome = "confirmed"
        elif generators.low > teacher.high:
            outcome = "refuted"
        return Verdict(outcome, said, excess, generators.low - teacher.mean, generators.high - teacher.mean, n=n)


@dataclass(frozen=True, kw_only=True)
class Diverge:
    """Which variants diverge, and which do not. See `Criterion`.

    A variant diverges where most of its runs do, see `Curve.diverged`.
    """

    diverging: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    """Exactly one of them diverges."""
    stable: tuple[str, ...] = ()
    sets: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """See `Criterion.variants`."""
        return (*self.diverging, *self.one_of, *self.stable)

    @property
    def stated(self) -> str:
        """See `Criterion.stated`."""
        parts = [f"{label} diverges" for label in self.diverging]
        parts += [f"exactly one of {', '.join(self.one_of)} diverges"] if self.one_of else []
        parts += [f"{label} does not" for label in self.stable]
        return (
            f"confirmed where {' and '.join(parts)}, refuted where anything of this is otherwise; a run has diverged "
            f"where it stopped because its samples were not finite, or where its distance stays, from some evaluation "
            f"to the end, above {GROWTH:g} times its lowest; a variant has where most of its runs have"
        )

    def judge(self, found: Mapping[str, Found]) -> Verdict:
        """See `Criterion.judge`."""
        gone = {label: 2 * found[label].diverged > len(found[label].curves) for label in self.variants}
        right = all(gone[label] for label in self.diverging) and not any(gone[label] for label in self.stable)
        if self.one_of:
            right = right and sum(gone[label] for label in self.one_of) == 1
        said = "; ".join(
            f"{label}: {found[label].diverged} of {len(found[label].curves)} diverged, last / lowest {_rise(its)}"
            for label in self.variants
            for its in [found[label]]
        )
        runs = sum(len(found[label].curves) for label in self.variants)
        return Verdict("confirmed" if right else "refuted", said, n=runs)


def _rise(found: Found) -> str:
    """How many times its lowest distance a run ends at, the highest of a variant's runs."""
    ratios = [curve.last / curve.best for curve in found.curves if curve.best > 0]
    worst = max((ratio for ratio in ratios if math.isfinite(ratio)), default=math.nan)
    return significant(worst) if math.isfinite(worst) else "-"


def judged(claims: Sequence[Claim], found: Mapping[str, Found]) -> list[Judged]:
    """The claims whose variants were all run, each with its verdict."""
    return [
        Judged(claim.text, claim.source, claim.criterion.stated, claim.criterion.judge(found))
        for claim in decided_by(claims, found)
    ]


def decided_by(claims: Sequence[Claim], labels: Collection[str]) -> list[Claim]:
    """The claims whose variants are all among these."""
    return [claim for claim in claims if set(claim.criterion.variants) <= set(labels)]


def criterion_said(text: str, source: str, stated: str) -> str:
    """A line: the claim, whose it is, and what decides it."""
    return f"{text} ({source}): {stated}"


def verdicts_table(verdicts: Sequence[Judged]) -> str:
    """Markdown: a row for each claim, and below the table what decided it."""
    lines = ["| claim | verdict | measured |", "|---|---|---|"]
    lines += [f"| {one.text} | {one.verdict.outcome} | {one.verdict.said} |" for one in verdicts]
    lines += ["", *(f"* {criterion_said(*one[:3])}." for one in verdicts)]
    return "\n".join(lines) + "\n"


def write_verdicts(verdicts: Sequence[Judged], path: Path) -> None:
    """Write a line for each claim, of `COLUMNS`; numbers that there are none of are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for claim, source, stated, verdict in verdicts:
        numbers = (verdict.estimate, verdict.low, verdict.high, verdict.p)
        shown = [repr(number) if math.isfinite(number) else "" for number in numbers]
        writer.writerow([claim, source, stated, verdict.outcome, *shown, verdict.n, verdict.said])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
