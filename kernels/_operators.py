"""The launches of the Triton kernels as operators `torch.ops.ipfm.*`: one opaque call each to torch.compile.

`torch.library.custom_op`, not `triton_op`: block sizes, merged dimensions and constants follow from shapes and strides.
A compiler that traced the launchers would guard each of those choices and compile anew for other shapes, and gain
nothing, because the kernels leave nothing to fuse. It would also know only compiled kernels, not interpreted ones.

An operator costs the host more than a launch, so that where nobody looks at operators what runs often calls its
launcher directly (`launches_directly`).

An operator's arguments are valid: the public functions check them. The references are plain PyTorch operations instead,
which a compiler may fuse and a memory plan must count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef


def operator(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the operator `ipfm::name`; its schema follows from its annotations."""
    return torch.library.custom_op(f"ipfm::{name}", mutates_args=tuple(mutates))


def launches_directly(x: Tensor) -> bool:
    """Whether a launch on x needs no operator: nobody compiles, traces, simulates, transforms or counts here."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )
