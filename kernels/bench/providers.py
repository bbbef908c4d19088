"""How each provider runs a function: the eager reference, its compilation, the Triton kernel; forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ipfm.kernels._dispatch import INTERPRETED
from ipfm.kernels.bench.measurement import tensors

# Providers of every operation; some have more.
EAGER, COMPILE, TRITON = "eager", "compile", "triton"


@dataclass(frozen=True)
class Run:
    """`call` is what is timed; `result` does the same and returns what is compared with the truth."""

    call: Callable[[], Any]
    result: Callable[[], Any]


class Workload(Protocol):
    """An operation on given inputs."""

    def providers(self) -> Sequence[str]:
        """Who can run it here."""

    def prepare(self, provider: str) -> Mapping[str, Run]:
        """A provider's runs, by mode; each provider starts from the same inputs."""

    def truth(self, mode: str) -> Any:
        """What `Run.result` should return, from float64 arithmetic."""


def kernels_run_on(device: torch.device) -> bool:
    """Triton's interpreter computes on the CPU and for tests only: its times say nothing."""
    return device.type == "cuda" and not INTERPRETED


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for one shape, with nothing left of earlier compilations.

    Without the reset a function's ninth shape would silently run in eager mode.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    return torch.compile(function, dynamic=False)


def graph_breaks() -> int:
    """Places where what was compiled last falls back to Python."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


@dataclass(frozen=True, eq=False)
class FunctionWorkload:
    """A function of tensors, and the gradients with respect to those inputs that require one.

    Args:
        plain: functions of the same signature in plain PyTorch; the one named "eager" is the baseline, is compiled,
            and gives the truth unless `oracle` does.
        kernel: the public function that takes `backend`.
        inputs: positional arguments that they are called with.
        arguments: keyword arguments that they are called with.
        oracle: a function of the same signature that gives the truth; default: the eager one.
    """

    plain: Mapping[str, Callable[..., Any]]
    kernel: Callable[..., Any]
    inputs: tuple[Any, ...]
    arguments: Mapping[str, Any]
    oracle: Callable[..., Any] | None = None

    def providers(self) -> Sequence[str]:
        device = tensors(self.inputs)[0].device
        return [*self.plain, COMPILE, *([TRITON] if kernels_run_on(device) else [])]

    def prepare(self, provider: str) -> Mapping[str, Run]:
        if provider == TRITON:
            function: Callable[..., Any] = partial(self.kernel, backend="triton")
        else:
            function = compiled(self.plain[EAGER]) if provider == COMPILE else self.plain[provider]
        call = partial(function, *self.inputs, **self.arguments)
        calls = _differentiated(call, self._wanted(self.inputs, self.arguments))
        return {mode: Run(run, run) for mode, run in calls.items()}

    def truth(self, mode: str) -> Any:
        doubles = {id(v): _double(v) for v in tensors((self.inputs, dict(self.arguments)))}
        inputs = tuple(doubles.get(id(v), v) for v in self.inputs)
        arguments = {k: doubles.get(id(v), v) for k, v in self.arguments.items()}
        if "out_dtype" in arguments:
            arguments["out_dtype"] = torch.float64
        call = partial(self.oracle or self.plain[EAGER], *inputs, **arguments)
        # The upstream gradients are those of the results in their own dtypes.
        dtypes = [v.dtype for v in tensors(self.plain[EAGER](*self.inputs, **self.arguments))]
        result = _differentiated(call, self._wanted(inputs, arguments), dtypes)[mode]()
        return [v.detach() for v in tensors(result)]  # without the graph and what it saved

    @staticmethod
    def _wanted(inputs: tuple[Any, ...], arguments: Mapping[str, Any]) -> list[Tensor]:
        return [v for v in tensors((inputs, dict(arguments))) if v.requires_grad]


def _double(v: Tensor) -> Tensor:
    return v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v


def _differentiated(
    call: Callable[[], Any], wanted: list[Tensor], dtypes: list[torch.dtype] | None = None
) -> dict[str, Callable[[], Any]]:
    """The modes of a call: forward alone, or forward, backward through a graph made before, and both together."""
    if not wanted:
        return {"forward": call}

    def results() -> list[Tensor]:
        result = call()
        return [result] if isinstance(result, Tensor) else list(result)

    graph = cache(results)

    @cache
    def upstream() -> list[Tensor]:
        made = []
        for number, v in enumerate(graph()):
            # Drawn in C-contiguous order, so that a provider's memory format changes no value.
            generator = torch.Generator(v.device).manual_seed(number)
            noise = torch.randn(v.shape, generator=generator, device=v.device)
            made.append(torch.empty_like(v).copy_(noise if dtypes is None else noise.to(dtypes[number])))
        return made

    def backward() -> Any:
        return torch.autograd.grad(graph(), wanted, upstream(), retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(results(), wanted, upstream())

    return {"forward": call, "backward": backward, "both": both}
