"""What the environment says of a run's processes: a launcher's variables, GPUs, the network, shares of the cores."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import triton

from ipfm.engine.distributed.device import run_device, uses_gpu
from ipfm.engine.runtime import launcher, peers
from ipfm.engine.runtime.cores import usable_cores
from ipfm.engine.runtime.wording import counted

# Seconds after which a process gives up on one that does not answer; IPFM_TIMEOUT changes it.
TIMEOUT = 600.0
# Seconds by which NCCL's own watchdog, which aborts the process, is later than that.
LATER = 60.0
# Seconds after which a process says that it waits for others to come, and that it gets beyond the time to end itself.
UNTIL_SAID, GRACE = 10.0, 10.0


def check_environment() -> None:
    """Check what the environment says of this process's run, before anything is begun.

    Raises:
        ValueError: a launcher's variables, a time of IPFM_…, DS_ACCELERATOR or TRITON_INTERPRET cannot be, or there are
            more processes than GPUs; one line.
    """
    launcher.check_launch()
    watch_times()
    accelerator, possible = os.environ.get("DS_ACCELERATOR"), ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if accelerator not in (None, *possible):
        either = " or ".join(possible)
        raise ValueError(f"DS_ACCELERATOR must be {either} on this machine, got {accelerator!r}: unset it")
    if uses_gpu() and triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 computes every kernel in Python, for tests on a CPU: unset it on a GPU")
    run_device()


def environment_remarks() -> list[str]:
    """What to say of the environment before anything is begun, though it can be used; a line each."""
    return [*launcher.launch_remarks(), *_no_gpu()]


# What an NVIDIA driver shows of each GPU, whether or not a program may use it.
_GPUS = Path("/proc/driver/nvidia/gpus")


def _no_gpu() -> list[str]:
    """What keeps this process from a GPU that is there or was named; nothing where GPUs are hidden on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = os.environ.get("DS_ACCELERATOR") == "cpu" or (visible is not None and (visible or "-").startswith("-"))
    if hidden or torch.cuda.is_available():
        return []
    # `deepspeed` sets the variable where there is no GPU too.
    there = _GPUS.is_dir() and any(_GPUS.iterdir())
    if visible is not None and (there or not launcher.is_launched()):
        return [f"CUDA_VISIBLE_DEVICES={visible} names no GPU that can be used: computing on the CPU"]
    if there:
        cannot = (
            "was built without CUDA" if torch.version.cuda is None else f"needs a driver for CUDA {torch.version.cuda}"
        )
        return [
            f"this machine has a GPU that cannot be used (torch {torch.__version__} {cannot}): computing on the CPU"
        ]
    return []


def answer_timeout() -> timedelta:
    """How long a process waits for another one: `TIMEOUT`, or what IPFM_TIMEOUT says.

    Raises:
        ValueError: IPFM_TIMEOUT is no number of seconds.
    """
    return timedelta(seconds=_seconds("IPFM_TIMEOUT", TIMEOUT))


def watch_times(*, raises: bool = True) -> peers.Times:
    """How long the processes of a run bear with each other, see `peers`.

    Args:
        raises: see `peers.Times`.

    Raises:
        ValueError: IPFM_TIMEOUT, IPFM_SILENCE or IPFM_GRACE is no number of seconds.
    """
    return peers.Times(
        answer=_seconds("IPFM_TIMEOUT", TIMEOUT),
        silence=_seconds("IPFM_SILENCE", peers.SILENCE),
        grace=_seconds("IPFM_GRACE", peers.GRACE),
        raises=raises,
    )


def _seconds(name: str, otherwise: float) -> float:
    given = os.environ.get(name, str(otherwise))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{name} must be a number of seconds > 0, got {given!r}")
    return seconds


