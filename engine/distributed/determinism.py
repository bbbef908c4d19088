"""The same bits from the same work on a GPU too, where an algorithm's speed is not worth more (`--deterministic`)."""

from __future__ import annotations

import os

import torch

# What libraries read once, as CUDA and the processes' communication start: a workspace of cuBLAS in which streams do
# not meet, and no sums in the network's switches (NVLink SHARP), whose order may change.
_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
# Other values under which results repeat.
_ALSO = {"CUBLAS_WORKSPACE_CONFIG": (":16:8",), "NCCL_NVLS_ENABLE": ()}


def prepare_determinism() -> None:
    """Set the variables by which libraries repeat their results; before CUDA and the process group start.

    Raises:
        ValueError: the environment says otherwise.
    """
    for name, value in _VARIABLES.items():
        given = os.environ.setdefault(name, value)
        if given not in (value, *_ALSO[name]):
            possible = " or ".join((value, *_ALSO[name]))
            raise ValueError(f"deterministic needs {name} to be {possible}, got {given!r}: unset it")


def compute_deterministically() -> None:
    """Have PyTorch, for the rest of this process, take algorithms that repeat their results bit for bit.

    Of those of cuDNN, cuBLAS, and attention; one that has no such form raises a RuntimeError. The kernels of this
    project repeat theirs in any case.

    Raises:
        ValueError: see `prepare_determinism`.
    """
    prepare_determinism()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Nothing here reads what was not written; filling every new tensor would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
