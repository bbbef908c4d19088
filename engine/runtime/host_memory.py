"""Memory of the host: what is free, and one line where what is asked for needs more."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from ipfm.engine.runtime.errors import Failed
from ipfm.engine.runtime.wording import size

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
# What torch, NumPy and Python say of an allocation that failed, on any device.
_REFUSED = re.compile(r"can't allocate memory|not enough memory|out of memory|Unable to allocate", re.IGNORECASE)


def available_bytes() -> int | None:
    """Bytes that this process can still take, of the machine, its container and its limit; None where not known."""
    found = [_machine(), *map(_container, *zip(*_CGROUPS, strict=True)), _limit()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def check_memory(needed: int, what: str, way_on: str) -> None:
    """Check that the host has room for `needed` bytes.

    Args:
        needed: bytes, a lower bound.
        what: needs them: "a batch of 8,000,000 images".
        way_on: what to do instead: "give a smaller --batch".

    Raises:
        ValueError: it has not; one line with the way on.
    """
    free = available_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"{what} needs at least {size(needed)} of the host's memory, of which {size(free)} is free: {way_on}"
        )


def refuses_memory(error: BaseException) -> bool:
    """Whether `error` says that memory was refused, of the host or of a device."""
    said = isinstance(error, RuntimeError) and _REFUSED.search(str(error))
    return isinstance(error, MemoryError) or bool(said)


@contextlib.contextmanager
def enough_memory(way_on: str) -> Iterator[None]:
    """A block whose allocations may fail: one line that says the way on.

    Raises:
        Failed: one did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not refuses_memory(error):
            raise
        raise Failed(f"{not_enough(error)}: {way_on}") from error


def not_enough(error: BaseException) -> str:
    """What an error for which `refuses_memory` holds says, in one line."""
    # What torch begins with is the place in its code.
    text = re.sub(r"^\[enforce fail [^]]*\] [^.]*\. ", "", " ".join(str(error).split()))
    reason = f" ({text.partition('. ')[0][:200]})" if text else ""
    return f"there is not enough memory{reason}"


def _machine() -> int | None:
    return _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB", 1024)


def _container(limit: Path, used: Path) -> int | None:
    most, now = _number(limit, r"^(\d+)\s*$"), _number(used, r"^(\d+)\s*$")
    return None if most is None or now is None else max(most - now, 0)


def _limit() -> int | None:
    """What `ulimit -v` leaves."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    now = _number(Path("/proc/self/statm"), r"^(\d+)", resource.getpagesize())
    return None if now is None else max(most - now, 0)


def _number(path: Path, pattern: str, factor: int = 1) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if found is None else factor * int(found[1])
