"""Of a long list of cases a part for `make test`, the rest for `make thorough`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest


def parts(cases: Iterable[Any], left: Collection[Any]) -> list[Any]:
    """Parameters of a test, in their order; those in `left` are marked `thorough`.

    Args:
        cases: the values, of one parameter or of several.
        left: those that `make test` leaves to `make thorough`.

    Raises:
        ValueError: one of `left` is no case, or none stays.
    """
    every = list(cases)
    if strange := [case for case in left if case not in every]:
        raise ValueError(f"what is left to `make thorough` is no case: {strange}")
    if len(left) >= len(every):
        raise ValueError("`make test` would have no case at all")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough)
        if case in left
        else case
        for case in every
    ]


def is_chosen(place: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether a point of a grid belongs to the part of it in which every two values of different axes meet.

    It is one in as many as the shortest axis has values: with three axes or more no pair of values is left out.

    Args:
        place: the point, an index for each axis.
        lengths: of the axes.

    Raises:
        ValueError: the grid has fewer than three axes, where pairs are all that there is.
    """
    if len(lengths) < 3:
        raise ValueError(f"every two values meet in the whole of a grid of {len(lengths)} axes alone")
    return sum(place) % min(lengths) == 0


def leave_to_thorough(items: Iterable[pytest.Item]) -> None:
    """Mark `thorough` what is not chosen of the tests that are marked `pairs`, whose axes are their `parametrize`."""
    for item in items:
        if item.get_closest_marker("pairs"):
            axes = [mark.args[:2] for mark in item.iter_markers("parametrize")]
            params = item.callspec.params  # type: ignore[attr-defined]
            if not is_chosen([_place(*axis, params) for axis in axes], [len(values) for _, values in axes]):
                item.add_marker(pytest.mark.thorough)


def _place(names: str | Sequence[str], values: Collection[Any], params: Mapping[str, Any]) -> int:
    """Where on an axis the parameters are that a test has."""
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    found = [params[name] for name in names]
    return next(
        place
        for place, value in enumerate(values)
        if all(one is other for one, other in zip([value] if len(names) == 1 else value, found, strict=True))
    )
