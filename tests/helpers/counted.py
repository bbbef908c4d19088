"""Multiplications and additions of convolutions and matrix products, counted operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if name == "convolution":
            self.flops += _convolution(args[0], args[1], out, transposed=args[6])
        elif name == "convolution_backward":
            grad, x, weight, mask = args[0], args[1], args[2], args[10]
            # One for the images, one for the weights, as far as they are wanted.
            self.flops += _convolution(x, weight, grad, transposed=args[7]) * (mask[0] + mask[1])
        elif name in ("mm", "bmm"):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        elif name == "addmm":
            self.flops += 2 * out.numel() * args[1].shape[-1]
        return out


def _convolution(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> int:
    """Each number of the output, or of the input where that is spread, meets one filter."""
    return 2 * (x if transposed else out).numel() * weight[0].numel()


def counted_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of what `work` does, forward and backward."""
    with _Counter() as counter:
        work()
    return counter.flops
