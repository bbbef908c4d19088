"""What surrounds the attention of a residual block as two functions of autograd, for a GPU (see `whole_block`).

What is launched, kept for the backward pass and computed is the same as layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import group_norm, residual
from ipfm.kernels._images import like
from ipfm.kernels._operators import applied
from ipfm.models.whole_block import back_through_conv


class Numbers(NamedTuple):
    """What it computes with beside tensors."""

    groups: int
    """Of the normalisation."""
    eps: float
    heads: int
    scale: float
    """Factor of the sum."""


class Inputs(NamedTuple):
    """The tensors that go in; weights in the dtype of x, vectors as the kernels take them."""

    x: Tensor
    """(B, C, H, W), dense."""
    weight: Tensor
    """Of the normalisation."""
    bias: Tensor
    qkv: Tensor
    """(3·C, C, 1, 1), the rows in the order of checkpoints."""
    qkv_bias: Tensor
    proj: Tensor
    """(C, C, 1, 1)."""
    proj_bias: Tensor


def arranged(rows: Tensor, heads: int) -> Tensor:
    """(3·C, ...) in the order of checkpoints -> (3·C, n) in the order (q|k|v, head, channel of the head)."""
    return rows.view(heads, -1, 3, rows[0].numel()).permute(2, 0, 1, 3).reshape(len(rows), -1)


def _as_stored(rows: Tensor, like: Tensor, heads: int) -> Tensor:
    """The inverse of `arranged`, of the shape of `like`."""
    return rows.view(3, heads, len(rows) // (3 * heads), -1).permute(1, 2, 0, 3).reshape(like.shape)


def whole_attention(numbers: Numbers, inputs: Inputs) -> Tensor:
    """(x + proj(attention(qkv(norm(x)))))·scale, by the Triton kernels and PyTorch's attention.

    Differentiable once, where `whole_block.is_plain_eager`.

    Args:
        numbers: sizes and factors.
        inputs: the tensors.

    Raises:
        RuntimeError: in the backward pass, where a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        q, k, v, x = _before(numbers, *inputs[:5])
        y: Tensor = _after(numbers, F.scaled_dot_product_attention(q, k, v), x, *inputs[5:])
        return y
    (q, k, v), *_ = _run_before(numbers, *inputs[:5], trained=False)
    return _run_after(numbers, F.scaled_dot_product_attention(q, k, v), inputs.x, *inputs[5:])[0]


def _run_before(
    numbers: Numbers, x: Tensor, weight: Tensor, bias: Tensor, qkv: Tensor, qkv_bias: Tensor, *, trained: bool
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor]:
    """(q, k and v, each (B, heads, H·W, C / heads), statistics, what goes into qkv, its matrix).

    Where qkv is trained, what goes into it is (B·H·W, C), for its gradient.
    """
    vectors: group_norm.Parameters = weight, bias, None, None, None
    h, about = group_norm.forward_pass(x, numbers.groups, vectors, eps=numbers.eps, activation=False)
    tokens, matrix = h.flatten(2).transpose(1, 2), arranged(qkv, numbers.heads)
    addend = arranged(qkv_bias, numbers.heads).flatten()
    rows = tokens.flatten(0, 1) if trained else tokens
    if not trained or tokens.is_contiguous():
        joined = F.linear(tokens, matrix, addend)
    else:
        # One product, as PyTorch has it where the weight is trained.
        joined = rows.mm(matrix.t()).view(*tokens.shape[:2], -1).add_(addend)
    parts = joined.unflatten(2, (3, numbers.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return parts, about, rows, matrix


def _run_after(numbers: Numbers, a: Tensor, x: Tensor, proj: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(y, what goes into proj)."""
    h = a.transpose(1, 2).reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    return residual.forward_pass(x, like(F.conv2d(h, proj), x), bias, numbers.scale), h


def _refuse() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a residual block has no second derivative: create_graph=True cannot pass through it")


def _back_through_product(rows: Tensor, matrix: Tensor, tokens: Tensor | None) -> Tensor:
    """The gradient (n, C) of the tokens; in the order of their memory where they are known, as PyTorch has it."""
    if tokens is not None and tokens.stride() == (1, len(rows)):
        return matrix.t().mm(rows.t()).t()
    return rows.mm(matrix)


class _Before(torch.autograd.Function):
    """And x for the sum, whose gradient is added where that of the normalisation is stored."""

    @staticmethod
    def forward(ctx: Any, numbers: Numbers, *given: Any) -> tuple[Tensor, ...]:
        trained = ctx.needs_input_grad[4]
        parts, about, tokens, matrix = _run_before(numbers, *given, trained=trained)
        ctx.numbers = numbers
        # The matrix of a constant weight is made again.
        ctx.save_for_backward(*given, about, tokens if trained else None, matrix if trained else None)
        return *parts, given[0].view_as(given[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse()
        numbers: Numbers = ctx.numbers
        x, weight, bias, qkv, qkv_bias, about, tokens, matrix = ctx.saved_tensors
        _, to_x, to_weight, to_bias, to_qkv, to_qkv_bias = ctx.needs_input_grad
        *parts, more = gradients
        joined = torch.stack([part.transpose(1, 2) for part in parts], 2).flatten(2)
        rows = joined.flatten(0, 1)
        dh = _back_through_product(rows, arranged(qkv, numbers.heads) if matrix is None else matrix, tokens)
        vectors: group_norm.Parameters = weight, bias, None, None, None
        needed = to_weight, to_bias, False, False, False
        dx, *to_vectors = group_norm.backward_pass(
            dh.view(*joined.shape[:2], -1).transpose(1, 2).unflatten(2, x.shape[2:]),
            x,
            vectors,
            about,
            needed,
            False,
            more,
        )
        of_qkv = _as_stored(rows.t().mm(tokens), qkv, numbers.heads) if to_qkv else None
        of_bias = _as_stored(rows.sum(0), qkv_bias, numbers.heads) if to_qkv_bias else None
        return None, dx if to_x else None, *to_vectors[:2], of_qkv, of_bias


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Numbers, *given: Any) -> Tensor:
        y, h = _run_after(numbers, *given)
        a, _, proj, bias = given
        ctx.numbers, ctx.shape, ctx.bias = numbers, a.shape, (bias.dtype, bias.ndim == 2)
        ctx.save_for_backward(proj, h if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse()
        (proj, h), (dtype, by_sample) = ctx.saved_tensors, ctx.bias
        _, _, to_x, to_proj, to_bias = ctx.needs_input_grad
        batch, heads, length, width = ctx.shape
        d, of_bias = residual.backward_pass(gradients[0], ctx.numbers.scale, to_bias, by_sample=by_sample)
        dh, of_proj = back_through_conv(d, h, proj, 0, to_proj)
        da = dh.permute(0, 2, 3, 1).reshape(batch, length, heads, width).transpose(1, 2)
        return None, da, d if to_x else None, of_proj, None if of_bias is None else of_bias.to(dtype)


_before, _after = applied(_Before), applied(_After)
