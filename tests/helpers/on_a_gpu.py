"""U-Nets as they are put together for a GPU, on a CPU: the references compute in place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from ipfm.kernels.group_norm import unchecked_group_norm_silu
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


@contextmanager
def put_together_as_on_a_gpu() -> Iterator[None]:
    """One product for all projections, biases and sums left to what comes next, while the block lasts."""
    replaced = {
        "blocks.triton_serves": lambda x: True,
        "layers.triton_serves": lambda x: True,
        "layers.unchecked_group_norm_silu": _norm,
        "layers.branching_group_norm_silu": _branching,
        "layers.unchecked_residual_sum": _total,
    }
    with ExitStack() as stack:
        for name, instead in replaced.items():
            stack.enter_context(mock.patch(f"ipfm.models.{name}", instead))
        yield
