"""What a command has to say beside its answer: one line on stderr, and an entry of "remarks" in its JSON."""

from __future__ import annotations

import contextlib
import sys


class Remarks(list[str]):
    """The remarks of a command, in their order; each is said when it is added."""

    def __init__(self, prog: str = "ipfm") -> None:
        super().__init__()
        self._prog = prog

    def add(self, text: str) -> None:
        """Say `text`, one line, and keep it."""
        self.append(text)
        # The answer counts, where stderr takes nothing.
        with contextlib.suppress(OSError):
            print(f"{self._prog}: note: {text}", file=sys.stderr, flush=True)
