"""Numbers in words."""

import pytest

from ipfm.engine.runtime.wording import at_least_thousandths, counted, duration, three_digits


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (48, "48 s"),
        (720, "12 min"),
        (12_240, "3.4 h"),
        (181_440, "2.1 days"),
        (4.7e9, "149 years"),
        (1e12, "31,688 years"),
    ],
)
def test_a_duration_is_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01234, "0.0123"), (3.14159, "3.14"), (999.0, "999"), (1000.0, "1,000"), (171_954.0, "172,000"), (0.0, "0")],
)
def test_three_digits_have_no_exponent_where_they_are_large(value: float, said: str) -> None:
    assert three_digits(value) == said


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 step"), (f"{1:,}", "1 step"), (0, "0 steps"), (f"{1000:,}", "1,000 steps")]
)
def test_one_of_a_thing_is_no_plural(count: object, said: str) -> None:
    assert counted(count, "step") == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0"), (8.6e-6, "<0.001"), (0.001, "0.001"), (13.2, "13.2"), (2150.0, "2,150")]
)
def test_little_time_has_no_exponent(value: float, said: str) -> None:
    assert at_least_thousandths(value) == said
