"""Processes that are lost, or told to stop, while others are in a call that does not come back: two gloo groups.

The one that the data goes through is blocked, as NCCL's is when a process has died: no Python exception comes of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import launch
import pytest
import soak
from soak import Group, newest, wait_until

WORKER = launch.ROOT / "tests" / "workers" / "blocked_device.py"
NAME = "blocked_device.py: "
LOST = f"{NAME}failed: another process of this run has ended or does not answer "

pytestmark = pytest.mark.distributed


@dataclass
class Case:
    """A start of the worker: where its processes get stuck, the signal that one is sent there, further variables."""

    where: str
    victim: int = 1
    signum: int = 0
    seconds: float = 0.0
    silence: float = 60.0
    grace: float = 60.0
    timeout: float = 60.0


CASES = {
    "killed": Case("collective", signum=signal.SIGKILL),
    "the first killed": Case("collective", victim=0, signum=signal.SIGKILL),
    "stopped": Case("collective", signum=signal.SIGSTOP, silence=2.0),
    "told to stop": Case("collective", signum=signal.SIGTERM, grace=2.0),
    "hung": Case("collective", timeout=2.0),
    "while it writes": Case("writing", signum=signal.SIGKILL, seconds=8.0),
    "alone": Case("alone"),
    "ends later": Case("end", seconds=3.0, silence=1.0, grace=1.0),
    "script": Case("script", seconds=3.0, silence=1.0),
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Group]]]:
    """All of them at once: they wait most of the time."""
    started = {}
    for name, case in CASES.items():
        out = tmp_path_factory.mktemp("case")
        times = {"IPFM_SILENCE": case.silence, "IPFM_GRACE": case.grace, "IPFM_TIMEOUT": case.timeout}
        started[name] = out, Group(
            [str(out), case.where, str(case.seconds)], "forked", out / "log", script=WORKER,
            **{variable: str(value) for variable, value in times.items()},
        )  # fmt: skip
    for name, case in CASES.items():
        out, group = started[name]
        if case.signum:
            wait_until(lambda: len(list(out.glob("stuck-*"))) == 2, group)
            group.ranks()[case.victim].send_signal(case.signum)
    yield started
    for _, group in started.values():
        group.kill()


def test_x(groups):
    t=time.monotonic()
    for name,(out,group) in groups.items():
        try:
            codes = group.wait(20) 
        except Exception as e: codes=[p.poll() for p in group.started]
        print(name, codes, time.monotonic()-t, newest(out/"run")); print(group.output())
