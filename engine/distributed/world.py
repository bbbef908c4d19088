"""The processes of a run: joining them, and what they say to each other."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.distributed import distributed_c10d

from ipfm.engine.runtime import launcher
from ipfm.engine.runtime.cores import usable_cores
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.runtime.wording import counted

# Seconds after which a process gives up on one that does not answer; IPFM_TIMEOUT changes it.
TIMEOUT = 600.0


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and this one's device."""

    rank: int
    size: int
    device: torch.device
    launched: bool = False
    """A launcher started this process."""

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def micro_batches(self, batch: int, micro_batch: int) -> range:
        """First index, within the global batch, of each of this process's micro-batches."""
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share, micro_batch)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`tensor` of each process, of the same shape, stacked by rank."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self.size == 1:
            return gathered.copy_(tensor)
        dist.all_gather_into_tensor(gathered.view(-1), tensor.flatten())
        return gathered

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """Largest value of `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast_text(self, text: str) -> str:
        """`text` of the first process, on every process."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0, device=self.device)
        return said[0]

    def said_by_any(self, text: str) -> str:
        """The `text` of the first process that has one, on every process; "" where none has."""
        if self.size == 1:
            return text
        # Mostly there is none, which one number says.
        if not self.all_reduce_max_(torch.tensor(int(bool(text)), device=self.device)):
            return ""
        said = [""] * self.size
        dist.all_gather_object(said, text)
        return next(one for one in said if one)


def check_environment() -> None:
    """Check what the environment says of this process's run, before anything is begun.

    Raises:
        ValueError: a launcher's variables, IPFM_TIMEOUT, DS_ACCELERATOR or TRITON_INTERPRET cannot be; one line.
    """
    launcher.check_launch()
    _timeout()
    cuda = torch.cuda.is_available()
    accelerator, expected = os.environ.get("DS_ACCELERATOR"), "cuda" if cuda else "cpu"
    if accelerator not in (None, expected):
        raise ValueError(f"DS_ACCELERATOR must be {expected} on this machine, got {accelerator!r}: unset it")
    if cuda and triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 computes every kernel in Python, for tests on a CPU: unset it on a GPU")
    if cuda and launcher.local_rank() >= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ValueError(
            f"LOCAL_RANK must be less than the number of GPUs, got {launcher.local_rank()} and "
            f"{torch.cuda.device_count()}{'' if visible is None else f' (CUDA_VISIBLE_DEVICES={visible})'}"
        )


def environment_remarks() -> list[str]:
    """What to say of the environment before anything is begun, though it can be used; a line each."""
    return [*launcher.launch_remarks(), *_no_gpu()]


# What an NVIDIA driver shows of each GPU, whether or not a program may use it.
_GPUS = Path("/proc/driver/nvidia/gpus")


def _no_gpu() -> list[str]:
    """What keeps this process from a GPU that is there or was named; nothing where GPUs are hidden on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or (visible is not None and (not visible or visible.startswith("-"))):
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


def start_world() -> World:
    """Join the caller's process group or the processes that a launcher (`deepspeed`, torchrun) started; or be alone.

    Nothing is compiled: DeepSpeed's CPU communication extension serves inference only and is switched off. DeepSpeed
    reads LOCAL_RANK, and DS_ACCELERATOR without a GPU: they are set in the environment where they are missing.

    Raises:
        ValueError: the environment's IPFM_TIMEOUT is no number of seconds.
        Failed: there is no network interface, or the launcher's port is in use.
    """
    launched = launcher.is_launched()
    rank, size = (launcher.launched_rank(), launcher.launched_processes()) if launched else (0, 1)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(rank % torch.cuda.device_count() if cuda else rank))
    device = run_device()
    if cuda:
        torch.cuda.set_device(device)
    else:
        _share_cores(launcher.local_processes(size), speaks=rank == 0)
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        # DeepSpeed makes further groups, of which it gives none a time of its own: they take torch's default.
        timeout = distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = _timeout()
        backend = "nccl" if cuda else "gloo"
        try:
            if launched:
                deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
            else:
                # Without a port, and without variables that programs started from here would take for a launcher's.
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        except RuntimeError as error:  # torch's network errors are some
            if reason := _no_network(str(error)):
                raise Failed(reason) from error
            raise
    return World(rank=rank, size=size, device=device, launched=launched)


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, with its CPU communication extension (a 50 s compilation) switched off."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops as ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Marks around its functions that a profiler of a GPU shows; elsewhere they only cost.
    sys.modules["deepspeed.utils.nvtx"].enable_nvtx = torch.cuda.is_available()  # type: ignore[attr-defined]
    # It warns of every optimiser that is not its own, and torch of the names that it calls.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _no_network(error: str) -> str:
    """What is missing for processes to meet, if that is what torch says; else ""."""
    if "failed to listen" in error:
        another = "give another one (`deepspeed --master_port N`, `torchrun --master_port N`)"
        return f"port {launcher.launched_port()} is in use: {another}"
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


def _timeout() -> timedelta:
    given = os.environ.get("IPFM_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"IPFM_TIMEOUT must be a number of seconds > 0, got {given!r}")
    return timedelta(seconds=seconds)


def _share_cores(local_size: int, *, speaks: bool) -> None:
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


def run_device() -> torch.device:
    """The device of this process: its own GPU where there are any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", launcher.local_rank())
    return torch.device("cpu")
