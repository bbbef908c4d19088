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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef


def operator(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the operator `ipfm::name`; its schema follows from its annotations."""
    return torch.library.custom_op(f"ipfm::{name}", mutates_args=tuple(mutates))


def direct(op: CustomOpDef, x: Tensor) -> Callable[..., Any]:
    """The operator, or the function that it was made of where a launch on x needs no operator and no gradient."""
    return op._init_fn if launches_directly(x) else op


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` where an argument `launches_directly`: without what PyTorch asks for functorch first."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def launches_directly(x: Tensor) -> bool:
    """Whether a launch on x needs no operator: nobody compiles, traces, simulates, transforms or counts here."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


class Ways(NamedTuple):
    """A function of tensors and its gradient, by one implementation."""

    forward: Callable[..., Any]
    """(inputs) -> outputs; differentiable by autograd too where it is plain PyTorch."""
    backward: Callable[..., Any]
    """What `Operation.differentiate` calls."""


class Operation:
    """An operation that is differentiable once, by launches, by operators around them and by plain PyTorch.

    All three keep the same tensors for the backward pass: what is planned on the reference is what a GPU needs.

    Args:
        name: of the operator; the one of its gradient is `name`_backward.
        launches: the launchers.
        fakes: empty results of theirs.
        plain: the same by PyTorch's operations.
        save: (ctx, inputs, outputs), which keeps what the gradient needs.
        differentiate: (ctx, backward, *gradients of the outputs or None) -> gradients of the inputs.
    """

    def __init__(
        self,
        name: str,
        *,
        launches: Ways,
        fakes: Ways,
        plain: Ways,
        save: Callable[..., None],
        differentiate: Callable[..., Any],
    ) -> None:
        self.launch, self.plain = launches.forward, plain.forward
        self.forward, self.backward = operator(name)(launches.forward), operator(f"{name}_backward")(launches.backward)
        self.forward.register_fake(fakes.forward)
        self.backward.register_fake(fakes.backward)

        def launched(x: Tensor, *rest: Any) -> Any:
            return (launches.backward if launches_directly(x) else self.backward)(x, *rest)

        def through_operators(ctx: Any, *gradients: Tensor | None) -> Any:
            return differentiate(ctx, launched, *gradients)

        self.forward.register_autograd(through_operators, setup_context=save)
        self._directly = _function(name, Ways(launches.forward, launched), save, differentiate)
        self._plainly = _function(name, plain, save, differentiate)

    def __call__(self, x: Tensor, *rest: Any, triton_runs: bool) -> Any:
        """The outputs; arguments are valid."""
        if not triton_runs:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _transformed():
                return self.plain(x, *rest)
            return self._plainly.apply(x, *rest)
        if not launches_directly(x):
            return self.forward(x, *rest)
        return self._directly.apply(x, *rest) if torch.is_grad_enabled() else self.launch(x, *rest)


def _transformed() -> bool:
    """Whether what happens is recorded for an export, or transformed by torch.func: functions of autograd bar both."""
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def _function(
    name: str, ways: Ways, save: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # In one: with a setup_context of its own, PyTorch would bind the arguments anew at every call.
            outputs = ways.forward(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} has no second derivative: create_graph=True cannot pass through it")
            return differentiate(ctx, ways.backward, *gradients)

    Direct.__name__ = Direct.__qualname__ = name
    return Direct
