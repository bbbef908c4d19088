"""What `make test` leaves to `make thorough`: of lists what is named, of grids what no pair of values needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from parts import is_chosen, leave_to_thorough, parts


@pytest.mark.quick
@pytest.mark.parametrize("lengths", [(5, 4, 3), (2, 3, 7), (3, 3, 3), (2, 5, 2, 3), (4, 4, 6, 5)])
def test_every_two_values_meet_in_the_part_of_a_grid(lengths: tuple[int, ...]) -> None:
    grid = list(itertools.product(*map(range, lengths)))
    chosen = [place for place in grid if is_chosen(place, lengths)]
    assert len(chosen) < 0.6 * len(grid)
    for one, two in itertools.combinations(range(len(lengths)), 2):
        assert len({(place[one], place[two]) for place in chosen}) == lengths[one] * lengths[two]


def test_a_grid_of_two_axes_has_no_part() -> None:
    with pytest.raises(ValueError, match="in the whole of a grid of 2 axes alone"):
        is_chosen((0, 1), (3, 3))


class Item:
    """A test of a grid, whose first axis has two names."""

    def __init__(self, *indices: int, pairs: bool = True) -> None:
        names, self.marks = ("a", "c", "d"), [pytest.mark.pairs.mark] * pairs
        self.callspec = SimpleNamespace(indices={"b": indices[0], **dict(zip(names, indices, strict=True))})
        axes: list[tuple[Any, list[Any]]] = [("a, b", [(1, 2)] * 3), (("c",), [1, 2, 3]), ("d", [1, 2, 3])]
        self.marks += [pytest.mark.parametrize(*axis).mark for axis in axes]

    def iter_markers(self, name: str) -> Iterator[pytest.Mark]:
        return (mark for mark in self.marks if mark.name == name)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next(self.iter_markers(name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


def test_what_is_marked_pairs_is_thorough_but_for_that_part() -> None:
    items = [Item(*place) for place in itertools.product(range(3), repeat=3)]
    others = [Item(*place, pairs=False) for place in itertools.product(range(3), repeat=3)]
    leave_to_thorough([*items, *others])  # type: ignore[list-item]
    assert sum(item.get_closest_marker("thorough") is None for item in items) == 9
    assert not any(item.get_closest_marker("thorough") for item in others)


def test_what_is_left_of_a_list_is_named() -> None:
    one, two = parts(["a", "b"], ["b"])
    assert one == "a" and two.values == ("b",) and two.marks[0].name == "thorough"
    with pytest.raises(ValueError, match=r"is no case: \['c'\]"):
        parts(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="would have no case at all"):
        parts(["a"], ["a"])
