"""What ends a run other than success. Nothing here is imported with torch, so that a command line can start without."""

from __future__ import annotations

import signal
from pathlib import Path


class Interrupted(Exception):
    """A signal arrived and the state is saved. `signum` is the signal; `folder`: the run's."""

    def __init__(self, signum: int, folder: Path | None = None) -> None:
        where = "" if folder is None else f" in {folder}"
        super().__init__(f"stopped by {signal.Signals(signum).name}, state saved{where}")
        self.signum = signum


class FolderInUse(ValueError):
    """Another process uses a run folder; the message says which."""


class Failed(RuntimeError):
    """A command cannot do what was asked, and not for the user's input; the message, one line, says why."""

    alone = False
    """It happened in this process, and another one may not know: it speaks for itself."""


class TrainingFailed(Failed):
    """The run cannot go on; the message says why and where to continue."""


class ProcessLost(TrainingFailed):
    """Another process of the run has ended, or does not answer."""


def described(error: BaseException) -> str:
    """What went wrong, in one line: the message; with the file, or with the error's kind where that says it first."""
    # What torch.compile adds is for its authors.
    text = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE=1")[0].split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, Failed)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
