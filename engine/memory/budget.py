"""How much memory a process may plan with."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ipfm.engine.runtime.launcher import local_processes

# Share of the memory that a plan may fill. On a GPU the rest is for workspaces and fragmentation; on a CPU other
# programs want theirs too.
USABLE, USABLE_CPU = 0.85, 0.6
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def device_budget(device: torch.device) -> int | None:
    """Bytes that this process may plan with on `device`; None where that is not known.

    A share of the GPU's memory; or, on a CPU, of the machine's (its container's, where that is less), divided among the
    processes on it. What is free at the moment does not matter: a run that is continued decides as it did before.
    """
    if device.type == "cuda":
        return gpu_budget(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    for limit in _CGROUP_LIMITS:
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return int(USABLE_CPU * total) // max(1, local_processes())


def gpu_budget(memory: float) -> int:
    """Bytes to plan with on a GPU of `memory` bytes."""
    return int(USABLE * memory)
