"""Work that fails on one process of several; on real processes in test_failures.py and test_evaluation.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from ipfm.engine.distributed import agreement
from ipfm.engine.distributed.agreement import attempt, together
from ipfm.engine.distributed.signals import StopRequested
from ipfm.engine.runtime.errors import Failed


def failing(error: Exception) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


def test_one_process_alone_raises_its_own_error() -> None:
    own = OSError(5, "Input/output error", "/data/7.png")
    with pytest.raises(OSError) as raised:
        together(failing(own), 1)
    assert raised.value is own
    assert attempt(failing(own), 1) == (None, "/data/7.png: Input/output error")
    assert (together(lambda: 3, 1), attempt(lambda: 3, 1)) == (3, (3, ""))


@pytest.mark.parametrize("of_input", [True, False])
def test_what_failed_elsewhere_is_raised_here(monkeypatch: pytest.MonkeyPatch, of_input: bool) -> None:
    monkeypatch.setattr(agreement, "_first_said", lambda own, processes: own or ("image 7 is damaged", of_input))
    with pytest.raises(ValueError if of_input else Failed, match=r"^image 7 is damaged$"):
        together(lambda: 3, 2)
    assert attempt(lambda: 3, 2) == (None, "image 7 is damaged")
    with pytest.raises(TypeError, match=r"^a defect$"):
        together(failing(TypeError("a defect")), 2)


def test_a_signal_and_a_lost_process_are_not_talked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """All know of the first; of the second those that are left, who could not agree on it."""
    monkeypatch.setattr(agreement, "_first_said", None)
    for error in (StopRequested(15), RuntimeError("Connection closed by peer")):
        for how in (together, attempt):
            with pytest.raises(type(error)) as raised:
                how(failing(error), 2)
            assert raised.value is error
