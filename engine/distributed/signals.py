"""Stopping on a signal: noted when it comes, agreed on by all processes, acted upon where the state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ipfm.engine.distributed.world import World
from ipfm.engine.runtime import peers
from ipfm.engine.runtime.launcher import Launcher

# SIGUSR1 is what people have Slurm send some time before the end (--signal=USR1@120); SIGHUP comes when the
# terminal, or the connection to it, is gone.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(Exception):
    """Some process received the signal `signum`; raised on all of them at the same point."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class SignalFlag:
    """The signal that this process received.

    Args:
        launcher: whose end counts as SIGTERM.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._signum = 0

    def note(self, signum: int) -> None:
        """`signum` arrived."""
        self._signum = signum

    @property
    def signum(self) -> int:
        """The signal, 0 for none."""
        return self._signum or (signal.SIGTERM if self._launcher.gone() else 0)


_listening: SignalFlag | None = None


@contextmanager
def catching_signals(launcher: Launcher) -> Iterator[SignalFlag]:
    """Note SIGINT, SIGTERM, SIGUSR1 and SIGHUP meanwhile instead of dying; under `nohup`, SIGHUP stays ignored.

    A second SIGINT acts as it normally does. Repeated others are ignored: launchers send SIGTERM more than once.
    """
    global _listening
    noted = SignalFlag(launcher)
    previous: dict[int, Any] = {}

    def note(signum: int, _frame: FrameType | None) -> None:
        noted.note(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, previous[signum])

    # Python delivers signals to the main thread alone.
    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if one == signal.SIGHUP and signal.getsignal(one) == signal.SIG_IGN:
                continue
            previous[one] = signal.signal(one, note)
    _listening = noted
    try:
        with peers.hearing_signals(SIGNALS, launcher.gone):
            yield noted
    finally:
        _listening = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_stop(world: World) -> None:
    """A point within a long evaluation where a run can be stopped. Every process passes it equally often.

    Raises:
        StopRequested: on every process, when one has received a signal; never outside of `catching_signals`.
    """
    peers.passed()
    if _listening is None:
        return
    signum = int(world.all_reduce_max_(torch.tensor(_listening.signum, device=world.device)))
    if signum:
        peers.taken_up()
        raise StopRequested(signum)
