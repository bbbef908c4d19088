"""Pieces of a training step: run as they are, or captured once in CUDA graphs and replayed.

A piece is a function of a few numbers, such as the step, the learning rate or a sample's index. Whatever else it reads
lies where it was, and what it leaves behind too: weights, gradients, sums. Captured, its numbers are tensors on the
device, which are set before each replay: nothing of the step's Python runs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ipfm.engine.runtime.errors import described

Number = int | float | tuple[float, ...] | Tensor
"""A number, or a 0-d tensor that holds it: int64 of an int, float64 of a float; or several floats, a 1-d tensor."""
Given = float | tuple[float, ...]
Work = Callable[[Mapping[str, Number]], Tensor | None]
"""A piece: what it returns is the caller's."""

# Steps that run as they are before one is captured: what is set up at the first use is there then, and compiled.
WARM_UPS = 2


def whole(number: Number) -> int | Tensor:
    """The number, which is an integer: as it is, or in an int64 tensor."""
    assert not isinstance(number, (float, tuple))
    return number


class Pieces(Protocol):
    """What runs the pieces of a step."""

    def run(
        self, key: tuple[Hashable, ...], work: Work, torch_seed: int | None = None, /, **numbers: Given
    ) -> Tensor | None:
        """`work(numbers)`, or what has the same effect.

        Args:
            key: what decides over the work besides its numbers; the first part is its name.
            work: the same function for the same key.
            torch_seed: what PyTorch's generators are seeded by before it, for all that it draws of them: a replayed
                graph asks them for their seed, and goes on from their place.
            numbers: what it is given, some of them as tensors.

        Returns:
            What it returned, for the caller to keep.
        """
        ...

    def placed(self, name: str, values: Tensor) -> Tensor:
        """`values` where pieces may read them: what has the same name lies in the same place at every call."""
        ...


class AsTheyAre:
    """Runs every piece by itself."""

    def run(
        self, key: tuple[Hashable, ...], work: Work, torch_seed: int | None = None, /, **numbers: Given
    ) -> Tensor | None:
        """See `Pieces.run`."""
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        return work(numbers)

    def placed(self, name: str, values: Tensor) -> Tensor:
        """See `Pieces.placed`."""
        return values


AS_THEY_ARE = AsTheyAre()


class Captured(NamedTuple):
    """A piece that was captured."""

    replay: Callable[[], None]
    """Does on the device what the piece did."""
    out: Tensor | None
    """What it returned; each replay writes it anew."""


class Capture(Protocol):
    """What captures pieces: `CudaGraphs`, or a stand-in for it in tests."""

    def warm_up(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        """`work()`, as it will be captured later."""
        ...

    def capture(self, work: Callable[[], Tensor | None]) -> Captured:
        """Capture `work()`, which is not carried out."""
        ...


class CudaGraphs:
    """Captures in CUDA graphs, which share their memory: no two run at once, and no one keeps anything in it.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        """See `Capture.warm_up`; on the stream of the captures."""
        around = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            out = work()
        around.wait_stream(self._stream)
        if out is not None:
            out.record_stream(around)
        return out

    def capture(self, work: Callable[[], Tensor | None]) -> Captured:
        """See `Capture.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others, which write checkpoints or watch the memory, are no part of it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = work()
        return Captured(graph.replay, out)


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""What captures pieces, by the kind of device; there is nothing on others."""


class CapturedPieces:
    """Captures each piece after some runs, and replays it from then on.

    Args:
        capture: what captures.
        device: where the pieces run.
        required: a piece that cannot be captured is an error; else it, and all others, run as they are from then on.
        tell: takes a line about that.
        warm_ups: runs of a piece before it is captured.
        ready: nothing is captured before it says so.
    """

    def __init__(
        self,
        capture: Capture,
        device: torch.device,
        *,
        required: bool,
        tell: Callable[[str], None],
        warm_ups: int = WARM_UPS,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._capture, self._device, self._required, self._tell = capture, device, required, tell
        self._warm_ups, self._ready = warm_ups, ready
        self._pieces: dict[tuple[Hashable, ...], _Piece] = {}
        self._places: dict[str, Tensor] = {}
        self._given_up = False

    def placed(self, name: str, values: Tensor) -> Tensor:
        """See `Pieces.placed`: copied there."""
        if self._given_up:
            return values
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = torch.empty_like(values, device=self._device)
        return place.copy_(values)

    def run(
        self, key: tuple[Hashable, ...], work: Work, torch_seed: int | None = None, /, **numbers: Given
    ) -> Tensor | None:
        """See `Pieces.run`.

        Raises:
            RuntimeError: the piece cannot be captured, and has to be. Nothing of it was carried out.
        """
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        if self._given_up:
            return work(numbers)
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._pieces[key] = _Piece({name: self._tensor(value) for name, value in numbers.items()})
        for name, value in numbers.items():
            _set(piece.numbers[name], value)
        bound = partial(work, piece.numbers)
        if piece.captured is None:
            if piece.runs < self._warm_ups or not self._ready():
                piece.runs += 1
                return self._capture.warm_up(bound)
            try:
                piece.captured = self._capture.capture(bound)
            except Exception as error:
                self._give_up(key, error)
                return AS_THEY_ARE.run(key, work, torch_seed, **numbers)
        piece.captured.replay()
        out = piece.captured.out
        return None if out is None else out.clone()

    def _tensor(self, value: Given) -> Tensor:
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        shape = (len(value),) if isinstance(value, tuple) else ()
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _give_up(self, key: tuple[Hashable, ...], error: Exception) -> None:
        line = f"{key[0]} cannot be captured in a CUDA graph ({described(error)})"
        if self._required:
            raise RuntimeError(f"{line}: give --cuda-graphs off") from error
        self._given_up = True
        self._pieces.clear()
        self._places.clear()
        self._tell(f"{line}: the training goes on without graphs")


def _set(tensor: Tensor, value: Given) -> None:
    """Write the value without waiting for the device."""
    if isinstance(value, tuple):
        for place, one in zip(tensor, value, strict=True):
            place.fill_(one)
    else:
        tensor.fill_(value)


class _Piece:
    """A piece as it is known so far."""

    def __init__(self, numbers: dict[str, Tensor]) -> None:
        self.numbers = numbers
        self.runs = 0
        self.captured: Captured | None = None
