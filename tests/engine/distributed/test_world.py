"""The run's processes: how long they wait for each other."""

from __future__ import annotations

import pytest

from ipfm.engine.distributed import world


def test_processes_wait_as_long_as_they_are_told(monkeypatch) -> None:
    monkeypatch.delenv("IPFM_TIMEOUT", raising=False)
    assert world._timeout().total_seconds() == 600
    for given, seconds in (("30", 30), ("0.5", 0.5), ("1e4", 10_000)):
        monkeypatch.setenv("IPFM_TIMEOUT", given)
        assert world._timeout().total_seconds() == seconds


@pytest.mark.parametrize("given", ["soon", "", "0", "-1", "nan", "inf"])
def test_times_that_are_none(monkeypatch, given: str) -> None:
    monkeypatch.setenv("IPFM_TIMEOUT", given)
    with pytest.raises(ValueError, match=f"^IPFM_TIMEOUT must be a number of seconds > 0, got '{given}'$"):
        world._timeout()
