"""Where a section of `ipfm doctor --full` runs, and what it answers: rows of a table."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A row of a section's table, by column. "verdict" is "", one of the words below, or begins with FAILED.
Row = dict[str, Any]
OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"


@dataclass(frozen=True)
class Place:
    """What a section is told."""

    device: str
    """Where it computes: "cuda", or "cpu" where there is no GPU."""
    folder: Path
    """For what it writes beside its table; it is there."""
    seconds: float
    """Time that it has; what it has not begun by then it leaves out, and says so."""
    quick: bool = False
    """The smallest sizes that take every way through the code, for tests."""
    inception: str | None = None
    """Inception network for an FID, where one was given."""
    began: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.startswith("cuda")

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        return time.monotonic() - self.began > share * self.seconds

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.began + self.seconds - time.monotonic()


def failed(reason: str) -> str:
    """The verdict of a row that shows a fault."""
    return f"{FAILED}: {' '.join(reason.split())[:300]}"


def judged(right: bool, reason: str) -> str:
    """The verdict: ok, or what is wrong."""
    return OK if right else failed(reason)


def tried(row: Row, ask: Callable[[], Row]) -> Row:
    """A row, filled by a call; one that fails is its verdict."""
    try:
        return row | ask()
    except TookTooLong as error:
        return row | {"verdict": f"{LEFT_OUT}: {error}"}
    except Exception as error:  # the others of the table are asked too
        return row | {"verdict": failed(f"{type(error).__name__}: {error}")}


def within(place: Place, cases: list[Any], what: str, share: float = 1.0) -> Iterator[Any]:
    """The cases, as long as there is time; some may be added meanwhile.

    Raises:
        OutOfTime: some were left out; `what` they are.
    """
    for number, case in enumerate(cases):
        if number and place.over(share):
            raise OutOfTime(f"{len(cases) - number} of {len(cases)} {what}: {place.seconds:.0f} s are over")
        yield case


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A block that is left by `TookTooLong` after so many seconds, once Python has control. In the main thread."""

    def stop(signum: int, frame: object) -> None:
        raise TookTooLong(f"not at its end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class TookTooLong(BaseException):
    """What was begun had to be left. No Exception: a compiler would make an error of its own of it."""


class OutOfTime(Exception):
    """What was not begun, as the time was over; the table is what it is."""
