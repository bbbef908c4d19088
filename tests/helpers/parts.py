"""Of a long list of cases a part for `make test`, the rest for `make thorough`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
