"""What a benchmark ran on: names and versions that stand beside every number."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Machine:
    """`driver` is empty on a CPU; `threads` are those of PyTorch's CPU operations."""

    device: str
    driver: str
    torch: str
    triton: str
    threads: int


def describe(device: torch.device) -> Machine:
    """The GPU's name and driver, or the CPU's name."""
    cuda = device.type == "cuda"
    return Machine(
        torch.cuda.get_device_name(device) if cuda else cpu_name(Path("/proc/cpuinfo")),
        _driver() if cuda else "",
        torch.__version__,
        triton.__version__,
        torch.get_num_threads(),
    )


def cpu_name(cpuinfo: Path) -> str:
    """The "model name" of Linux's `cpuinfo` file, which platform.processor() often lacks; else what Python knows."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "CPU"


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""
    return version.decode() if isinstance(version, bytes) else str(version)
