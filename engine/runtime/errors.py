"""What ends a run other than success. Nothing here is imported with torch, so that a command line can start without."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """A signal arrived and the state is saved. `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, state saved")
        self.signum = signum


class FolderInUse(ValueError):
    """Another process uses a run folder; the message says which."""


class Failed(RuntimeError):
    """A command cannot do what was asked, and not for the user's input; the message, one line, says why."""


class TrainingFailed(Failed):
    """The run cannot go on; the message says why and where to continue."""


class ProcessLost(TrainingFailed):
    """Another process of the run has ended, or does not answer."""
