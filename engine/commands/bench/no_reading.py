"""A mode in which tensors do not give their values to Python: on a GPU each such reading would wait for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ipfm.engine.distributed.world import import_deepspeed

aten = torch.ops.aten
# .item(), bool(), int(), float(), `if tensor`; and sizes that depend on values.
OPERATIONS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.unique_dim,
    aten._unique2, aten.unique_consecutive, aten.allclose,
}  # fmt: skip
# What reads memory without an operation. On a GPU each is a copy to the host.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
# Places that read on a CPU, where nothing waits, and take another way on a GPU.
ON_A_CPU_ALONE = ("data/dataset.py batch: low, high = ", "kernels/_numpy_philox.py ")


class Reading(AssertionError):
    """A tensor's value was asked for."""


class NoReading(ExitStack):
    """Within it, reading a tensor's value raises `Reading`, or with `count` is counted by the line it is on."""

    def __init__(self, *, count: bool = False) -> None:
        super().__init__()
        self.count = count
        self.found: Counter[str] = Counter()
        self.enter_context(_Methods(self))
        self.enter_context(_Operations(self))

    def note(self, what: str) -> None:
        if not self.count:
            raise Reading(f"{what} within a step")
        frames = reversed(traceback.extract_stack())
        place = next(f for f in frames if "/torch/" not in f.filename and f.filename != __file__)
        self.found[f"{'/'.join(Path(place.filename).parts[-2:])} {place.name}: {place.line}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, owner: NoReading) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A mask as an index makes a size of its own count.
        masked = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func.overloadpacket in OPERATIONS or masked:
            self.owner.note(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, owner: NoReading) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.owner.note(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def synchronizations() -> Iterator[Counter[str]]:
    """Where DeepSpeed calls for a device-wide synchronisation: counted on a CPU too, where it does nothing."""
    found: Counter[str] = Counter()
    accelerator: Any = import_deepspeed().accelerator.get_accelerator()

    def synchronize(device_index: int | None = None) -> None:
        found.update(f"{Path(f.filename).name} {f.name}" for f in traceback.extract_stack(limit=2)[:1])

    accelerator.synchronize = synchronize
    try:
        yield found
    finally:
        del accelerator.synchronize
