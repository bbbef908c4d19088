"""What ties a process to the rest of its run: the launcher above it, and leaving the process group."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path


class Launcher:
    """The launcher that started this process: its parent, and for DeepSpeed the runner above that.

    A launcher that is killed cannot stop its processes: they notice here, and stop as if they had been told to.

    Args:
        launched: whether a launcher started this process. One started by hand may outlive its shell.
    """

    def __init__(self, launched: bool) -> None:
        self._parent = os.getppid() if launched else None
        self._runner = _parent_of(self._parent) if self._parent and _is_deepspeed(self._parent) else None

    def gone(self) -> bool:
        """True once the launcher or its runner has ended."""
        if self._parent is None:
            return False
        return os.getppid() != self._parent or (self._runner is not None and _parent_of(self._parent) != self._runner)


def lost_process(error: BaseException) -> str:
    """What is wrong with another process of the run, if that is what `error` of torch.distributed says; else ""."""
    text = " ".join(str(error).split())
    if found := re.search(r"Connection (?:closed|reset) by peer|Broken pipe|Timed out waiting \d+ ?ms", text):
        return found[0] if isinstance(error, RuntimeError) else ""
    # Errors of a library that nobody has loaded need not be looked for.
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
            return text.partition(".")[0][:200]
    return "connection closed after a timeout" if "Application timeout caused pair closure" in text else ""


def _is_deepspeed(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _parent_of(pid: int) -> int | None:
    try:
        # The name in parentheses may hold anything; the parent is the second field after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


# What a launcher tells the processes that it starts. The number of them on this machine is LOCAL_SIZE to `deepspeed`,
# LOCAL_WORLD_SIZE to torchrun.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """Rank of this process, as the launcher has given it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launched_processes() -> int:
    """Number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process among those on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes(otherwise: int = 1) -> int:
    """Number of processes that the launcher has started on this machine; `otherwise` where it does not say."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", otherwise)))


def is_first_process() -> bool:
    """Whether this process is the one of its run that speaks."""
    return launched_rank() == 0


# Seconds that threads get at the end of a run.
SETTLE = 0.25


def stop_world() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        threads = dist.get_backend() == "gloo" and dist.get_world_size() > 1
        dist.destroy_process_group()
        if threads:
            # Gloo's threads let go of the last exchange's tensors, for which they need the interpreter: one that comes
            # too late, when the interpreter ends, aborts the whole process.
            time.sleep(SETTLE)
