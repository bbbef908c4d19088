"""Bytes of live tensors, counted operation by operation.

On the CPU, whose allocator keeps no account, and on the meta device, where nothing is allocated and everything can be
predicted.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ipfm.engine.memory.series import Series


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that are made while it is active and are not freed yet.

    Forward and backward passes count alike, with what autograd saves and the temporaries of backward operations; views
    count once. What an operation allocates and frees within itself is not seen; a storage keeps the size it had first.

    Args:
        timeline: keep (seconds since the epoch of `time.perf_counter`, bytes) at each change of more than 0.1 % of the
            peak.

    Attributes:
        current: bytes alive now.
        peak: largest `current` since the start or the last `reset_peak`.
        timeline: what was asked for, thinned where it is long; empty otherwise.
    """

    def __init__(self, *, timeline: bool = False) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.timeline = Series()
        self._wanted = timeline
        self._noted = 0
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def adopt(self, device: torch.device | str = "cpu") -> None:
        """Count what is alive on `device` already: `current` is then all of it, and its release is seen too."""
        for storage in _storages(device):
            if storage._cdata not in self._sizes:
                self._add(storage, storage.nbytes())
        self.reset_peak()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = meta_outputs(func, args, kwargs or {})
        for one in _tensors((out,)):
            storage = one.untyped_storage()
            if storage._cdata not in self._sizes:
                # A view of what was there before, such as a parameter, is nothing new.
                given = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
                self._add(storage, 0 if storage._cdata in given else storage.nbytes())
        return out

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._sizes[key] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        # The storage's Python object lives as long as the storage does, also when only autograd holds it.
        weakref.finalize(storage, self._remove, key)
        self._note()

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
        self._note()

    def _note(self) -> None:
        if self._wanted and abs(self.current - self._noted) * 1000 >= self.peak:
            self._noted = self.current
            self.timeline.add(time.perf_counter(), self.current)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which may be lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (one for one in value if isinstance(one, Tensor))


def tensor_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes of the storages of all tensors on `device` that Python knows in this process, gradients included."""
    return sum(storage.nbytes() for storage in _storages(device))


def bytes_in_use(device: torch.device, *, without: torch.nn.Module | None = None) -> int:
    """Bytes of tensors on `device` now, those of a network excepted.

    By the allocator's account on a GPU, else `tensor_bytes`.
    """
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else tensor_bytes(device)
    if without is None:
        return used
    state = (*without.parameters(), *without.buffers())
    return used - sum(tensor.nbytes for tensor in state if tensor.device.type == device.type)


def _storages(device: torch.device | str) -> list[torch.UntypedStorage]:
    kind = torch.device(device).type
    storages: dict[int, torch.UntypedStorage] = {}
    for thing in gc.get_objects():
        # By type: isinstance would wake lazy modules. A compiler's fake tensors hold nothing.
        if issubclass(type(thing), Tensor) and not issubclass(type(thing), FakeTensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == kind and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage
    return list(storages.values())


aten = torch.ops.aten


def meta_outputs(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns: at once where it is known, else by calling it."""
    shape = _SHAPES.get(func)
    known = shape(*args, **kwargs) if shape is not None and args[0].is_meta else None
    return func(*args, **kwargs) if known is None else known


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, groups: int, _: float):
    return torch.empty_like(x), x.new_empty(N, groups), x.new_empty(N, groups)


def _group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return (
        torch.empty_like(x) if wanted[0] else None,
        *(torch.empty_like(weight) if weight is not None and one else None for one in wanted[1:]),
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _two(a: Tensor, b: Any, *, alpha: float = 1) -> Tensor | None:
    """Only for what needs neither broadcasting nor promotion."""
    if isinstance(b, Tensor):
        same = _alike(a, b)
    else:
        same = (type(b) in (int, float) and a.is_floating_point()) or (type(b) is int and a.dtype != torch.bool)
    return torch.empty_like(a) if same else None


def _silu(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _silu_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor | None:
    return grad_input if _alike(grad, x) and _alike(grad, grad_input) else None


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor | None:
    return torch.empty_like(grad) if _alike(grad, x) else None


def _itself(a: Tensor, *_: Any, **__: Any) -> Tensor:
    """Operations in place, such as those of the random words."""
    return a


def _into(a: Tensor, number: int, *, out: Tensor) -> Tensor | None:
    return out if _alike(a, out) else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    return a.new_empty(len(a), b.shape[1]) if bias.dtype == a.dtype == b.dtype else None


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor] | None:
    return (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)) if train and 0 < p < 1 else None


def _dropout_backward(grad: Tensor, mask: Tensor, scale: float) -> Tensor | None:
    return torch.empty_like(grad) if (grad.shape, grad.stride()) == (mask.shape, mask.stride()) else None


_SHAPES: Mapping[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.add.Tensor: _two,
    aten.mul.Tensor: _two,
    aten.silu.default: _silu,
    aten.silu_backward.grad_input: _silu_backward,
    aten.silu_backward.default: _silu_gradient,
    aten.bitwise_xor_.Tensor: _itself,
    aten.bitwise_and_.Scalar: _itself,
    aten.mul_.Tensor: _itself,
    aten.bitwise_right_shift.Tensor_Scalar_out: _into,
    aten.addmm.default: _addmm,
    aten.native_dropout.default: _dropout,
    aten.native_dropout_backward.default: _dropout_backward,
}
