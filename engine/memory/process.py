"""What the operating system and the GPU's driver say of this process's memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ipfm.engine.memory.series import Series
from ipfm.engine.runtime.errors import described

# Seconds between two readings: short beside a phase of a step.
INTERVAL = 0.002


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (RSS); 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def largest_resident_bytes() -> int:
    """The largest RSS since the process began, by the kernel's own account."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Sampler:
    """Reads a number every `INTERVAL` seconds in a thread while it is entered.

    Args:
        read: gives the number; must be safe to call from another thread.

    Attributes:
        readings: (seconds since the epoch of `time.perf_counter`, number), thinned where they are many.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self.readings = Series()
        self._read = read
        self._peak = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="memory sampler", daemon=True)

    def take_peak(self) -> int:
        """The largest number since the last call, and now."""
        self._add()
        with self._lock:
            peak, self._peak = self._peak, 0
        # What is there at the border belongs to both sides.
        self._add()
        return peak

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._add()

    def _add(self) -> None:
        value = self._read()
        with self._lock:
            self._peak = max(self._peak, value)
            self.readings.add(time.perf_counter(), value)


def driver_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU that this process uses, as its driver (NVML) counts: context and libraries too.

    Where the driver does not know this process (in a container it has another number) or does not list any, the bytes
    in use of the whole GPU. None without a GPU, and where NVML does not speak of it (a slice of one, MIG).
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        try:
            return _asked(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except pynvml.NVMLError:
            return None
    except Exception as error:  # no run ends for want of this number, but what NVML has not refused is a fault
        warnings.warn(f"what the GPU's driver counts is not known: {described(error)}", stacklevel=2)
        return None


def _asked(pynvml: Any, uuid: str) -> int:
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        with contextlib.suppress(pynvml.NVMLError):  # some containers may not ask for the processes
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    finally:
        pynvml.nvmlShutdown()
