"""Run a program in the network of another process: in_node.py PID SCRIPT ARGUMENTS."""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path

# Of <linux/sched.h>; `os.setns` came with Python 3.12.
NETWORK, HOST_NAME = 0x40000000, 0x04000000

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    for name, kind in (("net", NETWORK), ("uts", HOST_NAME)):
        with open(f"/proc/{sys.argv[1]}/ns/{name}") as namespace:
            if libc.setns(namespace.fileno(), kind):
                raise OSError(ctypes.get_errno(), f"cannot enter the {name} namespace of process {sys.argv[1]}")
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
