"""What ties a process to the rest of its run: the launcher above it, and leaving the process group."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path

from ipfm.engine.runtime import peers, slurm


class Launcher:
    """The launcher that started this process: its parent, and for DeepSpeed the runner above that.

    A launcher that is killed cannot stop its processes: they notice here, and stop as if they had been told to.

    Args:
        launched: whether a launcher started this process. One started by hand may outlive its shell.
    """

    def __init__(self, launched: bool) -> None:
        self._parent = os.getppid() if launched else None
        self._runner = _parent_of(self._parent) if self._parent and _is_deepspeed(self._parent) else None

    def gone(self) -> bool:
        """True once the launcher or its runner has ended."""
        if self._parent is None:
            return False
        return os.getppid() != self._parent or (self._runner is not None and _parent_of(self._parent) != self._runner)


def lost_process(error: BaseException) -> str:
    """What is wrong with another process of the run, if that is what `error` of torch.distributed says; else ""."""
    text = " ".join(str(error).split())
    if found := re.search(r"Connection (?:closed|reset) by peer|Broken pipe|Timed out waiting \d+ ?ms", text):
        return found[0] if isinstance(error, RuntimeError) else ""
    # Errors of a library that nobody has loaded need not be looked for.
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
            return re.split(r"\.(?= |$)", text)[0][:200]
    return "connection closed after a timeout" if "Application timeout caused pair closure" in text else ""


def _is_deepspeed(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _parent_of(pid: int) -> int | None:
    try:
        # The name in parentheses may hold anything; the parent is the second field after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


# What a launcher tells the processes that it starts. The number of them on this machine is LOCAL_SIZE to `deepspeed`,
# LOCAL_WORLD_SIZE to torchrun.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Those that every launcher sets.
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch() -> None:
    """Check that what the environment says of a launcher is whole, and a place among the processes of a run.

    Raises:
        ValueError: it is a leftover, or wrong; one line.
    """
    if fault := _launch_fault():
        raise ValueError(fault)
    if not is_launched():
        return
    import socket

    address = launched_address()
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"MASTER_ADDR must be a host that can be found, got {address!r} ({error})") from error


def launch_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells one of `ranks` processes on this machine, for those that are started by hand."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}


def free_port() -> int:
    """A port of this machine at which nobody listens.

    It is none of those that the system gives to whoever asks for any, as connections that go out do: one of these might
    be taken before the process that it is for listens.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    ports = range(10_000, first if first > 12_000 else 32_768)
    while True:
        port = secrets.choice(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def forget_launch() -> None:
    """Take a launcher's variables out of this process's environment: it is a command of its own, which speaks."""
    for name in (*VARIABLES, "SLURM_PROCID"):
        os.environ.pop(name, None)


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ


def launched_rank() -> int:
    """Rank of this process, as the launcher has given it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launched_processes() -> int:
    """Number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# What says the place among the processes of a machine. srun and mpirun do, also to those that are told the rest in the
# words of other launchers.
_PLACES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# LOCAL_RANK as this process has set it for DeepSpeed -> what the launcher had said.
_replaced: dict[str, int] = {}


def local_rank() -> int | None:
    """Rank of this process among those on this machine; 0 without a launcher, None where the launcher does not say."""
    if (told := os.environ.get("LOCAL_RANK", "")) in _replaced:
        return _replaced[told]
    name = local_rank_name()
    return int(os.environ[name]) if name else None if is_launched() else 0


def local_rank_name() -> str:
    """The variable that says it; "" where none does. Without a launcher only LOCAL_RANK can."""
    names = _PLACES if is_launched() else ("LOCAL_RANK",)
    return next((name for name in names if re.fullmatch(r"[0-9]{1,9}", os.environ.get(name, ""))), "")


def tell_gpu(index: int) -> None:
    """Tell DeepSpeed, which takes LOCAL_RANK for that, the index of this process's GPU; `local_rank` stays."""
    place = local_rank()
    if is_launched() and place is not None and place != index:
        _replaced[str(index)] = place
    os.environ["LOCAL_RANK"] = str(index)
    # It wants both to be the same.
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def tell_place(rank: int) -> None:
    """Tell DeepSpeed, which wants to know LOCAL_RANK on a CPU too, what nobody has told it."""
    os.environ.setdefault("LOCAL_RANK", str(rank))


def local_processes(otherwise: int = 1) -> int:
    """Number of processes that the launcher has started on this machine; `otherwise` where it does not say."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", otherwise)))


def launched_address() -> str:
    """The machine on which the processes meet, as the launcher has given it; "" without one."""
    return os.environ.get("MASTER_ADDR", "")


def all_here() -> bool:
    """Whether the launcher has started every process on this machine, as far as it says."""
    met_inside = launched_address() in ("localhost", "127.0.0.1", "::1")
    return met_inside or local_processes(0) == launched_processes()


def several_machines() -> bool:
    """Whether the run's processes are on several machines, or the launcher does not say that they are on one."""
    return is_launched() and launched_processes() > 1 and not all_here()


def on_first_machine() -> bool:
    """Whether the run's first process is on this machine too."""
    number = next((os.environ[name] for name in _MACHINE_NUMBERS if os.environ.get(name, "").isdigit()), None)
    return launched_rank() < local_processes() if number is None else int(number) == 0


# What torchrun, `deepspeed` and srun number the machines by.
_MACHINE_NUMBERS = ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID")


def launched_port() -> str:
    """Where the processes meet, as the launcher has given it."""
    return os.environ.get("MASTER_PORT", "")


def meeting_place() -> str:
    """Host and port at which the processes meet, as the launcher has given them."""
    return f"{launched_address()}:{launched_port()}"


# What says how many processes a launcher has started that does not tell them how to meet.
_UNJOINED = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def launch_remarks() -> list[str]:
    """What to say where another launcher has started several processes, which do not join: each is a run of its own.

    Or where srun has, which join, and tell them so; or where a script of a job of several tasks starts only this one.
    """
    if is_launched():
        joined = os.environ.get(_JOINED) == os.environ["RANK"] and slurm.tasks() == launched_processes()
        return [f"{launched_processes()} tasks of srun are one run, which meets at {meeting_place()}"] if joined else []
    if (planned := slurm.tasks_of_script()) is not None:
        return [
            f"the job has {planned} tasks, of which this command is none (SLURM_NTASKS): one process; start it by srun "
            "for one run of all of them"
        ]
    for name, launcher in _UNJOINED.items():
        given = os.environ.get(name, "")
        if re.fullmatch(r"[0-9]{1,9}", given) and int(given) > 1:
            return [
                f"{launcher} has started {given} processes ({name}), which do not join: each is a run of its own; "
                "start by deepspeed or torchrun for one run"
            ]
    return []


# Beside a launcher's variables: that a task of srun has got them here.
_JOINED = "IPFM_JOINED_TASK"


def join_slurm() -> None:
    """Give a task of srun the variables that another launcher would have given it; nothing where one has.

    Its tasks meet at MASTER_ADDR, or at the first machine of the step, and at MASTER_PORT, or a port of the job's own.

    Raises:
        ValueError: what Slurm says is not whole; one line.
    """
    if is_launched() or (task := slurm.own_task()) is None:
        return
    address = launched_address() or task.host
    if not address:
        raise ValueError(
            f"srun has started {task.size} tasks and does not say on which machines (SLURM_JOB_NODELIST): give the "
            "first one's name as MASTER_ADDR"
        )
    rank = {"RANK": f"{task.rank}", "LOCAL_RANK": f"{task.local_rank}", "WORLD_SIZE": f"{task.size}"}
    here = {} if task.local_size is None else {"LOCAL_WORLD_SIZE": f"{task.local_size}"}
    place = {"MASTER_ADDR": address, "MASTER_PORT": launched_port() or f"{task.port}"}
    os.environ |= {**rank, **here, **place, _JOINED: rank["RANK"]}


def is_first_here() -> bool:
    """Whether this process is the first of its run on this machine, which says on it why the run ends."""
    return is_first_process() or (several_machines() and local_rank() == 0)


def is_first_process() -> bool:
    """Whether this process is the one of its run that speaks. So is one that no whole launch has a place for."""
    return _launch_fault() is not None or launched_rank() == 0


def _launch_fault() -> str | None:
    """What is wrong with what the environment says of a launcher."""
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
        given = os.environ.get(name)
        if given is not None and not (re.fullmatch(r"[0-9]{1,9}", given) and int(given) >= least):
            return f"{name} must be a whole number >= {least}, got {given!r}: unset it, or start by a launcher"
    # LOCAL_RANK alone says which GPU; an address alone, where a launcher would meet.
    if not is_launched() and launched_processes() == 1:
        return None
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        there = [name for name in VARIABLES if name in os.environ and name not in missing]
        return (
            f"the environment has {', '.join(there)} of a launcher but no {', '.join(missing)}: "
            f"unset {' and '.join(there)} for one process, or start by deepspeed or torchrun"
        )
    for name, within, size in (
        ("RANK", "WORLD_SIZE", launched_processes()),
        ("LOCAL_RANK", "LOCAL_SIZE or LOCAL_WORLD_SIZE", local_processes(launched_processes())),
    ):
        if int(os.environ.get(name, "0")) >= size:
            return f"{name} must be less than {within}, got {os.environ[name]} and {size}"
    port = launched_port()
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        return f"MASTER_PORT must be a whole number from 1 to 65535, got {port!r}"
    return None


# Seconds that threads get at the end of a run.
SETTLE = 0.25


def _give_back_linear() -> None:
    """Put PyTorch's linear layer back, for which DeepSpeed has its own in the whole process once weights are sharded.

    That one is slower, and a network that is not sharded needs it no more than `torch.compile` knows it.
    """
    import torch

    sharding = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if sharding is None or torch.nn.functional.linear is not sharding.zero3_linear_wrap:
        return
    # It remembers the one that was there, and takes its place again with the next sharded network.
    torch.nn.functional.linear = sharding.InsertPostInitMethodToModuleSubClasses.linear_bk


def stop_world() -> None:
    """Leave the process group, if there is one, and those who watch it; PyTorch is its own again."""
    import torch.distributed as dist

    peers.part()
    _give_back_linear()
    if dist.is_initialized():
        threads = dist.get_backend() == "gloo" and dist.get_world_size() > 1
        theirs = sys.modules.get("deepspeed.comm.comm")
        # DeepSpeed forgets the groups that it keeps, which the next world would be given, where it is asked itself.
        knows = theirs is not None and theirs.cdb is not None and theirs.cdb.is_initialized()
        (theirs if theirs is not None and knows else dist).destroy_process_group()
        if threads:
            # Gloo's threads let go of the last exchange's tensors, for which they need the interpreter: one that comes
            # too late, when the interpreter ends, aborts the whole process.
            time.sleep(SETTLE)
    peers.stop()
