"""What ties a process to the rest of its run: the launcher above it, and the lock on the run folder."""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from pathlib import Path
from typing import IO

from ipfm.engine.errors import FolderInUse

# How long a start waits for the processes of an earlier one to leave the folder.
PATIENCE = 120.0
_held: dict[Path, IO[str]] = {}


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


def lock_folder(path: Path, patience: float = PATIENCE) -> None:
    """Keep other runs out of the run folder `path` until this process ends; waits for one that is about to leave.

    Raises:
        FolderInUse: another process is still there after `patience` seconds; the message names it.
        OSError: the folder cannot be written.
    """
    path = path.resolve()
    if path in _held:
        return
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / "run.lock", "a+")  # noqa: SIM115 (held until the process ends)
    deadline, told = time.monotonic() + patience, False
    while not _locked(file):
        file.seek(0)
        owner = file.read().strip() or "unknown"
        if time.monotonic() > deadline:
            file.close()
            raise FolderInUse(f"{path} is in use by process {owner}: stop it, or choose another --out")
        if not told:
            print(f"{path} is in use by process {owner}: waiting for it to stop", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held[path] = file


def folder_user(path: Path) -> str | None:
    """The number of the process that uses the run folder `path` on this machine; None where nobody does."""
    try:
        with open(path / "run.lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except OSError:  # no lock to look at
        pass
    return None


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


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
