"""Statistics over repeats of a run."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from ipfm.engine.experiments.repeats import CONFIDENCE, paired_difference, spread


@pytest.mark.quick
def test_spread_over_seeds_leaves_out_what_was_not_finite() -> None:
    found = spread([2.0, math.nan, 4.0, 9.0, math.inf])
    assert found[:3] == (5.0, 2.0, 9.0) and found.n == 3
    assert found.deviation == pytest.approx(scipy.stats.tstd([2.0, 4.0, 9.0]))
    assert str(found) == "5.000 (2.000 to 9.000)"


def test_one_value_has_no_deviation() -> None:
    found = spread([2.0])
    assert found[:3] == (2.0, 2.0, 2.0) and math.isnan(found.deviation) and found.n == 1
    assert str(spread([math.nan])) == "-" and spread([]).n == 0


def test_paired_difference_is_of_the_seeds_that_both_have() -> None:
    one, other = {0: 5.0, 1: 6.0, 2: 8.0, 7: 1.0, 8: math.nan}, {0: 4.5, 1: 5.9, 2: 7.0, 8: 2.0, 9: 3.0}
    found = paired_difference(one, other)
    asked = scipy.stats.ttest_rel([5.0, 6.0, 8.0], [4.5, 5.9, 7.0])
    interval = asked.confidence_interval(CONFIDENCE)
    assert found.pairs == 3 and found.mean == pytest.approx(1.6 / 3)
    assert found.deviation == pytest.approx(scipy.stats.tstd([0.5, 0.1, 1.0]))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(asked.pvalue)


def test_fewer_than_two_pairs_have_no_interval() -> None:
    alone = paired_difference({3: 2.0}, {3: 1.5})
    assert alone.pairs == 1 and alone.mean == 0.5 and all(map(math.isnan, alone[2:]))
    none = paired_difference({3: 2.0}, {4: 1.5})
    assert none.pairs == 0 and all(map(math.isnan, none[1:]))


def test_differences_that_are_all_the_same_have_no_p_value() -> None:
    found = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert found[:5] == (2, 1.0, 0.0, 1.0, 1.0) and math.isnan(found.p)
