"""Bytes of live tensors, counted operation by operation.

On the CPU, whose allocator keeps no account, and on the meta device, where nothing is allocated and everything can be
predicted.
"""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
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
        # By the address of a storage.
        self._sizes: dict[int, tuple[int, _End]] = {}

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
        for one in (out,) if type(out) is Tensor else _tensors((out,)):
            storage = one.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                # A view of what was there before, such as a parameter, is nothing new.
                given = _tensors((*args, *(kwargs or {}).values()))
                old = any(t.untyped_storage()._cdata == key for t in given)
                self._add(storage, 0 if old else storage.nbytes())
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: the compiler would be imported for it, and put a function of its own around each operation."""
        return False

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        # The storage's Python object lives as long as the storage does, also when only autograd holds it.
        self._sizes[key] = size, _End(storage, self._remove, key)
        self.current += size
        if self.current > self.peak:
            self.peak = self.current
        if self._wanted:
            self._note()

    def _remove(self, end: _End) -> None:
        self.current -= self._sizes.pop(end.key)[0]
        if self._wanted:
            self._note()

    def _note(self) -> None:
        if abs(self.current - self._noted) * 1000 >= self.peak:
            self._noted = self.current
            self.timeline.add(time.perf_counter(), self.current)


class _End(weakref.ref[torch.UntypedStorage]):
    """Calls `removed` with itself at the end of a storage, which `key` tells: `weakref.finalize` takes far longer."""

    __slots__ = ("key",)

    def __new__(cls, storage: torch.UntypedStorage, removed: Callable[[_End], None], key: int) -> _End:
        return super().__new__(cls, storage, removed)

    def __init__(self, storage: torch.UntypedStorage, removed: Callable[[_End], None], key: int) -> None:
        self.key = key


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


# What operations returned, by what they were given; None where they have to be called each time.
_KNOWN: dict[tuple[Any, ...], _Returned | None] = {}
# So many at most; there are some thousands in a step.
_KNOWN_AT_MOST = 100_000


def meta_outputs(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns, on the meta device without a call where it was called like that before.

    Values are of no matter there, but most operations are written in Python and take long.
    """
    if not _depends_on_kinds(func):
        return func(*args, **kwargs)
    given = [*args, *kwargs.values()]
    try:
        key = (func, torch.get_default_dtype(), *kwargs, *map(_kind, given))
        known = _KNOWN[key]
    except TypeError:  # something of another kind
        return func(*args, **kwargs)
    except KeyError:
        out = func(*args, **kwargs)
        if len(_KNOWN) >= _KNOWN_AT_MOST:
            _KNOWN.clear()
        # What changes the shape of its arguments is nothing to remember.
        _KNOWN[key] = _Returned.of(out, given) if key[-len(given) :] == tuple(map(_kind, given)) else None
        return out
    return func(*args, **kwargs) if known is None else known.again(given)


@functools.cache
def _depends_on_kinds(func: Callable[..., Any]) -> bool:
    """An operation returns new tensors, or what it wrote to, but no views."""
    returns = func._schema.returns if isinstance(func, OpOverload) else []
    return bool(returns) and all(one.alias_info is None or one.alias_info.is_write for one in returns)


def _kind(value: Any) -> Any:
    """All of an argument that decides over shape, strides and dtype of a result on the meta device.

    Raises:
        TypeError: it may be more than that.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        if value.is_meta:
            return value.shape, value.stride(), value.dtype
    elif kind in _PLAIN:
        return kind, value  # 1 == 1.0 == True
    elif kind is list or kind is tuple:
        kinds = tuple(map(type, value))
        return (kinds, *value) if _PLAIN.issuperset(kinds) else tuple(map(_kind, value))
    raise TypeError(f"nothing is known about {kind}")


_PLAIN = frozenset(
    (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)


@dataclass(frozen=True)
class _Returned:
    """What an operation returned: `single` or several of what `again` makes anew."""

    parts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | int | None, ...]
    """Of a new tensor its shape, strides and dtype; the place of an argument that was returned; None where nothing."""
    container: type | None
    """The list or tuple; None: a single tensor was returned."""

    @classmethod
    def of(cls, out: Any, given: Sequence[Any]) -> _Returned | None:
        """None where that cannot be had again."""
        seen = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}
        parts: list[Any] = []
        for one in out if isinstance(out, (list, tuple)) else [out]:
            place = next((i for i, value in enumerate(given) if value is one), None)
            if one is None or place is not None:
                parts.append(None if one is None else place)
                continue
            if type(one) is not Tensor or not one.is_meta or one.untyped_storage()._cdata in seen:
                return None
            seen.add(one.untyped_storage()._cdata)
            parts.append((one.shape, one.stride(), one.dtype))
            if _new(*parts[-1]).untyped_storage().nbytes() != one.untyped_storage().nbytes():
                return None
        return cls(tuple(parts), type(out) if isinstance(out, (list, tuple)) else None)

    def again(self, given: Sequence[Any]) -> Any:
        """The same once more."""
        made = [None if part is None else given[part] if isinstance(part, int) else _new(*part) for part in self.parts]
        return made[0] if self.container is None else self.container(made)


def _new(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