def no_network(error: str) -> str:
    """What is missing for processes to meet, if that is what torch says; else ""."""
    if "failed to listen" in error:
        another = "give another one (`deepspeed --master_port N`, `torchrun --master_port N`)"
        return f"port {launcher.launched_port()} is in use: {another}"
    place, seconds = launcher.meeting_place(), f"{answer_timeout().total_seconds():g} s (IPFM_TIMEOUT)"
    if came := re.search(r"Timed out after \d+ seconds waiting for clients\. (\d+)/(\d+) clients joined", error):
        few = f"{came[1]} of {counted(int(came[2]), 'process')} came to {place} within {seconds}"
        return f"{few}: start the same command on every machine"
    if re.search(r"timed out.* while trying to connect to|failed to connect to|Timed out .*connect", error):
        if not launcher.on_first_machine() and _is_loopback(_own_address(launcher.launched_address())):
            return f"nobody answers at {place} within {seconds}: that is this machine itself, and not the first one"
        return f"nobody answers at {place} within {seconds}: is the first machine's command running, and its port open?"
    if "connectFullMesh failed" in error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        by = f"by the network interface {interface}" if interface else "by the address of this machine's name"
        return (
            f"the processes of this run met at {place} and do not reach each other {by}: name the interface between "
            "the machines by GLOO_SOCKET_IFNAME (ip address lists them), and open its ports"
        )
    if re.search(r"[Uu]nable to find (?:interface|address) for", error):
        named = os.environ.get("GLOO_SOCKET_IFNAME")
        if named:
            unknown = f"GLOO_SOCKET_IFNAME={named!r} is no network interface of this machine"
            return f"{unknown}: unset it, or name another (ip link lists them)"
        return (
            "no network interface is up, not even the loopback: bring it up (ip link set lo up), "
            "or name one that is by GLOO_SOCKET_IFNAME"
        )
    return ""


def choose_interface() -> None:
    """Have gloo talk by the network interface that leads to MASTER_ADDR, where there are several machines.

    By itself it takes the address of this machine's own name, which many systems have as 127.0.1.1. What
    GLOO_SOCKET_IFNAME says stays.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or not launcher.several_machines():
        return
    if name := _interface_to(launcher.launched_address()):
        os.environ["GLOO_SOCKET_IFNAME"] = name


# An address of the documents (RFC 5737), to which nothing is sent: the way to it is the way out.
_ANYWHERE = "192.0.2.1"


def _interface_to(host: str) -> str:
    """The network interface by which this machine reaches `host`; if that is itself, the one that leads out.

    Returns:
        Its name; "" where there is none, or it cannot be told.
    """
    import psutil

    interfaces = {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    for towards in (host, _ANYWHERE):
        own = _own_address(towards)
        if own in interfaces and not _is_loopback(own):
            return interfaces[own]
    # Neither a name that leads anywhere nor a way out: the only one, if there is only one.
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    others = {name for address, name in interfaces.items() if name in up and not _is_loopback(address)}
    return others.pop() if len(others) == 1 else ""


def _own_address(host: str) -> str:
    """The address from which this machine would talk to `host`; "" where it cannot. Nothing is sent."""
    try:
        family, kind, *_, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0]).partition("%")[0]
    except (OSError, UnicodeError):
        return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """While the processes of a run meet: say that they are waited for, and end this one when it takes too long.

    The libraries end it themselves in most cases, and wait for ever in some, such as for one that has ended meanwhile.
    """
    timeout, met = answer_timeout().total_seconds(), threading.Event()
    place, rank, size = launcher.meeting_place(), launcher.launched_rank(), launcher.launched_processes()

    def watch() -> None:
        until_said = min(UNTIL_SAID, timeout)
        if not met.wait(until_said) and launcher.is_first_here() and timeout > until_said:
            said = f"process {rank} of {size} waits for the others at {place}, for at most {timeout:g} s (IPFM_TIMEOUT)"
            print(said, file=sys.stderr, flush=True)
        if not met.wait(timeout - until_said + GRACE):
            line = f"the processes of this run did not all meet at {place} within {timeout:g} s (IPFM_TIMEOUT)"
            print(f"{Path(sys.argv[0]).name}: failed: {line}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="waiting for others", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def share_cores(local_size: int, *, speaks: bool) -> None:
    """Divide this machine's cores among its processes.

    Fewer threads, as the user's OMP_NUM_THREADS says, stay. More wait for each other most of the time: they are taken
    back, and the one that `speaks` says so.
    """
    share = max(1, usable_cores() // max(1, local_size))
    threads = torch.get_num_threads()
    asked = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if asked and threads < share:
        return
    # MKL's number as well, which torch takes from its own variable.
    torch.set_num_threads(share)
    if asked and threads > share and speaks:
        print(
            f"{' and '.join(asked)} would start {counted(threads, 'thread')} in each of "
            f"{counted(local_size, 'process')} on {counted(usable_cores(), 'core')}: {share} instead",
            file=sys.stderr,
        )
