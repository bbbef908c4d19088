"""U-Nets as they are put together for a GPU, on a CPU: the references compute in place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from ipfm.kernels.group_norm import unchecked_group_norm_silu
from ipfm.kernels.residual import unchecked_residual_sum


def _norm(x: Tensor, *given: Any, addend: Tensor | None = None, **settings: Any) -> Tensor:
    added = addend if addend is None else addend.to(x.dtype)
    return unchecked_group_norm_silu(
        x, *given, addend=added, **{"scale": None, "shift": None, **settings, "triton_runs": False}
    )


def _branching(x: Tensor, *given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    return _norm(x, *given, **settings), x


def _total(*given: Any, **settings: Any) -> Tensor:
    return unchecked_residual_sum(*given, **{**settings, "triton_runs": False})


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
