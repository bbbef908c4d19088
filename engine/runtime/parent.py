"""A process that does not outlive the one that it works for, whatever ends that one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel kill this process as soon as the one that started it ends, even while a library hangs in it.

    Args:
        parent: process that started this one. Where it has ended already, so does this one.
    """
    # A system without it lets the process come to its own end.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
