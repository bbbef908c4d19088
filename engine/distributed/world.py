"""The processes of a run: joining them, and what they say to each other."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ipfm.engine.distributed.device import check_own_gpus, run_device, uses_gpu
from ipfm.engine.distributed.launch_environment import (
    LATER,
    answer_timeout,
    choose_interface,
    no_network,
    share_cores,
    waiting_for_others,
    watch_times,
)
from ipfm.engine.runtime import launcher, peers
from ipfm.engine.runtime.errors import Failed


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


def start_world() -> World:
    """Join the caller's process group or a launcher's processes (`deepspeed`, torchrun, srun), or be alone.

    Nothing is compiled: DeepSpeed's CPU communication extension serves inference only and is switched off. DeepSpeed
    reads LOCAL_RANK, as the index of its GPU, and DS_ACCELERATOR without one: they are set in the environment.

    Raises:
        ValueError: the environment's IPFM_TIMEOUT is no number of seconds, what Slurm says is not whole, or there are
            more processes than GPUs.
        Failed: there is no network interface, the launcher's port is in use, or the processes do not all come there.
    """
    launcher.join_slurm()
    launched = launcher.is_launched()
    rank, size = (launcher.launched_rank(), launcher.launched_processes()) if launched else (0, 1)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    if not launched and size > 1 and uses_gpu():
        # Nobody but the caller's group tells the processes apart.
        launcher.tell_place(rank % torch.cuda.device_count())
    device = run_device()
    cuda = device.type == "cuda"
    if cuda:
        launcher.tell_gpu(device.index)
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        launcher.tell_place(rank)
        share_cores(launcher.local_processes(size), speaks=rank == 0)
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        # DeepSpeed makes further groups, of which it gives none a time of its own: they take torch's default.
        backend = "nccl" if cuda else "gloo"
        # NCCL aborts the process after it: whoever watches says before then what there is to say.
        timeout = answer_timeout() + timedelta(seconds=LATER if cuda else 0.0)
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        try:
            if launched:
                choose_interface()
                with waiting_for_others():
                    deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
            else:
                # Without a port, and without variables that programs started from here would take for a launcher's.
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        except RuntimeError as error:  # torch's network errors are some
            if reason := no_network(str(error)):
                raise Failed(reason) from error
            raise
    if size > 1 and dist.get_backend() == "nccl":
        check_own_gpus(device, distributed_c10d._get_default_store(), rank, size)
    _watch_peers(rank, size)
    return World(rank=rank, size=size, device=device, launched=launched)


_watched = 0


def _watch_peers(rank: int, size: int) -> None:
    """Have the processes watch each other from now on; they find each other as the process group did."""
    global _watched
    # A group that stands for processes which nobody has started, as in a rehearsal, has none to watch.
    if dist.get_backend() == "fake":
        return
    _watched += 1
    store, key = distributed_c10d._get_default_store(), f"ipfm/peers/{_watched}"
    peers.start(
        rank,
        size,
        meeting=launcher.launched_address(),
        here=launcher.all_here(),
        publish=lambda said: store.set(key, said),
        read=lambda: store.get(key).decode(),
        times=watch_times(raises=dist.get_backend() == "gloo"),
    )


@contextmanager
def _compiling_later() -> Iterator[None]:
    """While it lasts, what `torch.compile` decorates is compiled at its first call; it imports the compiler at once."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **settings)
        compiled = functools.cache(lambda: compile_now(function, **settings))
        return functools.wraps(function)(lambda *given, **keywords: compiled()(*given, **keywords))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, with its CPU communication extension (a 50 s compilation) switched off."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops as ops

    with _compiling_later(), suppress(ImportError):
        # Its engines import this optimiser, to see whether it is theirs: a second of Inductor for nothing.
        import deepspeed.runtime.zero.muon.original_muon

    if not uses_gpu():
        # Of which extensions can be built it makes a table when that is first asked for, by trying all of them, and
        # prints what it does not find. Only this entry is ever read, and on a GPU none.
        vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # Marks around its functions that a profiler of a GPU shows; elsewhere they only cost.
    sys.modules["deepspeed.utils.nvtx"].enable_nvtx = uses_gpu()  # type: ignore[attr-defined]
    # It warns of every optimiser that is not its own, and torch of the names that it calls.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
