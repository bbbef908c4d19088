"""Layers with constant weights that keep nothing of their input for the backward pass.

A convolution's gradient with respect to its input needs the weight alone, yet PyTorch keeps the input as well
(pytorch#133566), and a cast of the weight beside the weight. These keep the weight as it is stored, a parameter as
itself: one that is sharded may leave the memory between the two passes. Values are those of PyTorch's operations, bit
for bit unless a function says otherwise, gradients theirs but for rounding; the backward passes are differentiable in
turn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels.group_norm_reference import SMALL


def is_frozen(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a graph is being made in which `x` needs a gradient and no parameter does, and keeping nothing pays.

    It does not where x has up to `SMALL` elements: PyTorch's own operations are faster. But they would keep a cast of
    a parameter, or one that ZeRO gathers for its use (it has a ds_id).
    """
    if not x.requires_grad or not torch.is_grad_enabled() or any(p is not None and p.requires_grad for p in parameters):
        return False
    if x.numel() > SMALL:
        return True
    return any(p is not None and (p.dtype != x.dtype or hasattr(p, "ds_id")) for p in parameters)


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """`F.conv2d` that is differentiable with respect to x alone.

    Weight and bias are cast to the dtype of x at each use, in the backward pass again.

    Args:
        x: (B, C, H, W), contiguous or channels_last.
        weight: (O, C/groups, k, k), of any floating dtype.
        bias: (O,), of any floating dtype.
        stride: as in `F.conv2d`.
        padding: as in `F.conv2d`.
        groups: as in `F.conv2d`.

    Returns:
        (B, O, H', W') in the dtype of x.
    """
    out: Tensor = _Conv.apply(x, weight, bias, stride, padding, groups)
    return out


def frozen_conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """`F.conv_transpose2d` that is differentiable with respect to x alone.

    Args:
        x: as in `frozen_conv2d`.
        weight: (C, O/groups, k, k), of any floating dtype.
        bias: (O,), of any floating dtype.
        stride: as in `F.conv_transpose2d`.
        padding: as in `F.conv_transpose2d`.
        groups: as in `F.conv_transpose2d`.

    Returns:
        (B, O, H', W') in the dtype of x.
    """
    out: Tensor = _ConvTranspose.apply(x, weight, bias, stride, padding, groups)
    return out


def doubled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d(repeat_2x2(x), weight, bias, padding=k // 2)` for odd k, without the larger image and most of the work.

    Each pixel of the result sees k² repeated pixels, but not more than ((k + 1) / 2)² different ones. Their weights are
    summed first. For k = 3 that leaves 4 of 9 multiplications.

    Args:
        x: (B, C, H, W).
        weight: (O, C, k, k), of any floating dtype; cast to that of x.
        bias: (O,), of any floating dtype; cast to that of x.

    Returns:
        (B, O, 2H, 2W), equal but for rounding.
    """
    padding = weight.shape[-1] // 2
    if is_frozen(x, weight, bias):
        out: Tensor = _DoubledConv.apply(x, weight, bias, padding)
        return out
    return F.conv_transpose2d(x, _spread(weight).to(x.dtype), _cast(bias, x), stride=2, padding=padding)


def _spread(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (C, O, k + 1, k + 1): what a pixel of the small image gives to its surroundings in the large."""
    flipped = weight.transpose(0, 1).flip(2, 3)
    rows = F.pad(flipped, (0, 0, 0, 1)) + F.pad(flipped, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arrange: Callable[[Tensor], Tensor]
) -> Tensor:
    """`F.linear(x, arrange(weight), bias)` that is differentiable with respect to x alone.

    Args:
        x: (..., C).
        weight: of any shape and floating dtype; it is cast to that of x and handed to `arrange`, in the backward pass
            again.
        bias: (O,), in the order of the matrix's rows.
        arrange: makes the matrix (O, C) of the weight.

    Returns:
        (..., O) in the dtype of x.
    """
    out: Tensor = _Linear.apply(x, weight, bias, arrange)
    return out


def mean_2x2(x: Tensor) -> Tensor:
    """x (B, C, 2H, 2W) -> (B, C, H, W): the mean of each 2×2 square, but for rounding.

    An odd last row or column is left out.
    """
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        return F.avg_pool2d(x, 2)
    out: Tensor = _Sum2x2.apply(x, 0.25)
    return out


def repeat_2x2(x: Tensor) -> Tensor:
    """x (B, C, H, W) -> (B, C, 2H, 2W): each pixel four times, side by side."""
    if not _walks_fast(x):
        return F.interpolate(x, scale_factor=2, mode="nearest")
    out: Tensor = _Repeat2x2.apply(x)
    return out


def _walks_fast(x: Tensor) -> bool:
    """Whether strided slices do it: on a CPU they are several times faster than pooling and interpolation.

    Not in a graph to be exported: it runs elsewhere, and pooling is one node where these are a dozen.
    """
    fast = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    return fast and not torch.compiler.is_exporting()


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def conv2d_input(
    gradient: Tensor, weight: Tensor, size: Sequence[int], *, stride: int, padding: int, groups: int
) -> Tensor:
    """The gradient of `F.conv2d` with respect to its input (B, C, *size); arguments as of it, of one dtype."""
    # Rows and columns at the end that a stride left out.
    rest = [
        given - ((reached - 1) * stride - 2 * padding + taps)
        for given, reached, taps in zip(size, gradient.shape[-2:], weight.shape[-2:], strict=True)
    ]
    return F.conv_transpose2d(
        gradient, weight, stride=stride, padding=padding, output_padding=rest, groups=groups
    )  # fmt: skip


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.groups = stride, padding, groups
        ctx.size = x.shape[-2:]
        return F.conv2d(x, weight.to(x.dtype), _cast(bias, x), stride=stride, padding=padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        weight = weight.to(gradient.dtype)
        back = conv2d_input(gradient, weight, ctx.size, stride=ctx.stride, padding=ctx.padding, groups=ctx.groups)
        return back, None, None, None, None, None


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.groups = stride, padding, groups
        return F.conv_transpose2d(x, weight.to(x.dtype), _cast(bias, x), stride=stride, padding=padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        back = F.conv2d(gradient, weight.to(gradient.dtype), stride=ctx.stride, padding=ctx.padding, groups=ctx.groups)
        return back, None, None, None, None, None


class _DoubledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return F.conv_transpose2d(x, _spread(weight).to(x.dtype), _cast(bias, x), stride=2, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        back = F.conv2d(gradient, _spread(weight).to(gradient.dtype), stride=2, padding=ctx.padding)
        return back, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arrange: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.arrange = arrange
        return F.linear(x, arrange(weight.to(x.dtype)), _cast(bias, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ ctx.arrange(weight.to(gradient.dtype)), None, None, None


class _Sum2x2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        if not _walks_fast(x):
            return F.avg_pool2d(x, 2) if factor == 0.25 else F.avg_pool2d(x, 2).mul_(4 * factor)
        rows = x[..., 0::2, :] + x[..., 1::2, :]
        total = rows[..., 0::2] + rows[..., 1::2]
        return total if factor == 1 else total.mul_(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return repeat_2x2(gradients[0] if ctx.factor == 1 else gradients[0] * ctx.factor), None


class _Repeat2x2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = x.new_empty(*x.shape[:-2], height, 2, 2 * width)
        upper, lower = rows.unbind(-2)
        upper[..., 0::2] = x
        upper[..., 1::2] = x
        lower.copy_(upper)
        return rows.flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out: Tensor = _Sum2x2.apply(gradients[0], 1.0)
        return out
