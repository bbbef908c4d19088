"""A residual block as one function of autograd, for a GPU: what its layers launch, without what holds them together.

Layer by layer autograd keeps a node for each convolution, normalisation and sum, which together cost the host more
than their launches. What is launched, kept for the backward pass and computed is the same, but for one pass over the
data: where nothing but the block's input needs a gradient, the last kernel applies the sum's factor to what it stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import group_norm, residual
from ipfm.kernels._images import dense, is_dense, like
from ipfm.kernels._operators import applied
from ipfm.models.frozen_ops import conv2d_input

_convolution_backward: Callable[..., Any] = torch.ops.aten.convolution_backward.default


class Numbers(NamedTuple):
    """What a block computes with beside tensors."""

    groups: tuple[int, int]
    """Of both normalisations."""
    eps: tuple[float, float]
    paddings: tuple[int, int, int]
    """Of both convolutions and of the skip."""
    dropout: float
    """Its probability; 0 while nothing is trained."""
    scale: float
    """Factor of the sum."""
    up: bool = False
    """With a filter: it doubles the sides, else it halves them."""
    filter_padding: int = 0


class Inputs(NamedTuple):
    """The tensors that go in; weights in the dtype of x, vectors as the kernels take them."""

    x: Tensor
    """(B, C, H, W), dense."""
    weight0: Tensor
    """Of the normalisation."""
    bias0: Tensor
    conv0: Tensor
    """Weight of the convolution."""
    weight1: Tensor
    bias1: Tensor
    scale: Tensor | None
    shift: Tensor | None
    addend: Tensor | None
    """What conv0(…) lacks: (B or 1, out_channels)."""
    conv1: Tensor
    bias: Tensor | None
    """What the sum lacks."""
    skip: Tensor | None
    """Weight of its convolution; None: x itself is added."""
    filter0: Tensor | None = None
    """(in_channels, 1, L, L): comes before conv0 and, where it halves, before skip. There is a skip then."""
    filter1: Tensor | None = None
    """(out_channels, 1, L, L): comes after skip, where it doubles."""

    @property
    def second(self) -> group_norm.Parameters:
        """Of the second normalisation."""
        return self.weight1, self.bias1, self.scale, self.shift, self.addend


def is_plain_eager() -> bool:
    """Whether nobody compiles or transforms here: both know layers, not this function."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def whole_block(numbers: Numbers, inputs: Inputs) -> Tensor:
    """(skip(x) + conv1(dropout(silu(norm1(conv0(silu(norm0(x))))))))·scale, by the Triton kernels.

    With filters conv0 and skip change the resolution. Differentiable once, where `is_plain_eager`.

    Args:
        numbers: sizes and factors.
        inputs: the tensors.

    Raises:
        RuntimeError: in the backward pass, where a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        y: Tensor = _apply(numbers, *inputs)
        return y
    return _run(numbers, inputs)[0]


class Made(NamedTuple):
    """What is made on the way."""

    about0: Tensor
    """The statistics of a normalisation."""
    c0: Tensor
    """What conv0 makes."""
    about1: Tensor
    h0: Tensor
    """What goes into conv0."""
    h1: Tensor
    """What goes into conv1."""
    mask: Tensor | None
    """Of the dropout."""
    small: Tensor | None
    """What goes into skip where it is not x."""


def _run(numbers: Numbers, given: Inputs) -> tuple[Tensor, Made]:
    """(y, what is made on the way)."""
    first: group_norm.Parameters = given.weight0, given.bias0, None, None, None
    h0, about0 = group_norm.forward_pass(given.x, numbers.groups[0], first, eps=numbers.eps[0], activation=True)
    if given.filter0 is not None:
        h0 = _resampled(h0, given.filter0, numbers)
    c0 = dense(F.conv2d(h0, given.conv0, None, 1, numbers.paddings[0]))
    h1, about1 = group_norm.forward_pass(c0, numbers.groups[1], given.second, eps=numbers.eps[1], activation=True)
    mask: Tensor | None = None
    if numbers.dropout:
        h1, mask = torch.native_dropout(h1, numbers.dropout, True)
    c1 = F.conv2d(h1, given.conv1, None, 1, numbers.paddings[1])
    x, small = given.x, None
    if given.skip is not None:
        if given.filter0 is not None and not numbers.up:
            x = small = _resampled(x, given.filter0, numbers)
        x = F.conv2d(x, given.skip, None, 1, numbers.paddings[2])
        x = dense(x if given.filter1 is None else _resampled(x, given.filter1, numbers))
    y = residual.forward_pass(x, like(c1, x), given.bias, numbers.scale)
    return y, Made(about0, c0, about1, h0, h1, mask, small)


def _resampled(x: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
    convolve = F.conv_transpose2d if numbers.up else F.conv2d
    y: Tensor = convolve(x, weight, stride=2, padding=numbers.filter_padding, groups=len(weight))
    return y


def _back_through_filter(dy: Tensor, weight: Tensor, size: Sequence[int], numbers: Numbers) -> Tensor:
    """The gradient of `_resampled` by x (B, C, *size)."""
    if numbers.up:
        return F.conv2d(dy, weight, stride=2, padding=numbers.filter_padding, groups=len(weight))
    return conv2d_input(dy, weight, size, stride=2, padding=numbers.filter_padding, groups=len(weight))


class _WholeBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Numbers, *tensors: Any) -> Tensor:
        given = Inputs(*tensors)
        y, made = _run(numbers, given)
        needed = ctx.needs_input_grad
        ctx.numbers = numbers
        ctx.save_for_backward(
            *given[:10],
            *given[11:],
            *made[:3],
            # The gradient of a constant weight is not asked for, and that of its input is of the weight alone.
            made.h0 if needed[4] else None,
            made.h1 if needed[10] else None,
            made.mask,
            made.small if needed[12] else None,
        )
        ctx.bias = None if given.bias is None else (given.bias.dtype, given.bias.ndim == 2)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a residual block has no second derivative: create_graph=True cannot pass through it")
        numbers: Numbers = ctx.numbers
        # (Names, not `Inputs` and `Made`: the making of one takes the host as long as a launch.)
        x, weight0, bias0, conv0, weight1, bias1, scale, shift, addend, conv1, *saved = ctx.saved_tensors
        skip, filter0, filter1, about0, c0, about1, h0, h1, mask, small = saved
        del saved
        # Unless the graph is kept: what was needed last is let go of, not all at the end.
        ctx.maybe_clear_saved_tensors()
        needed = ctx.needs_input_grad
        _, of_x, of_weight0, of_bias0, of_conv0, *of_second, of_conv1, of_bias, of_skip, _, _ = needed
        (dy,) = gradients
        d, to_bias, factor = dy, None, numbers.scale
        # All that follows is linear in dy. With gaps, as a part of concatenated channels has, dy is copied anyway.
        if any(needed[2:]) or filter0 is not None or not is_dense(dy):
            dtype, by_sample = ctx.bias or (dy.dtype, False)
            d, to_bias = residual.backward_pass(dy, numbers.scale, of_bias, by_sample=by_sample)
            to_bias, factor = None if to_bias is None else to_bias.to(dtype), 1.0
        dh, to_conv1 = back_through_conv(d, h1, conv1, numbers.paddings[1], of_conv1)
        del h1
        if mask is not None:
            kept = 1 - numbers.dropout
            dh = torch.ops.aten.native_dropout_backward(dh, mask, 1 / kept if kept else 0.0)
        second = weight1, bias1, scale, shift, addend
        dc, *to_second = group_norm.backward_pass(dh, c0, second, about1, of_second, True)
        assert dc is not None
        del dh, c0, mask
        dh, to_conv0 = back_through_conv(dc, h0, conv0, numbers.paddings[0], of_conv0)
        del dc, h0
        more, to_skip = d, None
        if filter0 is not None:
            dh = _back_through_filter(dh, filter0, x.shape[2:], numbers)
        if skip is not None:
            if filter1 is not None:
                more = _back_through_filter(more, filter1, x.shape[2:], numbers)
            halved = filter0 is not None and not numbers.up
            more, to_skip = back_through_conv(more, small if halved else x, skip, numbers.paddings[2], of_skip)
            if halved:
                more = _back_through_filter(more, filter0, x.shape[2:], numbers)
        first: group_norm.Parameters = weight0, bias0, None, None, None
        asked = of_weight0, of_bias0, False, False, False
        dx, *to_first = group_norm.backward_pass(dh, x, first, about0, asked, True, more, factor)
        return (
            None, dx if of_x else None, *to_first[:2], to_conv0, *to_second, to_conv1, to_bias, to_skip, None, None
        )  # fmt: skip


def back_through_conv(
    dy: Tensor, x: Tensor | None, weight: Tensor, padding: int, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a convolution's input and, where it is trained, of its weight."""
    if not trained:
        return F.conv_transpose2d(dy, weight, None, 1, padding), None
    dx, to_weight, _ = _convolution_backward(
        dy, x, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    return dx, to_weight


_apply = applied(_WholeBlock)
