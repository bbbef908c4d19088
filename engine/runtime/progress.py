"""How far a long work is: a bar where somebody watches, now and then a line where stderr is a file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

# Where nobody watches (stderr is a file), the progress of the whole work is this many lines, if it is no longer than
# their number of `LONGEST`.
LINES = 20
# Seconds after which there is a line more, for work that takes days.
LONGEST = 600.0


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere a line of the same form at first, at every 5 % and every ten minutes.

    Args:
        title: in front.
        total: number of units of the whole work.
        first: number of units done before.
        unit: what is counted, as tqdm takes it.
        pause: seconds between two lines, and before the first one: short work leaves none.
        leave: the bar stays when the work is done.
        enabled: one process of a run has it; without it nothing is shown.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        first: int = 0,
        unit: str = " img",
        pause: float = 10.0,
        leave: bool = False,
        enabled: bool = True,
    ) -> None:
        self.title, self.total, self.first, self.unit = title, total, first, unit
        self.done = first
        self.started = time.perf_counter()
        self._pause, self._enabled = pause, enabled
        self._line_at = self.started
        self._shown = -1  # twentieth of the work in which the last line was printed
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                desc=title, total=total, initial=first, unit=unit, dynamic_ncols=True, leave=leave, file=sys.stderr
            )

    def move(self, done: int, postfix: str = "") -> None:
        """`done` units are done; `postfix` is shown behind."""
        self.done = done
        if self._bar is not None:
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        part, now = done * LINES // max(self.total, 1), time.perf_counter()
        waited = now - self._line_at
        if self._enabled and ((part > self._shown and waited >= self._pause) or waited >= LONGEST):
            self._shown, self._line_at = part, now
            # ncols=0 prints the numbers without a bar; tqdm subtracts `initial` when it computes the rate.
            line = tqdm.format_meter(
                done,
                self.total,
                now - self.started,
                ncols=0,
                prefix=self.title,
                unit=self.unit,
                postfix=postfix,
                initial=self.first,
            )
            print(line, file=sys.stderr, flush=True)

    def advance(self, units: int = 1) -> None:
        """So many units more are done."""
        self.move(self.done + units)

    def close(self) -> None:
        """The work is done, or given up."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
