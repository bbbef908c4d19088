"""What the operating system says of this machine: nothing is imported but Python's own library."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ipfm.engine.commands.doctor.findings import Check, Finding
from ipfm.engine.runtime.cores import usable_cores
from ipfm.engine.runtime.files import unwritable_ancestor
from ipfm.engine.runtime.host_memory import available_bytes
from ipfm.engine.runtime.wording import counted, size

MACHINE, GPU, LIBRARIES = "this machine", "GPU", "libraries"
# What NCCL shares between the processes of a node lies there; Docker gives it 64 MiB.
SHARED_MEMORY, ENOUGH_SHARED = Path("/dev/shm"), 2**30
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
NVIDIA_DEVICES = "/dev/nvidia[0-9]*"
AMD_DEVICE = Path("/dev/kfd")
# Below this a run of the recipes' sizes cannot keep its checkpoints.
LITTLE_DISK = 5 * 2**30
# Variables of the environment that change where and how a run computes.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TRITON_INTERPRET", "IPFM_TIMEOUT", "OMP_NUM_THREADS", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "GLOO_SOCKET_IFNAME", "CUDA_LAUNCH_BLOCKING", "TORCH_LOGS",
)  # fmt: skip


def gpus_there() -> int:
    """GPUs that an NVIDIA driver shows in this machine or container, whether or not a program can use them."""
    return len(glob.glob(NVIDIA_DEVICES)) or (1 if os.path.exists("/dev/dxg") else 0)  # the latter in WSL


def checks() -> list[Check]:
    """What is asked of the operating system."""
    return [
        Check(MACHINE, "system", _system, needed=False),
        Check(MACHINE, "cores", _cores, needed=False),
        Check(MACHINE, "memory", _memory, needed=False),
        Check(MACHINE, "disk", _disk, needed=False),
        Check(MACHINE, "temporary files", _temporary),
        Check(MACHINE, "/dev/shm", _shared_memory, needed=False),
        Check(MACHINE, "home", _home, needed=False),
        Check(MACHINE, "variables", _variables, needed=False),
        Check(MACHINE, "C compiler", _compiler),
        Check(GPU, "driver", _driver, needed=False),
        Check(LIBRARIES, "versions", _versions),
    ]


def _system() -> Iterator[Finding]:
    version = platform.python_version()
    where = sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix}, no virtual environment"
    yield Finding(MACHINE, "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding(MACHINE, "Python", f"{version} ({where})")


def _cores() -> Iterator[Finding]:
    usable, all_of_them = usable_cores(), os.cpu_count() or 0
    of = "" if usable == all_of_them else f" of {all_of_them}"
    yield Finding(MACHINE, "cores", f"{counted(usable, 'core')}{of}")


def _memory() -> Iterator[Finding]:
    free, whole = available_bytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding(MACHINE, "memory", f"{size(whole)}, {'unknown' if free is None else size(free)} free to this process")


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if (above := unwritable_ancestor(here)) is not None:
        yield Finding(MACHINE, "disk", f"{here}: nothing can be written to {above}", "remark", "give runs an --out")
    elif free < LITTLE_DISK:
        room = "give runs an --out with more room; --dry-run says how much a run writes"
        yield Finding(MACHINE, "disk", f"{size(free)} free in {here}", "remark", room)
    else:
        yield Finding(MACHINE, "disk", f"{size(free)} free in {here}")


def _temporary() -> Iterator[Finding]:
    try:
        folder = tempfile.gettempdir()
    except OSError:
        yield Finding(
            MACHINE,
            "temporary files",
            "there is no folder for them",
            "missing",
            "set TMPDIR to one that can be written",
        )
        return
    free = shutil.disk_usage(folder).free
    if free < 2**26:
        yield Finding(MACHINE, "temporary files", f"{size(free)} free in {folder}", "missing", "set TMPDIR to another")
    else:
        yield Finding(MACHINE, "temporary files", f"{folder}, {size(free)} free")


def _shared_memory() -> Iterator[Finding]:
    several = gpus_there() > 1
    if not SHARED_MEMORY.is_dir():
        free = 0
    else:
        free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= ENOUGH_SHARED:
        yield Finding(MACHINE, "/dev/shm", f"{size(free)} free")
        return
    remedy = "start the container with --shm-size 8g or --ipc host: NCCL needs it between the GPUs of a machine"
    yield Finding(MACHINE, "/dev/shm", f"{size(free)} free", "missing" if several else "remark", remedy)


def _home() -> Iterator[Finding]:
    given = os.environ.get("HOME", "")
    folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join(
        os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache"
    )
    above = unwritable_ancestor(Path(folder)) or _refusing(Path(folder))
    if above is None:
        yield Finding(MACHINE, "Triton's cache", folder)
    else:
        yield Finding(
            MACHINE,
            "Triton's cache",
            f"{folder} cannot be written ({above}); HOME is {given or 'not set'}",
            "remark",
            "every process compiles the kernels anew: set TRITON_CACHE_DIR to a folder that can be written",
        )


def _refusing(folder: Path) -> Path | None:
    """The place that takes no files although it seems to: a file system of the kernel's own, or one that is full."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError:
        return there
    return None


