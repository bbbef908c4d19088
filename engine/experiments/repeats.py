"""Statistics over repeats of a run: the spread of a number over seeds, and differences between runs of equal seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ipfm.engine.runtime.wording import significant

# Of the interval around a mean difference.
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Mean, ends, deviation and number of the finite ones among some values; NaN where there are too few."""

    mean: float
    low: float
    high: float
    deviation: float
    """Standard deviation of the sample, with n - 1; NaN for one value."""
    n: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        return f"{significant(self.mean)} ({significant(self.low)} to {significant(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """See `Spread`."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Spread(math.nan, math.nan, math.nan, math.nan, 0)
    mean = math.fsum(finite) / len(finite)
    squares = math.fsum((value - mean) ** 2 for value in finite)
    deviation = math.sqrt(squares / (len(finite) - 1)) if len(finite) > 1 else math.nan
    return Spread(mean, min(finite), max(finite), deviation, len(finite))


class PairedDifference(NamedTuple):
    """Differences, one minus other, of values that belong together in pairs.

    Attributes:
        pairs: how many.
        mean: of the differences; NaN where there is no pair.
        deviation: their standard deviation, with n - 1; NaN where there are fewer than two pairs.
        low: end of the interval in which the mean lies with `CONFIDENCE`, by Student's t; likewise.
        high: its other end.
        p: two-sided p value of the paired t test of a mean of 0; likewise, and where all differences are the same.
    """

    pairs: int
    mean: float
    deviation: float
    low: float
    high: float
    p: float


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
    """See `PairedDifference`.

    Args:
        one: seed -> value; those that are not finite have no pair.
        other: seed -> value, of the runs that are subtracted.
    """
    from scipy import stats

    known = [seed for seed in one if seed in other and math.isfinite(one[seed]) and math.isfinite(other[seed])]
    mean, _, _, deviation, pairs = spread([one[seed] - other[seed] for seed in known])
    if pairs < 2:
        return PairedDifference(pairs, mean, math.nan, math.nan, math.nan, math.nan)
    error = deviation / math.sqrt(pairs)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, pairs - 1)) if error > 0 else math.nan
    return PairedDifference(pairs, mean, deviation, mean - margin, mean + margin, p)
