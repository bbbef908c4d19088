"""The standard streams of a program: closed ones, those of narrow encodings, and those that nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

# What a shell reports of a program that ends because nobody reads it any more, such as one before `head`.
READER_GONE = 128 + signal.SIGPIPE


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    r"""Standard input, output and error that do not fail the block.

    A stream that was closed at the start leads nowhere, and a file opened later does not come to stand in its place.
    Characters that the encoding lacks are written as escapes: é becomes \xe9 where it is ASCII.

    Raises:
        SystemExit: with READER_GONE, in place of a BrokenPipeError, when the reader of stdout or stderr has gone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (theirs until the process ends)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        if not (_reader_is_gone(sys.stdout) or _reader_is_gone(sys.stderr)):
            raise
        sys.exit(READER_GONE)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # What is left would be tried again, and complained about, at the end of the process.
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())


def _reader_is_gone(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a test's stand-in
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
