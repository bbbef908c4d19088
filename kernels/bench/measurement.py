"""How a call is measured: time, copy bandwidth, bytes moved, peak memory, and its error against a float64 truth."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

QUANTILES = (0.2, 0.5, 0.8)
# How long a call is repeated on the CPU, in a quick run and in a full one.
SECONDS = {True: 0.1, False: 0.4}
# Largest error that passes for right, in units in the last place of the result's dtype: a few times what PyTorch's own
# operations reach (45 in float32, by sums in the backward pass of group norm; 3 in half precision, by many roundings).
ALLOWED_UNITS = {torch.float32: 256, torch.bfloat16: 8, torch.float16: 8}


def tensors(result: Any) -> list[Tensor]:
    """The tensors in what an operation returned."""
    return [v for v in tree_leaves(result) if isinstance(v, Tensor)]


def quantiles(run: Callable[[], Any], device: torch.device, quick: bool) -> tuple[float, float, float]:
    """20, 50 and 80 % quantiles of the time of a call in microseconds; on CUDA caches are flushed before each call."""
    if device.type == "cuda":
        low, middle, high = triton.testing.do_bench(run, warmup=10, rep=50 if quick else 200, quantiles=[*QUANTILES])
        return 1e3 * low, 1e3 * middle, 1e3 * high
    samples: list[float] = []
    run()
    stop = time.perf_counter() + SECONDS[quick]
    while len(samples) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double()).tolist()
    return low, middle, high


def copy_quantiles(needed: int, device: torch.device, quick: bool) -> tuple[float, float, float]:
    """The same of a copy that reads and writes `needed` bytes altogether."""
    source = torch.zeros(max(1, needed // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return quantiles(lambda: target.copy_(source), device, quick)


def unsteady(times: tuple[float, float, float]) -> bool:
    """Whether the quantiles lie so far apart that something else must have used the machine."""
    return times[2] > 1.5 * times[0]


class Watch(TorchDispatchMode):
    """Counts what PyTorch's operations read and write, and the storages that they make, while it is active.

    Views move nothing. Triton kernels and compiled code are not seen, nor what an operation allocates within itself.

    Attributes:
        moved: bytes read and written.
        peak: most bytes alive at a time, of storages made here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = tensors((args, kwargs))
            known = {t.untyped_storage()._cdata for t in given}
            for t in tensors(result):
                if t.untyped_storage()._cdata not in known:
                    self._add(t.untyped_storage())
            if func.namespace == "aten" and "empty" not in func.name():
                self.moved += traffic(func, args, kwargs or {}, given, tensors(result))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, sum(self._alive.values()))
            weakref.finalize(storage, self._alive.pop, storage._cdata)


def traffic(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operation reads and writes, by what its schema says of arguments that it changes."""
    changed: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed += tensors(value)
    overwritten = changed if func.name().split(".")[0] in _ONLY_WRITE or "out" in kwargs else []
    unread = {id(t) for t in overwritten}
    return sum(_bytes(t) for t in given if id(t) not in unread) + sum(map(_bytes, changed or made))


_ONLY_WRITE = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_", "aten::_foreach_zero_"}


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor has more elements than memory.
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return min(math.prod(sizes, start=tensor.element_size()), tensor.untyped_storage().nbytes())


def watched(run: Callable[[], Any]) -> Watch:
    """The account of one call."""
    with Watch() as watch:
        result = run()
        del result
    return watch


def allocator_peak(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of CUDA memory that a call takes beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def error_units(got: Any, truth: Any) -> dict[torch.dtype, float]:
    """The largest error of the results of each dtype, in units in the last place.

    The error of an element is relative to its size plus the root mean square of its tensor. Infinite where a result is
    not a number, or where one that is exact by nature (a truth value, an index) differs.
    """
    worst: dict[torch.dtype, float] = {}
    for g, t in zip(tensors(got), tensors(truth), strict=True):
        if not g.numel():
            continue
        if g.is_floating_point():
            want = t.detach().double()
            error = (g.detach().double() - want).abs_().div_(want.abs() + want.square().mean().sqrt() + 1e-30)
            largest = float("inf") if bool(error.isnan().any()) else float(error.max())
            units = largest / torch.finfo(g.dtype).eps
        else:
            units = 0.0 if torch.equal(g, t) else float("inf")
        worst[g.dtype] = max(units, worst.get(g.dtype, 0.0))
    return worst


def error_over_allowed(got: Any, truth: Any) -> float:
    """The largest error over what is allowed for its dtype: right is at most 1."""
    return max((units / ALLOWED_UNITS.get(dtype, 1) for dtype, units in error_units(got, truth).items()), default=0.0)
