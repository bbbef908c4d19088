"""Numbers in words."""

import pytest

from ipfm.engine.runtime.wording import duration


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
