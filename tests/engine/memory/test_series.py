"""Points over time: a bounded number of them, evenly spread, and every peak of an interval."""

from __future__ import annotations

import pytest

from ipfm.engine.memory import series
from ipfm.engine.memory.series import Series


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(series, "POINTS", 120)


def test_few_points_stay_as_they_are() -> None:
    line, points = Series(), tuple((0.5 * i, i * i) for i in range(120))
    for point in points:
        line.add(*point)
    assert line.points == points and len(line) == 120


def test_many_points_keep_extremes_and_spread_evenly() -> None:
    """A short peak and a short dip early in a long series, which is thinned dozens of times after them."""
    line = Series()
    for i in range(10_000):
        line.add(i / 100, 10**6 if i == 137 else -5 if i == 2345 else i % 7)
        assert len(line) <= 120
    times = [time for time, _ in line.points]
    assert times == sorted(times) and times[-1] == 99.99
    assert (1.37, 10**6) in line.points and (23.45, -5) in line.points
    # No quarter of the time is left with less than a tenth of the points.
    for quarter in range(4):
        assert sum(25 * quarter <= time < 25 * (quarter + 1) for time in times) > len(times) / 10


def test_a_plateau_lasts_until_it_ends() -> None:
    """The last value before a pause is what holds in it."""
    line = Series()
    for i in range(1000):
        line.add(i * 1e-3, i % 3)
    line.add(1.0, 77)
    for i in range(1000):
        line.add(9.0 + i * 1e-3, i % 3)
    before = [value for time, value in line.points if time < 9.0]
    assert before[-1] == 77


def test_points_of_one_moment() -> None:
    line = Series()
    for i in range(500):
        line.add(1.0, i)
    assert len(line) <= 120 and line.points[-1] == (1.0, 499) and (1.0, 0) in line.points
