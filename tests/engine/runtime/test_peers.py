"""Connections between the processes of a run, in one process; what becomes of real ones: test_blocked_device.py."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ipfm.engine.runtime import peer_links, peers
from ipfm.engine.runtime.peer_links import Links, addresses, listen, reach

TOKEN = "secret"


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    yield
    peers.stop()


@pytest.fixture
def said() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def hub(said: list[tuple[int, str]]) -> Iterator[tuple[Links, int]]:
    """The first process's connections, and its port."""
    server = listen(here=True)
    links = Links(server, TOKEN, lambda *line: said.append(line), lambda rank, why: said.append((rank, f"gone {why}")))
    yield links, server.getsockname()[1]
    links.close()


def meanwhile(links: Links, work: Callable[[], object]) -> list[object]:
    """What `work` returns, or the error that it raises, while the first process listens."""
    found: list[object] = []

    def do() -> None:
        try:
            found.append(work())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=do)
    thread.start()
    while thread.is_alive():
        links.wait(0.01)
    return found


def hear(links: Links, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until() and time.monotonic() < deadline:
        links.wait(0.01)
    assert until()


def test_a_process_is_found_at_the_first_address_at_which_it_is(hub, said) -> None:
    links, port = hub
    (connection,) = meanwhile(links, lambda: reach(["name.invalid", "127.0.0.1"], port, TOKEN, 3))
    assert isinstance(connection, socket.socket) and links.ranks == [3]
    connection.sendall(b"\nbu")
    connection.sendall(b"sy\n")
    hear(links, lambda: len(said) == 2)
    assert said == [(3, ""), (3, "busy")] and links.silence(3) is not None
    connection.close()
    hear(links, lambda: len(said) == 3)
    assert said[-1] == (3, "gone ") and links.ranks == [] and links.silence(3) is None


def test_a_stranger_is_none_of_the_processes_and_the_end_of_it_is_nothing(hub, said) -> None:
    links, port = hub
    (error,) = meanwhile(links, lambda: reach(["127.0.0.1"], port, "another", 1))
    assert str(error) == "127.0.0.1: somebody else is there"
    with socket.create_connection(("127.0.0.1", port)) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 10_000)
        hear(links, lambda: len(links._peers) == 1)
        hear(links, lambda: not links._peers)
    assert said == [] and links.ranks == []


def test_an_address_at_which_nobody_is_is_named(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "ANSWER", 0.05)
    with pytest.raises(OSError, match=r"^127\.0\.0\.1: no answer within 0\.05 s$"):
        reach(["127.0.0.1"], hub[1], TOKEN, 1)
    server = listen(here=True)
    port = server.getsockname()[1]
    server.close()
    with pytest.raises(OSError, match=r"^127\.0\.0\.1: Connection refused$"):
        reach(["127.0.0.1"], port, TOKEN, 1)


def test_while_a_process_was_suspended_itself_nobody_was_silent(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    links, port = hub
    (connection,) = meanwhile(links, lambda: reach(["127.0.0.1"], port, TOKEN, 1))
    assert isinstance(connection, socket.socket)
    later = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: later)
    links.wait(0.1)
    silence = links.silence(1)
    assert silence is not None and silence < 1.0


def test_processes_meet_as_the_process_group_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert addresses("node1", here=True) == ["127.0.0.1"]
    found = addresses("node1", here=False)
    assert found[0] == "node1" and "" not in found and len(set(found)) == len(found)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert addresses("node1", here=False)[:2] == ["node1", "127.0.0.1"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface-at-all")
    assert addresses("node1", here=False) == found


def test_a_run_of_one_process_watches_nobody() -> None:
    before = threading.active_count()
    peers.start(
        0, 1, meeting="", here=True, publish=pytest.fail, read=lambda: pytest.fail("read"), times=peers.Times(600.0)
    )
    peers.claim(ValueError(), 1, known=False)
    peers.part()
    peers.stop()
    assert threading.active_count() == before and peers._watch is None and peers.speaks()


def test_what_cannot_be_reached_is_said_and_the_run_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    said = '{"port": 1, "token": "t", "hosts": ["name.invalid"]}'
    peers.start(1, 2, meeting="", here=True, publish=pytest.fail, read=lambda: said, times=peers.Times(600.0))
    line = capfd.readouterr().err
    assert "note: process 1 of 2 is not watched (name.invalid: " in line and line.count("\n") == 1
    assert peers._watch is None


def test_one_that_nobody_could_reach_is_not_looked_for_again(capfd: pytest.CaptureFixture[str]) -> None:
    """A second training of a script: the first process is watching already, and makes nothing known any more."""
    said = '{"port": 1, "token": "t", "hosts": ["127.0.0.1"]}'
    calls: list[str] = []

    def read() -> str:
        calls.append("read")
        return said

    for _ in range(2):
        peers.start(1, 2, meeting="", here=True, publish=pytest.fail, read=read, times=peers.Times(600.0))
    assert len(calls) == 1 and capfd.readouterr().err.count("is not watched") == 1
    peers.stop()
    peers.start(1, 2, meeting="", here=True, publish=pytest.fail, read=read, times=peers.Times(600.0))
    assert len(calls) == 2
    peers.stop()


def test_nothing_is_left_of_the_watching() -> None:
    def held() -> set[object]:
        """Its threads and this process's open files; others may go meanwhile."""
        threads = {one for one in threading.enumerate() if one.name == "peers"}
        return {*threads, *os.listdir("/proc/self/fd")}

    gc.collect()
    gc.disable()
    try:
        before = held()
        peers.start(0, 2, meeting="", here=True, publish=len, read=str, times=peers.Times(600.0))
        assert len(held() - before) >= 5
        peers.stop()
        assert held() <= before
    finally:
        gc.enable()


def test_a_signal_of_a_users_own_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that a run stops for count, where they are not taken up in time."""
    peers.start(0, 2, meeting="", here=True, publish=len, read=str, times=peers.Times(0.05, grace=0.05))
    watch, came, ended = peers._watch, [], []
    assert watch is not None
    monkeypatch.setattr(watch, "_conclude", lambda code, *why: ended.append(code))
    before = {one: signal.signal(one, lambda *_: came.append(1)) for one in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        with peers.hearing_signals((signal.SIGTERM,), lambda: False):
            for number in before:
                os.kill(os.getpid(), number)
            deadline = time.monotonic() + 20
            while 143 not in ended and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert set(ended) == {143} and len(came) == 2
