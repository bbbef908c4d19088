"""How many cores this process may compute on."""

from __future__ import annotations

import os
from pathlib import Path

# The share of the machine's time that a container may take, in microseconds a period: "max 100000", "150000 100000".
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = tuple(Path("/sys/fs/cgroup/cpu") / name for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def usable_cores() -> int:
    """Cores that this process may be scheduled on; in a container with less of their time, as many as that is worth."""
    cores = len(os.sched_getaffinity(0))
    for files in ((_QUOTA,), _QUOTA_V1):
        try:
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            # Half a core more is no use to a thread more.
            cores = min(cores, max(1, quota // period))
    return cores
