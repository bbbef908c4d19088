"""Connections between the processes of a run, of which the operating system says at once when an end is gone.

The first process listens, and every other one holds a connection to it. Each end says some bytes every second; lines of
text say more. Nothing here takes part in the training, or waits for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Seconds that one process tries to reach another at one address.
REACH = 5.0
# Seconds that it waits for an answer there: a busy machine may take a while.
ANSWER = 30.0
# Bytes of a line, at most; whoever says more is none of the run's processes.
LONGEST = 4000


@dataclass(eq=False)
class Peer:
    """The process at the other end of a connection."""

    connection: socket.socket
    rank: int = -1
    """-1 until it has said who it is."""
    heard: float = 0.0
    """When it last said something, by the clock of `Links`."""
    unread: bytes = field(default=b"", repr=False)


class Links:
    """This process's connections.

    Args:
        server: where the first process listens; None elsewhere.
        token: what a process of this run knows.
        hear: called with each line that a peer says, and its rank.
        lose: called with the rank of a peer whose connection has closed, and what was wrong with it ("" for its end).
    """

    def __init__(
        self,
        server: socket.socket | None,
        token: str,
        hear: Callable[[int, str], None],
        lose: Callable[[int, str], None],
    ) -> None:
        self._server, self._token, self._hear, self._lose = server, token, hear, lose
        self._selector = selectors.DefaultSelector()
        self._peers: list[Peer] = []
        self.clock = 0.0
        """Seconds for which this process was awake: while it was stopped it heard nobody."""
        self._looked = time.monotonic()
        if server is not None:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ, self._accept)

    def add(self, connection: socket.socket, rank: int) -> None:
        """Take over a connection to the process `rank`."""
        connection.setblocking(False)
        peer = Peer(connection, rank, self.clock)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(peer))

    def watch(self, descriptor: int, act: Callable[[], None]) -> None:
        """Call `act` whenever `descriptor` can be read."""
        self._selector.register(descriptor, selectors.EVENT_READ, act)

    def wait(self, seconds: float) -> None:
        """Hear what is said within `seconds`, or sooner."""
        ready = self._selector.select(seconds)
        now = time.monotonic()
        self.clock += min(now - self._looked, 2.0 * seconds)
        self._looked = now
        for key, _ in ready:
            key.data()

    def say(self, line: str, *, to: int | None = None) -> None:
        """Say `line` to every peer, or to one."""
        for peer in list(self._peers):
            if peer.rank >= 0 and to in (None, peer.rank):
                # One that takes nothing shows by its silence, and one that has gone when it is read from.
                with contextlib.suppress(OSError):
                    peer.connection.send(line.encode(errors="replace")[: LONGEST - 1] + b"\n")

    def silence(self, rank: int) -> float | None:
        """Seconds for which nothing was heard of the process `rank`; None where it is not connected."""
        return next((self.clock - peer.heard for peer in list(self._peers) if peer.rank == rank), None)

    @property
    def ranks(self) -> list[int]:
        """Who is connected."""
        return [peer.rank for peer in list(self._peers) if peer.rank >= 0]

    def drop(self, rank: int) -> None:
        """Close the connection to the process `rank`."""
        for peer in [one for one in self._peers if one.rank == rank]:
            self._close(peer)

    def close(self) -> None:
        """Close everything."""
        for peer in list(self._peers):
            self._close(peer)
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def abandon(self) -> None:
        """In a forked process: close what is the parent's, of which the peers are not to take this one for."""
        for peer in self._peers:
            peer.connection.close()
        if self._server is not None:
            self._server.close()

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            self.add(self._server.accept()[0], -1)

    def _close(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _read(self, peer: Peer) -> None:
        try:
            said = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            # What had not been read of what was said to it makes a reset of its end.
            ended = isinstance(error, ConnectionResetError | BrokenPipeError)
            self._gone(peer, "" if ended else error.strerror or str(error))
            return
        if not said:
            self._gone(peer, "")
            return
        peer.heard = self.clock
        *lines, peer.unread = (peer.unread + said).split(b"\n")
        if len(peer.unread) > LONGEST:
            self._gone(peer, "")
            return
        for line in lines:
            text = line.decode(errors="replace")
            if peer.rank >= 0:
                self._hear(peer.rank, text)
            elif not self._is_known(peer, text):
                self._close(peer)
                return

    def _is_known(self, peer: Peer, line: str) -> bool:
        hello, _, rank = line.partition(" ")
        if not (secrets.compare_digest(hello.encode(), self._token.encode()) and rank.isdecimal()):
            return False
        peer.rank = int(rank)
        self.say("here", to=peer.rank)
        return True

    def _gone(self, peer: Peer, what: str) -> None:
        self._close(peer)
        if peer.rank >= 0:
            self._lose(peer.rank, what)


def listen(*, here: bool) -> socket.socket:
    """A socket on which the first process listens: on this machine alone if all are `here`.

    Raises:
        OSError: there is no network.
    """
    if here:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def addresses(meeting: str, *, here: bool) -> list[str]:
    """Where others may reach this process, the likeliest first; they have met at the address `meeting`."""
    if here:
        return ["127.0.0.1"]
    # As the processes met, or over an interface that a user has named for them.
    found = [meeting]
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        found.append(_address_of(os.environ.get(name, "")))
    with contextlib.suppress(OSError, UnicodeError):
        found += [str(one[4][0]) for one in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    # The way out, by which nothing is sent here.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect(("192.0.2.1", 9))
        found.append(out.getsockname()[0])
    return [address for address in dict.fromkeys(found) if address]


def reach(hosts: list[str], port: int, token: str, rank: int) -> socket.socket:
    """Connect to the first process, as the process `rank`, at the first of these addresses at which it is.

    Raises:
        OSError: at none; the message says why not at each.
    """
    faults = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=REACH)
        except (OSError, UnicodeError) as error:
            faults.append(f"{host}: {getattr(error, 'strerror', None) or error}")
            continue
        fault = "somebody else is there"
        try:
            connection.settimeout(ANSWER)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(f"{token} {rank}\n".encode())
            if connection.recv(5) == b"here\n":
                return connection
        except TimeoutError:
            fault = f"no answer within {ANSWER:g} s"
        except OSError:  # it has hung up
            pass
        connection.close()
        faults.append(f"{host}: {fault}")
    raise OSError("; ".join(faults) or "no address")


def _address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this machine; "" where it has none."""
    import fcntl

    if not 0 < len(interface.encode()) < 16:
        return ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        siocgifaddr = 0x8915
        return socket.inet_ntoa(fcntl.ioctl(asking.fileno(), siocgifaddr, interface.encode().ljust(256, b"\0"))[20:24])
    return ""
