"""U-Nets as they are put together for a GPU, on a CPU: the references compute in place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ipfm.kernels.group_norm import Parameters, unchecked_group_norm_silu
from ipfm.kernels.residual import unchecked_residual_sum


def _norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, addend: Tensor | None = None, **settings: Any
) -> Tensor:
    added = addend if addend is None else addend.to(x.dtype)
    settings = {"scale": None, "shift": None, **settings, "triton_runs": False}
    return unchecked_group_norm_silu(x, groups, _one(weight, x), _one(bias, x), addend=added, **settings)


def _one(parameter: Tensor, x: Tensor) -> Tensor:
    """Of the rows of one that was joined with others the first: they are alike."""
    return parameter[0].to(x.dtype) if parameter.ndim == 2 else parameter


def _branching(x: Tensor, *given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    return _norm(x, *given, **settings), x


def _total(a: Tensor, b: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    bias = None if bias is None else _one(bias, a)
    return unchecked_residual_sum(a, b, bias, **{**settings, "triton_runs": False})


def _norm_forward(
    x: Tensor, groups: int, parameters: Parameters, *, eps: float, activation: bool
) -> tuple[Tensor, Tensor]:
    weight, bias, scale, shift, addend = parameters
    y = _norm(x, groups, weight, bias, scale=scale, shift=shift, addend=addend, eps=eps, activation=activation)
    return y.detach().to(x.dtype), torch.tensor([groups, eps], dtype=torch.float64)


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    parameters: Parameters,
    about: Tensor,
    needed: Sequence[bool],
    activation: bool,
    more: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor | None, ...]:
    groups, eps = about.tolist()
    x, *vectors = (t if t is None else t.detach().requires_grad_() for t in (x, *parameters))
    with torch.enable_grad():
        weight, bias, scale, shift, addend = vectors
        given = {"scale": scale, "shift": shift, "addend": addend}
        y = _norm(x, int(groups), weight, bias, **given, eps=eps, activation=activation)
        y = y.to(x.dtype)
    dx, *found = torch.autograd.grad(y, [x, *(t for t in vectors if t is not None)], dy)
    of_vectors = (None if t is None else found.pop(0) for t in vectors)
    asked = (gradient if wanted else None for gradient, wanted in zip(of_vectors, needed, strict=True))
    return (dx if more is None else dx + more) * factor, *asked


def _total_forward(a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _total(a, b, bias, scale=scale)


def _total_backward(dy: Tensor, scale: float, biased: bool, *, by_sample: bool) -> tuple[Tensor, Tensor | None]:
    d = dy * scale
    return d, d.sum((2, 3) if by_sample else (0, 2, 3)) if biased else None


@contextmanager
def put_together_as_on_a_gpu() -> Iterator[None]:
    """One product for all projections, biases and sums left to what comes next, while the block lasts.

    And weights in the order of the activations, where those are channels_last.
    """
    replaced = {
        "models.blocks.triton_serves": lambda x: True,
        "models.layers.triton_serves": lambda x: True,
        "engine.training.run.orders_weights": lambda device: True,
        "models.layers.unchecked_group_norm_silu": _norm,
        "models.layers.branching_group_norm_silu": _branching,
        "models.layers.unchecked_residual_sum": _total,
        "kernels.group_norm.forward_pass": _norm_forward,
        "kernels.group_norm.backward_pass": _norm_backward,
        "kernels.residual.forward_pass": _total_forward,
        "kernels.residual.backward_pass": _total_backward,
    }
    with ExitStack() as stack:
        for name, instead in replaced.items():
            stack.enter_context(mock.patch(f"ipfm.{name}", instead))
        yield
