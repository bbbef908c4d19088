"""The processes of a run: joining them, and what they say to each other."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# Seconds after which a process gives up on one that does not answer; IPFM_TIMEOUT changes it.
TIMEOUT = 600.0
# Seconds that threads get at the end of a run.
SETTLE = 0.25


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and this one's device."""

    rank: int
    size: int
    device: torch.device
    launched: bool = False
    """A launcher started this process."""

    @property
    def first(self) -> bool:
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

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest value of `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def first_says(self, text: str) -> str:
        """`text` of the first process, on every process."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0, device=self.device)
        return said[0]


def start_world() -> World:
    """Join the processes that a launcher (`deepspeed`, torchrun) started, or be the only one.

    Nothing is compiled: DeepSpeed's CPU communication extension serves inference only and is switched off.

    Raises:
        ValueError: the environment's IPFM_TIMEOUT is no number of seconds.
    """
    single = "RANK" not in os.environ
    if single:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        _share_cores(int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", size))))
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        # DeepSpeed makes further groups, of which it gives none a time of its own: they take torch's default.
        timeout = distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = _timeout()
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timeout)
    return World(rank=rank, size=size, device=device, launched=not single)


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        threads = dist.get_backend() == "gloo" and dist.get_world_size() > 1
        dist.destroy_process_group()
        if threads:
            # Gloo's threads let go of the last exchange's tensors, for which they need the interpreter: one that comes
            # too late, when the interpreter ends, aborts the whole process.
            time.sleep(SETTLE)


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, with its CPU communication extension (a 50 s compilation) switched off."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops as ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It warns of every optimiser that is not its own, and torch of the names that it calls.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _timeout() -> timedelta:
    given = os.environ.get("IPFM_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"IPFM_TIMEOUT must be a number of seconds > 0, got {given!r}")
    return timedelta(seconds=seconds)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _share_cores(local_size: int) -> None:
    """Divide this machine's cores among its processes, unless the user has set a number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_size)))
