"""A number over time, of which a bounded count of points is kept without losing a peak."""

from __future__ import annotations

from itertools import groupby

# Points that are kept at most.
POINTS = 20_000

Point = tuple[float, int]


class Series:
    """Points (time, number), times not falling.

    Where there are too many, each of equal intervals of time keeps its smallest, its largest and its last.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []

    def __len__(self) -> int:
        return len(self._points)

    @property
    def points(self) -> tuple[Point, ...]:
        """What is kept, in the order of time."""
        return tuple(self._points)

    def add(self, time: float, value: int) -> None:
        """One more point."""
        self._points.append((time, value))
        if len(self._points) > POINTS:
            self._thin()

    def _thin(self) -> None:
        start, end = self._points[0][0], self._points[-1][0]
        # Of up to three points each: at most half of what may be there is left.
        width = (end - start) / (POINTS // 6)
        kept: list[Point] = []
        for _, group in groupby(self._points, lambda point: int((point[0] - start) / width) if width else 0):
            points = list(group)
            values = [value for _, value in points]
            chosen = {values.index(min(values)), values.index(max(values)), len(points) - 1}
            kept += [points[i] for i in sorted(chosen)]
        self._points = kept
