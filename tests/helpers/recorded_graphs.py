"""A stand-in for CUDA graphs on a CPU: it records the operators of a piece, and replays them onto the same storages.

As a graph it keeps every Python number and every address that it saw, carries nothing out while it captures, and knows
nothing of Python when it replays. What a graph on a GPU cannot have in it is an error: a value that the host reads, or
a tensor that the host makes. PyTorch's own random numbers go on, as there, from the seed and place that its generator
has when it replays: whoever does not seed it just before the piece would draw others, and a seed within is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ipfm.engine.distributed.pieces import Captured

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
}  # fmt: skip
# What the host would have to send.
FROM_THE_HOST = {aten.lift_fresh}
# Torch's own random numbers.
RANDOM = {
    aten.native_dropout, aten.bernoulli, aten.bernoulli_, aten.rand, aten.randn, aten.uniform_, aten.normal_,
}  # fmt: skip


class NotCapturable(RuntimeError):
    """The piece has something in it that a CUDA graph cannot have, or would freeze."""


class Recorder:
    """See `ipfm.engine.distributed.pieces.Capture`."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, device: torch.device) -> None:
        self.warmed, self.captured, self.replayed = 0, 0, 0
        self.operators: list[int] = []
        Recorder.made.append(self)

    def warm_up(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        self.warmed += 1
        return work()

    def capture(self, work: Callable[[], Tensor | None]) -> Captured:
        generator = torch.default_generator
        before, seed = generator.get_state(), generator.initial_seed()
        tape = Tape(seeded=torch.equal(before, torch.Generator().manual_seed(seed).get_state()))
        try:
            with tape:
                out = work()
            if generator.initial_seed() != seed:
                raise NotCapturable("the host seeds random numbers within it")
        finally:
            generator.set_state(before)
            tape.undo()
        self.captured += 1
        self.operators.append(len(tape.calls))

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return Captured(replay, out)


class Tape(TorchDispatchMode):
    """Records what is done, and can do it again; `seeded`: the generator of random numbers was, just before."""

    def __init__(self, *, seeded: bool = False) -> None:
        super().__init__()
        self._seeded = seeded
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._again: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in READING:
            raise NotCapturable(f"the host reads a tensor ({func})")
        if func.overloadpacket in FROM_THE_HOST or (func.overloadpacket in RANDOM and not self._seeded):
            raise NotCapturable(f"the host makes a tensor ({func})")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise NotCapturable(f"a size that depends on values ({func})")
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._before:
                self._before[storage._cdata] = storage, storage.clone()
        given = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._own[storage._cdata] = storage
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Give what was there before its old values: nothing was carried out."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Do it all again, with the tensors of then."""
        with _disable_current_modes(), torch.no_grad():
            self._again = self._again or list(self._changing())
            for func, args, kwargs, fresh in self._again:
                found = list(_tensors((func(*args, **kwargs),)))
                for place, old in fresh:
                    old.copy_(found[place])

    def _changing(self) -> Iterator[tuple[Any, Any, Any, list[tuple[int, Tensor]]]]:
        """The calls, each with those of its tensors that it makes anew, by their places; none that gives views alone.

        A view, or what was written in place, is what it was.
        """
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
            made = enumerate(_tensors((out,)))
            fresh = [(place, t.detach()) for place, t in made if t.untyped_storage()._cdata not in given]
            if fresh or any(True for _ in _written(func, args, kwargs)):
                yield func, args, kwargs, fresh


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs[argument.name] if argument.name in kwargs else args[i] if i < len(args) else None
            yield from _tensors((value,))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
