"""Group normalisation with the SiLU that follows it, of which autograd keeps the input alone where it is large.

PyTorch's operations one after the other keep the normalised activation too, and a scaled and shifted one: what the
backward pass can make again from the input by reading it once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements up to which an activation is kept: making it again would cost a CPU more time than a megabyte is worth. It is
# so on every device, that what is planned without data be what happens.
SMALL = 2**18

_Gradients = tuple[Tensor, Tensor | None, Tensor | None]
_SILU_BACKWARD = torch.ops.aten.silu_backward.grad_input
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
    activation: bool = True,
) -> Tensor:
    """silu(n), or silu(n·(scale + 1) + shift), with n = `F.group_norm(x, groups, weight, bias, eps)`.

    The value and the gradients are those of PyTorch's operations, bit for bit in 16 bits and but for rounding in more.
    Nothing is validated here; `ipfm.kernels.group_norm_silu` does that.

    Args:
        x: (B, C, H, W), contiguous or channels_last, of any floating dtype.
        groups: number of groups, a divisor of C.
        weight: (C,), of x's dtype.
        bias: (C,), of x's dtype.
        scale: (B or 1, C, 1, 1), of x's dtype; given with shift or not at all.
        shift: (B or 1, C, 1, 1), of x's dtype.
        eps: added to the variance.
        activation: False leaves out SiLU: what goes into it, by PyTorch's own operations.

    Returns:
        (B, C, H, W) in x's dtype.

    Raises:
        RuntimeError: in the backward pass, where a second derivative is asked for (create_graph=True) of more than
            `SMALL` elements.
    """
    # An exported graph holds for every batch size, of which a comparison would make a limit.
    if not activation or torch.compiler.is_exporting() or (x.numel() <= SMALL and torch.is_grad_enabled()):
        normed = F.group_norm(x, groups, weight, bias, eps)
        if scale is not None and shift is not None:
            normed = _modulated(normed, scale + 1, shift)
        return F.silu(normed) if activation else normed
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, scale, shift, groups, eps)[0]
    out: Tensor = _GroupNormSilu.apply(x, weight, bias, scale, shift, groups, eps)
    return out


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and each group's mean and 1/√(variance + eps)."""
    normed, mean, rstd = _group_norm(x, weight, bias, groups, eps)
    if scale is not None and shift is not None:
        normed = _modulated(normed, scale + 1, shift)
    return F.silu(normed, inplace=True), mean, rstd


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
        y, mean, rstd = _forward(x, weight, bias, scale, shift, groups, eps)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("group_norm_silu has no second derivative: create_graph=True cannot pass through it")
        (gradient,) = gradients
        # Once: a checkpointed block gives each of them out a single time.
        saved = ctx.saved_tensors
        x, weight, _, _, _, mean, rstd = saved
        through_silu = _through_silu_wide if _is_wide(x) else _through_silu
        gradient, to_scale, to_shift = through_silu(gradient, saved, ctx.groups, ctx.eps)
        to_x, to_weight, to_bias = _GROUP_NORM_BACKWARD(
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


def _through_silu(gradient: Tensor, saved: Sequence[Any], groups: int, eps: float) -> _Gradients:
    """From the gradient of the result to those of the normalised x, the scale and the shift."""
    x, weight, bias, scale, shift, _, _ = saved
    normed, _, _ = _group_norm(x, weight, bias, groups, eps)
    if scale is None:
        return _silu_backward(gradient, normed), None, None
    multiplier = scale + 1
    gradient = _silu_backward(gradient, _modulated(normed, multiplier, shift))
    to_scale = (gradient * normed).sum_to_size(scale.shape)
    to_shift = gradient.sum_to_size(shift.shape)
    return gradient.mul_(multiplier), to_scale, to_shift


def _through_silu_wide(gradient: Tensor, saved: Sequence[Any], groups: int, eps: float) -> _Gradients:
    """The same in fewer passes over the data.

    What goes into SiLU is a x + c with numbers a and c of the channel, and the gradients of scale and shift are made of
    each channel's sums.
    """
    x, weight, bias, scale, shift, mean, rstd = saved
    per_group = (groups, x.shape[1] // groups)
    gain = rstd[:, :, None] * weight.view(per_group)
    offset = torch.addcmul(bias.view(per_group), mean[:, :, None], gain, value=-1)
    gain, offset = (t.view(*x.shape[:2], 1, 1) for t in (gain, offset))
    if scale is None:
        return _silu_backward(gradient, (x * gain).add_(offset)), None, None
    multiplier = scale + 1
    inner = (x * (gain * multiplier)).add_(torch.addcmul(shift, offset, multiplier))
    gradient = _silu_backward(gradient, inner)
    total = gradient.sum((2, 3), keepdim=True)
    to_scale = gain * (gradient * x).sum((2, 3), keepdim=True) + offset * total
    return gradient.mul_(multiplier), to_scale.sum_to_size(scale.shape), total.sum_to_size(shift.shape)


def _silu_backward(gradient: Tensor, inner: Tensor) -> Tensor:
    """gradient silu'(inner), written over `inner`."""
    out: Tensor = _SILU_BACKWARD(gradient, inner, grad_input=inner)
    return out


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised x, and each group's mean and 1/√(variance + eps)."""
    return torch.native_group_norm(_dense(x, x), weight, bias, *_sizes(x), groups, eps)


def _modulated(normed: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """normed·multiplier + shift; on a CPU two passes are faster than addcmul's one, but in 16 bits each would round."""
    if _is_wide(normed):
        return (normed * multiplier).add_(shift)
    return torch.addcmul(shift, normed, multiplier)


def _is_wide(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, channels, *sides = x.shape
    return batch, channels, sides[0] * sides[1]


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory format in which the operations take `like`: channels_last on the CPU only."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor
    last = like.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
