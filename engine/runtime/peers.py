"""Watching the other processes of a run, and leaving when one is lost or a signal is not taken up.

A thread of its own does so, for the main thread may be in a call that does not come back: a device that waits for a
process which has died, or for a kernel that never ends, raises nothing in Python, and Python acts on signals only once
the call is over. The thread gives the main thread some time to end the run itself, lets a checkpoint in the making come
to its end, says the line that the run would have ended with, and ends the process, which is as if it had been killed.

A run of one process has no such thread, and everything here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from ipfm.engine.runtime.errors import Interrupted
from ipfm.engine.runtime.peer_links import Links, addresses, listen, reach

# Seconds without a word from a process after which it counts as lost; IPFM_SILENCE changes it.
SILENCE = 120.0
# Seconds in which a signal has to be taken up; IPFM_GRACE changes it. Launchers and schedulers kill after 30.
GRACE = 25.0
# Seconds that the main thread has to end the run itself, once a process is lost, where it can hear of that.
PATIENCE = 5.0
# The same where it cannot, as under NCCL, which would abort the process meanwhile.
HASTE = 0.3
# Seconds between two words to the peers.
BEAT = 1.0
# Seconds within which a process has to have ended that is on its way out, because of an error or of other processes.
LEAVING = 10.0
# Seconds for which what the last line says is looked up, on a file system that may hang too.
LOOK_UP = 5.0
# Seconds in which that line is taken, or is not.
PRINT = 2.0
# The signals after which launchers and schedulers do not wait for long.
URGENT = (signal.SIGTERM, signal.SIGINT)
# What a process on its way out does not listen to.
IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
FAILED, BAD_INPUT = 1, 2


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        answer: after which a process counts as hung (IPFM_TIMEOUT).
        silence: see `SILENCE`.
        grace: see `GRACE`.
        raises: what waits for another process raises where that has ended, or has not answered in time, as with gloo;
            otherwise a main thread that stays in one call is looked after here.
    """

    answer: float
    silence: float = SILENCE
    grace: float = GRACE
    raises: bool = True

    @property
    def patience(self) -> float:
        """How long the main thread may take to end the run of itself."""
        return PATIENCE if self.raises else HASTE


@dataclass(frozen=True)
class _Verdict:
    """Why this process has to end."""

    code: int
    reason: str
    at: float
    """When, by the clock of the links, if the main thread has not ended it until then."""


