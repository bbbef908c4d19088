"""Processes that are lost, or told to stop, while others are in a call that does not come back: two gloo groups.

The one that the data goes through is blocked, as NCCL's is when a process has died: no Python exception comes of it.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import launch
import pytest
import soak
from soak import Group, newest, wait_until

WORKER = launch.ROOT / "tests" / "workers" / "blocked_device.py"
NAME = "blocked_device.py"
LOST = f"{NAME}: failed: another process of this run has ended or does not answer"
ENDED = "process 1 of 2 has ended"

pytestmark = pytest.mark.distributed


@dataclass
class Case:
    """A start of the worker, and what becomes of it.

    Attributes:
        where: see the worker.
        signum: that a process is sent when both have come to the step; 0 for none.
        victim: which.
        seconds: see the worker.
        times: IPFM_SILENCE, IPFM_GRACE, IPFM_TIMEOUT.
        codes: exit codes; None for one that goes on.
        says: the last line, up to where it says how to go on.
        saved: the newest checkpoint.
    """

    where: str
    signum: int = 0
    victim: int = 1
    seconds: float = 0.0
    times: tuple[float, float, float] = (60.0, 60.0, 60.0)
    codes: tuple[int | None, int | None] = (1, -signal.SIGKILL)
    says: str = f"{LOST} ({ENDED})"
    saved: int = 2


STOPPED = f"{NAME}: stopped by SIGTERM before the state could be saved (process 1 of 2 was in one call for 1 s)"
CASES = {
    "killed while it writes": Case("writing", signal.SIGKILL, seconds=8.0),
    "killed": Case("collective", signal.SIGKILL),
    "the first killed": Case(
        "collective", signal.SIGKILL, 0, codes=(-signal.SIGKILL, 1), says=f"{LOST} (process 0 of 2 has ended)"
    ),
    "killed, but for a child": Case("forks", signal.SIGKILL),
    "suspended": Case(
        "collective", signal.SIGSTOP, times=(2.0, 60.0, 60.0), codes=(1, None),
        says=f"{LOST} (nothing was heard of process 1 of 2 for 2 s)",
    ),
    "told to stop": Case("collective", signal.SIGTERM, times=(60.0, 1.0, 60.0), codes=(143, 143), says=STOPPED),
    "hung": Case(
        "collective", times=(60.0, 60.0, 2.0), codes=(1, 1), says=f"{LOST} (one call has taken 2 s)"
    ),
    "failed alone": Case("alone", codes=(1, 1), says=f"{LOST} (process 1 of 2 has failed)"),
    "told of bad input": Case(
        "input", seconds=60.0, codes=(2, 2), says=f"{NAME}: error: a setting does not fit this machine"
    ),
    "slow to save": Case(
        "slow", signal.SIGTERM, seconds=3.0, times=(2.0, 1.0, 60.0), codes=(143, 143),
        says=f"{NAME}: stopped by SIGTERM, state saved in",
    ),
    "slow disk": Case(
        "disk", signal.SIGTERM, seconds=3.0, times=(2.0, 1.0, 60.0), codes=(143, 143),
        says=f"{NAME}: stopped by SIGTERM, state saved in",
    ),
    "slow to end": Case("end", seconds=7.0, times=(1.0, 1.0, 60.0), codes=(0, 0), says=""),
    "script": Case("script", seconds=7.0, times=(1.0, 1.0, 60.0), codes=(0, 0), says=""),
}  # fmt: skip


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Group]]]:
    """All of them at once: they wait most of the time."""
    started = {}
    for name, case in CASES.items():
        out = tmp_path_factory.mktemp("case")
        variables = zip(("IPFM_SILENCE", "IPFM_GRACE", "IPFM_TIMEOUT"), map(str, case.times), strict=True)
        arguments = [str(out), case.where, str(case.seconds)]
        started[name] = out, Group(arguments, "forked", out / "log", script=WORKER, **dict(variables))
    try:
        for name, case in CASES.items():
            if case.signum:
                out, group = started[name]
                wait_until(lambda out=out: len(list(out.glob("stuck-*"))) == soak.RANKS, group)
                group.ranks()[case.victim].send_signal(case.signum)
        yield started
    finally:
        for _, group in started.values():
            group.kill()


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_cannot_go_on_ends_itself_and_one_that_can_is_left_alone(groups, name: str) -> None:
    (out, group), case = groups[name], CASES[name]
    lines = []
    for process, code in zip(group.started, case.codes, strict=True):
        if code is None:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0)
        else:
            assert process.wait(40) == code, group.output()
    lines = [line for line in group.output().splitlines() if line.startswith(f"{NAME}: ")]
    run = out / "run"
    if case.where == "alone":
        # The one that failed says why.
        assert lines.pop(0).startswith(f"{NAME}: failed: process 1 of 2: TypeError: a defect of one (")
    if not case.says:
        assert lines == []
    elif case.where == "input":
        assert lines == [case.says]
    elif case.where in ("slow", "disk"):
        assert lines == [f"{case.says} {run}; the same command continues"] and newest(run) > 3
    else:
        assert lines == [f"{case.says}: the same command continues {run} from its checkpoint step-0000002"]
        assert newest(run) == 2 and not list(run.glob("checkpoints/.partial-*"))
    assert "Traceback" not in group.output() and "core dumped" not in group.output()
