"""Group normalisation with the SiLU that follows it, of which autograd keeps the input alone.

PyTorch's operations one after the other keep the normalised activation too, and a scaled and shifted one: what the
backward pass can make again from the input by reading it once more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> Tensor:
    """silu(n), or silu(n·(scale + 1) + shift), with n = `F.group_norm(x, groups, weight, bias, eps)`.

    x (B, C, H, W), contiguous or channels_last; weight, bias (C); scale and shift both or neither, (B or 1, C, 1, 1);
    all of one floating dtype, which is also the result's. The value and the gradients are those of PyTorch's
    operations, bit for bit. There is no second derivative: RuntimeError where one is asked for (create_graph=True).
    Nothing is validated here; `ipfm.kernels.group_norm_silu` does that.
    """
    out: Tensor = _GroupNormSilu.apply(x, weight, bias, scale, shift, groups, eps)
    return out


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        normed, mean, rstd = _group_norm(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        if scale is not None and shift is not None:
            normed = torch.addcmul(shift, normed, scale + 1)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("group_norm_silu has no second derivative: create_graph=True cannot pass through it")
        (gradient,) = gradients
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        to_scale = to_shift = None
        before, _, _ = _group_norm(x, weight, bias, ctx.groups, ctx.eps)
        if scale is None:
            gradient = torch.ops.aten.silu_backward(gradient, before)
        else:
            multiplier = scale + 1
            gradient = torch.ops.aten.silu_backward(gradient, torch.addcmul(shift, before, multiplier))
            if ctx.needs_input_grad[3]:
                to_scale = (gradient * before).sum_to_size(scale.shape)
            if ctx.needs_input_grad[4]:
                to_shift = gradient.sum_to_size(shift.shape)
            gradient = gradient * multiplier
        del before
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            _dense(gradient, x),
            _dense(x, x),
            mean,
            rstd,
            weight,
            *_sizes(x),
            ctx.groups,
            list(ctx.needs_input_grad[:3]),
        )
        return to_x, to_weight, to_bias, to_scale, to_shift, None, None


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised x, and each group's mean and 1/√(variance + eps)."""
    return torch.native_group_norm(_dense(x, x), weight, bias, *_sizes(x), groups, eps)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, channels, *sides = x.shape
    return batch, channels, sides[0] * sides[1]


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory format in which the operations take `like`: channels_last on the CPU only."""
    last = like.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