class Watch(threading.Thread):
    """The thread of one process.

    Args:
        rank: of this process.
        size: number of processes.
        server: where the first process listens; None elsewhere.
        first: the connection to the first process; None on itself.
        token: what a process of this run knows.
        times: see `Times`.
        here: all are on this machine.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        server: socket.socket | None,
        first: socket.socket | None,
        token: str,
        times: Times,
        here: bool,
    ) -> None:
        super().__init__(name="peers", daemon=True)
        self.rank, self.size, self.times, self.here = rank, size, times, here
        self.links = Links(server, token, self._hear, self._lose)
        if first is not None:
            self.links.add(first, 0)
        self._worker = threading.get_ident()
        self._lock = threading.Lock()
        self._claimed: tuple[float, int, BaseException] | None = None
        self._parted = self._over_with = False
        self._silent = self.taken = self.failing = False
        self._verdict: _Verdict | None = None
        self._busy_elsewhere = -BEAT
        self._next_beat = 0.0
        self._place: object = None
        self._moved = 0.0
        self.stopping: tuple[int, ...] = ()
        self._signals: dict[int, float] = {}
        self._interrupts = 0
        self.launcher_gone: Callable[[], bool] | None = None
        self._woken, self.wake = socket.socketpair()
        for end in (self._woken, self.wake):
            end.setblocking(False)
        self.links.watch(self._woken.fileno(), self._note)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Watch until the world is left."""
        try:
            while not self._over_with:
                self.links.wait(min(BEAT, self.times.patience) / 2)
                self._beat()
                self._judge()
        finally:
            if not self._over_with:  # a defect of this: nobody is to wait for a word from here
                self.links.say("leave")
            self.links.close()
            self._woken.close()

    def _beat(self) -> None:
        if self.links.clock >= self._next_beat:
            self._next_beat = self.links.clock + BEAT
            self.links.say("busy" if _at_work else "")
            # The stack is looked at as seldom.
            self._look_at_main()

    def _look_at_main(self) -> None:
        """Note when the main thread was last seen to get on."""
        frame = sys._current_frames().get(self._worker)
        place: list[int] = [_passed]
        while frame is not None:
            place += (id(frame), frame.f_lasti)
            frame = frame.f_back
        if place != self._place or _at_work:
            self._place, self._moved = place, self.links.clock

    def _hear(self, rank: int, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "busy":
            self._busy_elsewhere = self.links.clock
        elif word == "leave":
            self.links.drop(rank)
        elif word == "failing":
            # It ends of itself, and so may this one, of the same error.
            code, _, said = rest.partition(" ")
            self._silent |= rank == 0 and bool(said) and self.here
            if said and int(code) == BAD_INPUT:
                self._conclude(BAD_INPUT, said, PATIENCE)
            else:
                failed = f"process {rank} of {self.size} has failed{said and ': '}{said}"
                self._conclude(FAILED, failed, PATIENCE)
        elif word == "over":
            code, patience, reason = rest.split(" ", 2)
            # What the first process says of it, it says to people too.
            self._silent |= rank == 0
            self._conclude(int(code), reason, float(patience))

    def _lose(self, rank: int, what: str) -> None:
        lost = f"process {rank} of {self.size} has ended" + (f": {what}" if what else "")
        self._conclude(FAILED, lost, self.times.patience)

    def _note(self) -> None:
        """Signals have arrived, of which the main thread may not know yet."""
        # Those of a user's own handlers stop nothing.
        for number in filter(self.stopping.__contains__, self._woken.recv(4096)):
            self._signals.setdefault(number, self.links.clock)
            self._interrupts += number == signal.SIGINT

    def forget_signals(self) -> None:
        """Nobody listens to signals any more: they act as they usually do."""
        self.launcher_gone = None
        self._signals, self._interrupts = {}, 0

    def _conclude(self, code: int, reason: str, patience: float) -> None:
        """This process ends, and the others too."""
        before = self._verdict
        # A signal is what people know of, and counts where it was there before the time was up.
        if not self._parted and (before is None or (before.code == FAILED != code)):
            self._verdict = _Verdict(code, reason, self.links.clock + patience)
            self.links.say(f"over {code} {patience} {reason}")

    def _judge(self) -> None:
        clock = self.links.clock
        if self._claimed is not None and clock > self._claimed[0] + LEAVING:
            self._break_off(*self._claimed[1:])
        if self._claimed is not None or self._parted:
            return
        for rank in self.links.ranks:
            silence = self.links.silence(rank)
            if silence is not None and silence > self.times.silence:
                lost = f"nothing was heard of process {rank} of {self.size} for {self.times.silence:g} s"
                self._conclude(FAILED, lost, 0.0)
        self._judge_itself(clock)
        verdict = self._verdict
        if verdict is not None and clock >= verdict.at and not (_at_work and clock < verdict.at + self.times.answer):
            self._end(verdict)

    def _judge_itself(self, clock: float) -> None:
        """Whether this process's main thread stays in one call, though it should not."""
        if self.launcher_gone is not None and self.launcher_gone():
            self._signals.setdefault(signal.SIGTERM, clock)
        if clock - self._busy_elsewhere < 3 * BEAT or _at_work:
            # Whoever waits for the writing of a checkpoint is not stuck.
            self._signals = dict.fromkeys(self._signals, clock)
        still = clock - self._moved
        for number, since in self._signals.items():
            limit = self.times.grace if number in URGENT else self.times.answer
            if self._interrupts > 1 and number == signal.SIGINT:
                limit = min(limit, 2 * BEAT)  # whoever presses Ctrl-C twice does not want to wait
            if not self.taken and min(clock - since, still) >= limit:
                waited = f"process {self.rank} of {self.size} was in one call for {limit:g} s"
                self._conclude(128 + number, waited, 0.0)
        if still >= self.times.answer and not self.times.raises:
            self._conclude(FAILED, f"one call has taken {self.times.answer:g} s", 0.0)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _end(self, verdict: _Verdict) -> None:
        with self._lock:
            if self._claimed is not None:
                return
            self._claimed = self.links.clock, verdict.code, RuntimeError(verdict.reason)
        if self.speaks():
            _say(_last_line(verdict.code, verdict.reason))
        os._exit(verdict.code)

    def _break_off(self, code: int, error: BaseException) -> None:
        """The main thread has said what there is to say, and does not come to its end."""
        if code == FAILED and not _told:
            _say("".join(traceback.format_exception(error)).rstrip())
        os._exit(code)

    def speaks(self) -> bool:
        """Whether this process says why the run ends: the first one does, as long as it can."""
        silence = self.links.silence(0)
        return self.rank == 0 or (not self._silent and (silence is None or silence > min(PATIENCE, self.times.silence)))

    # -- for the main thread ------------------------------------------------------------------------------------------

    def claim(self, error: BaseException, code: int, *, known: bool, lost: str, said: str) -> None:
        """See `claim` below."""
        with self._lock:
            gone = self._claimed is not None
            if not gone:
                self._claimed = self.links.clock, code, error
        if gone:
            _wait_for_the_end()
        if threading.current_thread() is threading.main_thread():
            # Launchers end the others as soon as one has: the line is still to be said, and the end is near anyway.
            for number in IGNORED:
                signal.signal(number, signal.SIG_IGN)
        if lost:
            self.links.say(f"over {code} {self.times.patience} {lost}")
            # That the first process has gone shows in a moment.
            deadline = time.monotonic() + BEAT
            while self.rank and not self.speaks() and time.monotonic() < deadline:
                time.sleep(BEAT / 20)
        elif not known:
            self.links.say(f"failing {code} {said}")
            # Launchers end the others as soon as this one has ended, and the first one has this line to say.
            deadline = time.monotonic() + PATIENCE + 2 * BEAT
            while said and 0 in self.links.ranks and time.monotonic() < deadline:
                time.sleep(BEAT / 20)
        self.failing = not known

    def part(self) -> None:
        """The run is over for this process; the others go on without it, unless it has failed."""
        # An error may come from a script, and pass through here.
        failing = self.failing or not isinstance(sys.exception(), None | SystemExit | Interrupted)
        if not (self._parted or failing):
            self.links.say("leave")
        self._parted = True

    def stop(self) -> None:
        """End the thread, after `part`."""
        self._over_with = True
        with contextlib.suppress(OSError):
            self.wake.send(b"\0")
        self.join(2 * BEAT)
        self.wake.close()


_watch: Watch | None = None
# Whether the processes have looked for each other, which they do together and once: one may have found nobody.
_looked = False
# Of the command that this process runs, for the line that it ends with.
_name = ""
_way_on: Callable[[], str] | None = None
# How often the main thread has passed a point of the work at which it gets on, and how many threads write.
_passed = _at_work = 0
_told = False
_counting = threading.Lock()


def start(
    rank: int,
    size: int,
    *,
    meeting: str,
    here: bool,
    publish: Callable[[str], None],
    read: Callable[[], str],
    times: Times,
) -> None:
    """Begin to watch the processes of a run; every process calls this. One that cannot says so, and is not watched.

    Until `stop` nothing comes of further calls.

    Args:
        rank: of this process.
        size: number of processes; one alone has nobody to watch.
        meeting: the address at which they have met, where there is one.
        here: all are on this machine.
        publish: makes known to the others what the first process gives it.
        read: what that is, elsewhere.
        times: see `Times`.
    """
    global _watch, _looked
    if size == 1 or _looked:
        return
    _looked = True
    server = first = None
    try:
        if rank == 0:
            token = secrets.token_hex(8)
            try:
                server = listen(here=here)
            finally:
                port = 0 if server is None else server.getsockname()[1]
                publish(json.dumps({"port": port, "token": token, "hosts": addresses(meeting, here=here)}))
        else:
            said = json.loads(read())
            token = said["token"]
            if not said["port"]:
                return
            first = reach(said["hosts"], said["port"], token, rank)
    except OSError as error:
        _say(
            f"{_named()}: note: process {rank} of {size} is not watched ({error}): what becomes of it the others learn "
            "from IPFM_TIMEOUT alone"
        )
        return
    _watch = Watch(rank, size, server=server, first=first, token=token, times=times, here=here)
    _watch.start()


def call(name: str) -> None:
    """Name the command that this process runs, for messages."""
    global _name
    _name = name


def describe_way_on(describe: Callable[[], str]) -> None:
    """Say by `describe`, from another thread, where the run can be continued, should it end from now on."""
    global _way_on
    _way_on = describe


def passed() -> None:
    """The main thread gets on with its work."""
    global _passed
    _passed += 1


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """What is written meanwhile is to be finished before this process ends because of others."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _at_work
    with _counting:
        _at_work += change


@contextlib.contextmanager
def hearing_signals(stopping: tuple[int, ...], launcher_gone: Callable[[], bool]) -> Iterator[None]:
    """Watch meanwhile that the signals `stopping`, which have a handler, and the launcher's end are taken up."""
    watch = _watch
    if watch is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(watch.wake.fileno(), warn_on_full_buffer=False)
    watch.stopping, watch.launcher_gone = stopping, launcher_gone
    try:
        yield
    finally:
        watch.forget_signals()
        signal.set_wakeup_fd(before)


def taken_up() -> None:
    """All processes know of a signal, and save."""
    if _watch is not None:
        _watch.taken = True


def claim(error: BaseException, code: int, *, known: bool, lost: str = "", said: str = "") -> None:
    """Let the main thread end this process, which `error` does. It does not return where the watching thread does so.

    Args:
        error: what was raised.
        code: the exit code that follows.
        known: every process has raised the same, and ends of itself.
        lost: what is wrong with another process, if that is what the error says.
        said: what only the first process says of such an error, on one line, if this one may be alone with it.
    """
    if _watch is not None:
        _watch.claim(error, code, known=known, lost=lost, said=said)


def told() -> None:
    """The line that the run ends with has been printed."""
    global _told
    _told = True


def speaks() -> bool:
    """Whether this process says that another one is lost: one does for all, where they can agree on it."""
    return _watch is None or _watch.speaks()


def part() -> None:
    """The run is over for this process: it leaves the others, who go on without it unless it failed."""
    if _watch is not None:
        _watch.part()


def stop() -> None:
    """Watch no longer."""
    global _watch, _looked
    watch, _watch, _looked = _watch, None, False
    if watch is not None:
        watch.part()
        watch.stop()


def _named() -> str:
    return _name or os.path.basename(sys.argv[0]) or "ipfm"


def _last_line(code: int, reason: str) -> str:
    """What a run ends with."""
    found: list[str] = []
    if _way_on is not None:
        way_on = _way_on
        _try(lambda: found.append(way_on()), LOOK_UP)
    if code == FAILED:
        what = f"failed: another process of this run has ended or does not answer ({reason})"
    elif code == BAD_INPUT:
        return f"{_named()}: error: {reason}"
    else:
        what = f"stopped by {signal.Signals(code - 128).name} before the state could be saved ({reason})"
    return f"{_named()}: {what}{f': {found[0]}' if found else ''}"


def _say(text: str) -> None:
    """Print on stderr, whatever the main thread holds; or do without, where nobody reads it."""
    line = f"{chr(10) if os.isatty(2) else ''}{text}\n".encode()

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, line)

    _try(write, PRINT)


def _try(work: Callable[[], object], seconds: float) -> None:
    """Do something that may take forever, for so long."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _wait_for_the_end() -> NoReturn:
    while True:
        time.sleep(1.0)


@atexit.register
def _leave_at_exit() -> None:
    """A script that ends without leaving the world ends well, unless an error ended it."""
    if _watch is not None:
        _watch.failing |= getattr(sys, "last_value", None) is not None
    stop()


def _after_fork() -> None:
    global _watch, _looked
    watch, _watch, _looked = _watch, None, False
    if watch is not None:
        watch.links.abandon()
        # A signal to the child is none to the parent.
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_after_fork)