def _variables() -> Iterator[Finding]:
    there = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if there:
        yield Finding(MACHINE, "environment", " ".join(there))
    if os.environ.get("CUDA_LAUNCH_BLOCKING") not in (None, "", "0"):
        yield Finding(
            MACHINE, "CUDA_LAUNCH_BLOCKING", "the host waits for every kernel", "remark", "unset CUDA_LAUNCH_BLOCKING"
        )


def _compiler() -> Iterator[Finding]:
    """What Triton builds its launchers with on a GPU, and Inductor its code on a CPU."""
    gpu = gpus_there() > 0
    chosen = os.environ.get("CC") or "gcc"
    cc = next((path for name in (chosen, "gcc", "clang") if (path := shutil.which(name.split()[0]))), None)
    named = (os.environ.get("CXX", ""), "g++", "clang++")
    cxx = next((path for name in named if name and (path := shutil.which(name.split()[0]))), None)
    if cc is None:
        remedy = "install one: apt-get install gcc g++ libc6-dev, or set CC"
        what = "none: Triton's kernels cannot be launched" if gpu else "none: needed on a GPU alone"
        yield Finding(MACHINE, "C compiler", what, "missing" if gpu else "remark", remedy)
    else:
        yield Finding(MACHINE, "C compiler", cc)
    if cxx is None:
        remedy = "install one for --compile on a CPU: apt-get install g++"
        yield Finding(MACHINE, "C++ compiler", "none", "remark", remedy)
    scheme = sysconfig.get_default_scheme()
    # As Triton looks for it: Debian's own scheme names a folder that is not there.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not header.is_file():
        remedy = "install Python's headers: apt-get install python3-dev, or python3.N-dev of this Python"
        what = f"{header} is not there, which Triton's launchers are built with"
        yield Finding(MACHINE, "Python.h", what, "missing" if gpu else "remark", remedy)


def _driver() -> Iterator[Finding]:
    """What is seen of a GPU without its libraries."""
    there = gpus_there()
    if AMD_DEVICE.exists() and not there:
        yield Finding(GPU, "AMD", "a GPU of AMD is here, which is not supported", "remark")
    if not there:
        yield Finding(GPU, "GPU", "none of NVIDIA in /dev: everything computes on the CPU")
        return
    text = NVIDIA_DRIVER.read_text(errors="replace") if NVIDIA_DRIVER.is_file() else ""
    version = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    yield Finding(GPU, "devices", f"{counted(there, 'GPU')} in /dev, driver {version[1] if version else 'not named'}")
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=20, check=False).stdout
    named = (os.environ.get("TRITON_LIBCUDA_PATH", ""), *os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    elsewhere = any(folder and (Path(folder) / "libcuda.so.1").exists() for folder in named)
    if "libcuda.so.1" not in listed and not elsewhere:
        yield Finding(
            GPU,
            "libcuda.so.1",
            "not found by ldconfig: the driver's library is not in this container",
            "missing",
            "start the container with --gpus all, or run ldconfig, or set TRITON_LIBCUDA_PATH to its folder",
        )


def _versions() -> Iterator[Finding]:
    """Every package that this project asks for, in a version that it takes."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("ipfm") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        install = f'pip install "{needed.name}{needed.specifier}"'
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(LIBRARIES, needed.name, "not installed", "missing", install)
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield Finding(LIBRARIES, needed.name, f"{version}, needed is {needed.specifier}", "missing", install)
        elif needed.name in ("torch", "triton", "deepspeed", "numpy"):
            yield Finding(LIBRARIES, needed.name, version)
