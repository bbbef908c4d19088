"""Which device a process computes on: decided here alone."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ipfm.engine.runtime import launcher


def uses_gpu() -> bool:
    """Whether this process computes on a GPU: where torch sees one, unless DS_ACCELERATOR=cpu asks for the CPU."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def run_device() -> torch.device:
    """The device of this process: its own GPU where there are any, else the CPU.

    Its GPU is the one that its place among the processes of this machine counts to. Where it sees one alone, that is
    its own: some launchers show each process another one (see `check_own_gpus`). Where the launcher does not tell the
    place, it is taken from the rank, as if all machines had as many GPUs.

    Raises:
        ValueError: it sees several GPUs, and there are more processes than that on this machine.
    """
    if not uses_gpu():
        return torch.device("cpu")
    count, place = torch.cuda.device_count(), launcher.local_rank()
    if place is None:
        return torch.device("cuda", launcher.launched_rank() % count)
    if place >= count > 1:
        raise ValueError(
            f"{launcher.local_rank_name()} must be less than the number of GPUs, got {place} and {count}{_shown()}: "
            "start at most one process for each GPU of a machine"
        )
    return torch.device("cuda", place if count > 1 else 0)


def check_own_gpus(device: torch.device, store: dist.Store, rank: int, size: int) -> None:
    """Check that no two processes of a run have the same GPU: they would wait for each other within NCCL.

    Args:
        device: this process's GPU.
        store: that of the process group.
        rank: of this process.
        size: number of processes.

    Raises:
        ValueError: two have; the same line on all of them.
    """
    store = dist.PrefixStore("ipfm/gpus", store)
    store.set(str(rank), _identity(device))
    if rank == 0:
        store.set("verdict", _shared([store.get(str(one)).decode() for one in range(size)]))
    if verdict := store.get("verdict").decode():
        raise ValueError(verdict)


def _identity(device: torch.device) -> str:
    """What tells a GPU from all others."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _shared(gpus: list[str]) -> str:
    """What is wrong with the GPUs of all processes, by rank; "" where each has its own."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            return (
                f"processes {first} and {rank} have the same GPU ({gpu}){_shown()}: start at most one process for each "
                "GPU of a machine"
            )
    return ""


def _shown() -> str:
    """What CUDA_VISIBLE_DEVICES says, for messages."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
