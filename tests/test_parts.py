"""What `make test` leaves to `make thorough`: of lists what is named, of grids what no pair of values needs."""

from __future__ import annotations

import itertools

import pytest
from parts import is_chosen, parts


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


@pytest.mark.pairs
@pytest.mark.parametrize("one", [0, 1, 2])
@pytest.mark.parametrize(("two", "name"), [(0, "a"), (1, "b"), (2, "c"), (3, "a")])
@pytest.mark.parametrize("three", [0, 1, 2, 3, 4])
def test_what_is_marked_pairs_is_thorough_but_for_that_part(
    one: int, two: int, name: str, three: int, request: pytest.FixtureRequest
) -> None:
    """Whichever of them is asked for."""
    assert (request.node.get_closest_marker("thorough") is None) == is_chosen((one, two, three), (3, 4, 5))
    assert name == "abca"[two]


def test_what_is_left_of_a_list_is_named() -> None:
    one, two = parts(["a", "b"], ["b"])
    assert one == "a" and two.values == ("b",) and two.marks[0].name == "thorough"
    with pytest.raises(ValueError, match=r"is no case: \['c'\]"):
        parts(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="would have no case at all"):
        parts(["a"], ["a"])
