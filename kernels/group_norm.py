"""group_norm_silu: group normalisation, an optional scale and shift of each channel, and SiLU, in one pass each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, group_norm_reference
from ipfm.kernels._dispatch import Backend, group_config, use_triton
from ipfm.kernels._launch import Launch, dense_layout
from ipfm.kernels._norm_parts import activated, channel_addend, channel_parameters, through_silu, with_addend, with_more
from ipfm.kernels._operators import applied, launches_directly, operator
from ipfm.kernels.group_norm_lanes import (
    group_norm_silu_lanes_backward_kernel,
    group_norm_silu_lanes_kernel,
    lane_sizes,
)

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tile(i_hw, HW, s_c, s_hw, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask (GROUPS, CP, BLOCK) of pixels i_hw.. of this program's groups."""
    o_g = tl.arange(0, GROUPS)[:, None, None]
    o_c = tl.arange(0, CP)[None, :, None]
    o_hw = i_hw + tl.arange(0, BLOCK)[None, None, :]
    return (o_g * CHANNELS + o_c) * s_c + o_hw * s_hw, (o_c < CHANNELS) & (o_hw < HW)


@triton.jit
def _mean(b_v, count, COMPUTE: tl.constexpr):
    """(GROUPS, CP, BLOCK) -> (GROUPS, 1, 1): the sum over a group, divided by `count`.

    Over both axes at once: what a thread holds is added before anything passes between threads.
    """
    b_sum = tl.sum(tl.reshape(b_v, (b_v.shape[0], b_v.shape[1] * b_v.shape[2])), axis=1)
    return (b_sum / tl.cast(count, COMPUTE))[:, None, None]


@triton.jit
def _channels(i_g, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, CP: tl.constexpr):
    """Numbers and mask (GROUPS, CP, 1) of the channels of groups i_g.. ."""
    o_cp = tl.arange(0, CP)[None, :, None]
    o_c = (i_g + tl.arange(0, GROUPS)[:, None, None]) * CHANNELS + o_cp
    return o_c, (o_cp < CHANNELS) & (o_c >= 0)


@triton.jit
def group_norm_silu_kernel(
    p_x, p_weight, p_bias, p_scale, p_shift, p_addend, p_y, p_statistics,
    HW, s_b, s_c, s_hw, s_pb, s_pc, s_ab,
    EPS: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, SILU: tl.constexpr, GROUPS_ALL: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample, GROUPS groups): y = silu((w (x - mean)·rstd + b)(1 + scale) + shift), rstd = 1/√(var + eps).

    With an addend x is what has it added; nothing writes that sum. Without SILU, y is what goes into it. The variance
    is the mean of (x - mean)²: the group waits in registers (RESIDENT), or is read again, from cache.
    """
    # The program's groups of a sample.
    parts: tl.constexpr = GROUPS_ALL // GROUPS
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    i_g = (tl.program_id(0) % parts) * GROUPS
    p_x += i_b * s_b + i_g.to(tl.int64) * CHANNELS * s_c
    p_y += i_b * s_b + i_g.to(tl.int64) * CHANNELS * s_c
    count = HW * CHANNELS

    o_c, m_c = _channels(i_g, CHANNELS, GROUPS, CP)
    b_a = channel_addend(p_addend, i_b, o_c, m_c, s_ab, ADDED, COMPUTE)

    # Load and reduce: each group's mean, and then its variance about that.
    if RESIDENT:
        o, m = _tile(0, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
        b_x = with_addend(p_x, o, m, b_a, ADDED, COMPUTE)
        mean = _mean(tl.where(m, b_x, 0.0) if ADDED else b_x, count, COMPUTE)
        b_d = tl.where(m, b_x - mean, 0.0)
        variance = _mean(b_d * b_d, count, COMPUTE)
    else:
        b_sum = tl.zeros((GROUPS, CP, BLOCK), COMPUTE)
        for i_hw in range(0, HW, BLOCK):
            o, m = _tile(i_hw, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
            b_x = with_addend(p_x, o, m, b_a, ADDED, COMPUTE)
            b_sum += tl.where(m, b_x, 0.0) if ADDED else b_x
        mean = _mean(b_sum, count, COMPUTE)
        b_sum = tl.zeros((GROUPS, CP, BLOCK), COMPUTE)
        for i_hw in range(0, HW, BLOCK):
            o, m = _tile(i_hw, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
            b_d = tl.where(m, with_addend(p_x, o, m, b_a, ADDED, COMPUTE) - mean, 0.0)
            b_sum += b_d * b_d
        variance = _mean(b_sum, count, COMPUTE)
    rstd = 1.0 / tl.sqrt(variance + tl.full((), EPS, COMPUTE))
    o_g = i_b * GROUPS_ALL + i_g + tl.arange(0, GROUPS)[:, None, None]
    tl.store(p_statistics + 2 * o_g, mean)
    tl.store(p_statistics + 2 * o_g + 1, rstd)

    # Load: the channels' parameters.
    b_v, b_c = channel_parameters(p_weight, p_bias, p_scale, p_shift, i_b, o_c, m_c, s_pb, s_pc, SCALED, COMPUTE)

    b_v *= rstd

    # Compute and store: the normalised x, scaled, shifted and through SiLU.
    dtype = p_y.dtype.element_ty
    if RESIDENT:
        b_u = b_d * b_v + b_c
        tl.store(p_y + o, activated(b_u, SILU).to(dtype), mask=m)
    else:
        for i_hw in range(0, HW, BLOCK):
            o, m = _tile(i_hw, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
            b_u = (with_addend(p_x, o, m, b_a, ADDED, COMPUTE) - mean) * b_v + b_c
            tl.store(p_y + o, activated(b_u, SILU).to(dtype), mask=m)


@triton.jit
def group_norm_silu_backward_kernel(
    p_x, p_dy, p_weight, p_bias, p_scale, p_shift, p_addend, p_more, p_statistics, p_dx, p_sums,
    HW, s_b, s_c, s_hw, s_pb, s_pc, s_ab,
    SCALED: tl.constexpr, ADDED: tl.constexpr, MORE: tl.constexpr, FACTOR: tl.constexpr, SILU: tl.constexpr,
    GROUPS_ALL: tl.constexpr, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample, GROUPS groups): the gradient by x, for u = v n + … with v = w (1 + scale).

        ∂L/∂x = rstd (v ∂L/∂u - mean(v ∂L/∂u) - n mean(v n ∂L/∂u)),   means over the group

    and for each channel Σ ∂L/∂u and Σ n ∂L/∂u, from which the gradients of the parameters follow, and with an addend
    Σ ∂L/∂x, which is its own. What else is made of x gives `more`, which is added to ∂L/∂x as it is stored. The sum is
    multiplied by FACTOR: of a gradient that lacks a factor nothing else is asked then.
    """
    # The program's groups of a sample, and what the forward pass and the parameters say of them.
    parts: tl.constexpr = GROUPS_ALL // GROUPS
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    i_g = (tl.program_id(0) % parts) * GROUPS
    start = i_b * s_b + i_g.to(tl.int64) * CHANNELS * s_c
    p_x += start
    p_dy += start
    p_dx += start
    p_more += start
    o_g = i_b * GROUPS_ALL + i_g + tl.arange(0, GROUPS)[:, None, None]
    mean = tl.load(p_statistics + 2 * o_g, eviction_policy="evict_last")
    rstd = tl.load(p_statistics + 2 * o_g + 1, eviction_policy="evict_last")
    o_c, m_c = _channels(i_g, CHANNELS, GROUPS, CP)
    b_v, b_c = channel_parameters(p_weight, p_bias, p_scale, p_shift, i_b, o_c, m_c, s_pb, s_pc, SCALED, COMPUTE)
    b_a = channel_addend(p_addend, i_b, o_c, m_c, s_ab, ADDED, COMPUTE)

    # Load and compute: n, and the gradient of what goes into SiLU.
    if RESIDENT:
        o, m = _tile(0, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
        b_n, b_du = through_silu(p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED, SILU, COMPUTE)
        b_sum = b_du
        b_sum_n = b_du * b_n
    else:
        b_sum = tl.zeros((GROUPS, CP, BLOCK), COMPUTE)
        b_sum_n = tl.zeros((GROUPS, CP, BLOCK), COMPUTE)
        for i_hw in range(0, HW, BLOCK):
            o, m = _tile(i_hw, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
            b_n, b_du = through_silu(p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED, SILU, COMPUTE)
            b_sum += b_du
            b_sum_n += b_du * b_n

    # Reduce: the channels' sums, which the parameters' gradients need too, and the groups' means.
    b_sum = tl.sum(b_sum, axis=2)[:, :, None]
    b_sum_n = tl.sum(b_sum_n, axis=2)[:, :, None]
    o_c += i_b * (GROUPS_ALL * CHANNELS)
    all_channels = (tl.num_programs(0) // parts).to(tl.int64) * (GROUPS_ALL * CHANNELS)
    tl.store(p_sums + o_c, b_sum, mask=m_c)
    tl.store(p_sums + all_channels + o_c, b_sum_n, mask=m_c)
    count = tl.cast(HW * CHANNELS, COMPUTE)
    mean_v = tl.sum(b_sum * b_v, axis=1)[:, :, None] / count
    mean_vn = tl.sum(b_sum_n * b_v, axis=1)[:, :, None] / count

    # Store: ∂L/∂x, of what waits in registers or is computed again, and the sums of it.
    dtype = p_dx.dtype.element_ty
    if RESIDENT:
        b_dx = rstd * (b_du * b_v - mean_v - b_n * mean_vn)
        tl.store(p_dx + o, with_more(b_dx, p_more, o, m, MORE, FACTOR, COMPUTE).to(dtype), mask=m)
        b_dx = tl.where(m, b_dx, 0.0)
    else:
        b_dx = tl.zeros((GROUPS, CP, BLOCK), COMPUTE)
        for i_hw in range(0, HW, BLOCK):
            o, m = _tile(i_hw, HW, s_c, s_hw, CHANNELS, GROUPS, CP, BLOCK)
            b_n, b_du = through_silu(p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED, SILU, COMPUTE)
            b_d = rstd * (b_du * b_v - mean_v - b_n * mean_vn)
            tl.store(p_dx + o, with_more(b_d, p_more, o, m, MORE, FACTOR, COMPUTE).to(dtype), mask=m)
            if ADDED:
                b_dx += tl.where(m, b_d, 0.0)
    if ADDED:
        tl.store(p_sums + 2 * all_channels + o_c, tl.sum(b_dx, axis=2)[:, :, None], mask=m_c)


# -------------------------------------------------------------------------------------------------------- launchers


def _dense(x: Tensor) -> Tensor:
    """x as it is if it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def block_sizes(
    channels: int,
    groups: int,
    pixels: int,
    dtype: torch.dtype,
    channels_last: bool,
    *,
    scaled: bool = False,
    backward: bool = False,
) -> tuple[dict[str, Any], int]:
    """(what is constant in the kernels for this shape, warps)."""
    together, padded, block, warps = group_config(
        channels // groups, groups, pixels, dtype.itemsize, channels_last, scaled=scaled, backward=backward
    )
    sizes = {
        "GROUPS_ALL": groups,
        "CHANNELS": channels // groups,
        "GROUPS": together,
        "CP": padded,
        "BLOCK": block,
        "RESIDENT": block >= pixels,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return sizes, warps


def kernel_for(
    channels: int, groups: int, pixels: int, dtype: torch.dtype, channels_last: bool, *, scaled: bool, backward: bool
) -> tuple[Any, dict[str, Any], int]:
    """(kernel, what is constant in it for this shape, warps)."""
    by_lanes = lane_sizes(channels, groups, pixels, dtype) if channels_last else None
    if by_lanes is not None:
        return group_norm_silu_lanes_backward_kernel if backward else group_norm_silu_lanes_kernel, *by_lanes
    sizes = block_sizes(channels, groups, pixels, dtype, channels_last, scaled=scaled, backward=backward)
    return group_norm_silu_backward_kernel if backward else group_norm_silu_kernel, *sizes


@lru_cache(maxsize=4096)
def _launch(
    backward: bool,
    shape: tuple[int, ...],
    last: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    groups: int,
    per_channel: tuple[int, int],
    batch_stride: int,
    scaled: bool,
    added: bool,
    activation: bool,
    eps: float,
    more: bool = False,
    factor: float = 1.0,
) -> Launch:
    """The launch for a dense x of this shape and format; its kernel is another for each device and for other dtypes."""
    batch, channels, height, width = shape
    pixels = height * width
    kernel, sizes, warps = kernel_for(channels, groups, pixels, dtypes[0], last, scaled=scaled, backward=backward)
    values = {
        **dense_layout(channels, pixels, last),
        "s_pb": per_channel[0],
        "s_pc": per_channel[1],
        "s_ab": batch_stride,
        "EPS": eps,
        "SCALED": scaled,
        "ADDED": added,
        "MORE": more,
        "FACTOR": factor,
        "SILU": activation,
        **sizes,
    }
    return Launch(kernel, (batch * (groups // sizes["GROUPS"]),), warps, values)


def _per_channel(scale: Tensor | None, shift: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(scale, shift, (stride of the batch, stride of a channel)) as the kernels take them."""
    if scale is None or shift is None:
        return weight, weight, (0, 0)
    if scale.stride() != shift.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    return scale, shift, (scale.stride(0) if len(scale) > 1 else 0, scale.stride(1))


def _numbers(x: Tensor, *sizes: int) -> Tensor:
    """An empty tensor of these sizes, in the dtype that is computed in."""
    return x.new_empty(sizes, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    activation: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mean and 1/√(var + eps) of each group (B, groups, 2)); x is dense, and a row of the addend."""
    y = torch.empty_like(x)
    shape, device = x.shape, x.device
    statistics = _numbers(x, shape[0], groups, 2)
    if x.numel():
        p_scale, p_shift, per_channel = _per_channel(scale, shift, weight)
        p_addend = weight if addend is None else addend
        dtypes = x.dtype, weight.dtype, bias.dtype, p_scale.dtype, p_shift.dtype, p_addend.dtype
        # The strides of sides of one pixel say nothing.
        launch = _launch(
            False, shape, not x.is_contiguous(), device, dtypes, groups, per_channel,
            _batch_stride(addend), scale is not None, addend is not None, activation, eps,
        )  # fmt: skip
        launch(device, x, weight, bias, p_scale, p_shift, p_addend, y, statistics)
    return y, statistics


def _launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: bool,
    addend: Tensor | None = None,
    more: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """((∂L/∂x + more)·factor, [Σ ∂L/∂u, Σ n ∂L/∂u, with an addend Σ ∂L/∂x]), sums (2 or 3, B, C) over the pixels."""
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    if more is not None and more.stride() != x.stride():
        more = torch.empty_like(x).copy_(more)
    dx = torch.empty_like(x)
    shape, device = x.shape, x.device
    sums = _numbers(x, 2 if addend is None else 3, shape[0], shape[1])
    if x.numel():
        p_scale, p_shift, per_channel = _per_channel(scale, shift, weight)
        p_addend, p_more = weight if addend is None else addend, x if more is None else more
        dtypes = (
            x.dtype, dy.dtype, weight.dtype, bias.dtype, p_scale.dtype, p_shift.dtype, p_addend.dtype, p_more.dtype
        )  # fmt: skip
        launch = _launch(
            True, shape, not x.is_contiguous(), device, dtypes, statistics.shape[1], per_channel,
            _batch_stride(addend), scale is not None, addend is not None, activation, 0.0, more is not None, factor,
        )  # fmt: skip
        launch(device, x, dy, weight, bias, p_scale, p_shift, p_addend, p_more, statistics, dx, sums)
    return dx, sums


def _batch_stride(addend: Tensor | None) -> int:
    return addend.stride(0) if addend is not None and addend.shape[0] > 1 else 0


_forward = operator("group_norm_silu")(_launch_forward)
_backward = operator("group_norm_silu_backward")(_launch_backward)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    activation: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _numbers(x, x.shape[0], groups, 2)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
    activation: bool,
    addend: Tensor | None = None,
    more: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _numbers(x, 2 if addend is None else 3, *x.shape[:2])


# ---------------------------------------------------------------------------------------------- passes, and autograd


# Weight, bias, scale, shift and addend, as the launchers take them.
Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def forward_pass(
    x: Tensor, groups: int, parameters: Parameters, *, eps: float, activation: bool
) -> tuple[Tensor, Tensor]:
    """(y, what `backward_pass` takes of it), by the Triton kernels, without a graph; arguments are valid, x dense."""
    weight, bias, scale, shift, addend = parameters
    run: Callable[..., tuple[Tensor, Tensor]] = _launch_forward if launches_directly(x) else _forward
    return run(x, weight, bias, scale, shift, groups, eps, activation, addend)


def backward_pass(
    dy: Tensor,
    x: Tensor,
    parameters: Parameters,
    statistics: Tensor,
    needed: Sequence[bool],
    activation: bool,
    more: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """(∂L/∂x + more)·factor, and without more or factor the gradients of the `parameters` that are `needed`."""
    weight, bias, scale, shift, addend = parameters
    run: Callable[..., Any] = _launch_backward if launches_directly(x) else _backward
    dx, sums = run(dy, x, weight, bias, scale, shift, statistics, activation, addend, more, factor)
    if not any(needed):
        return dx, None, None, None, None, None
    by_bias, by_weight, *rest = sums.unbind()
    to_weight = to_bias = to_scale = to_shift = to_addend = None
    if needed[0] or needed[1]:
        if scale is None and weight.ndim == 2:
            to_bias, to_weight = _as(by_bias, weight), _as(by_weight, weight)
        else:
            both = sums[:2] if scale is None else sums[:2] * (scale.flatten(1).to(sums.dtype) + 1)
            to_bias, to_weight = (both if weight.ndim == 2 else both.sum(1)).to(weight.dtype).unbind()
    if scale is not None and needed[2]:
        to_scale = (by_weight * weight.to(sums.dtype) + by_bias * bias.to(sums.dtype))[:, :, None, None]
        to_scale = to_scale.sum_to_size(scale.shape).to(scale.dtype)
    if shift is not None and needed[3]:
        to_shift = by_bias[:, :, None, None].sum_to_size(shift.shape).to(shift.dtype)
    if addend is not None and needed[4]:
        (to_addend,) = rest
        to_addend = _as(to_addend if to_addend.shape == addend.shape else to_addend.sum_to_size(addend.shape), addend)
    return dx, to_weight if needed[0] else None, to_bias if needed[1] else None, to_scale, to_shift, to_addend


def _as(x: Tensor, other: Tensor) -> Tensor:
    """x in the dtype of `other`."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    statistics = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    x, weight, bias, scale, shift, _, _, activation, *rest = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, *(rest or [None]), statistics)
    ctx.activation = activation


def _differentiate(
    ctx: Any, dy: Tensor | None, _: None = None, more: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (more, *(None,) * 8)
    x, weight, bias, scale, shift, addend, statistics = ctx.saved_tensors
    needed = ctx.needs_input_grad
    # (An operator knows no argument that is left to its default.)
    asked = (*needed[1:5], addend is not None and needed[8])
    gradients = backward_pass(dy, x, (weight, bias, scale, shift, addend), statistics, asked, ctx.activation, more)
    return (gradients[0] if needed[0] else None, *gradients[1:5], None, None, None, gradients[5])


_forward.register_autograd(_differentiate, setup_context=_save)


class _GroupNormSilu(torch.autograd.Function):
    """The launches without an operator around them, which costs the host more than the launch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        # In one: with a setup_context of its own, PyTorch would bind the arguments anew at every call.
        output = _launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("group_norm_silu has no second derivative: create_graph=True cannot pass through it")
        return _differentiate(ctx, *gradients)


class _Branching(_GroupNormSilu):
    """And x for what else is made of it, whose gradient is added where that of the normalisation is stored."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        run: Callable[..., tuple[Tensor, ...]] = _launch_forward if launches_directly(inputs[0]) else _forward
        output = *run(*inputs), inputs[0].view_as(inputs[0])
        _save(ctx, inputs, output)
        return output


_apply, _apply_branching = applied(_GroupNormSilu), applied(_Branching)


# -------------------------------------------------------------------------------------------------- public function


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """silu(n), or silu(n (scale + 1) + shift), with n the group normalisation [Wu & He 2018] of x, or of x + addend.

    Differentiable once, with respect to every tensor; of the input autograd keeps x alone, beside two numbers a group
    (the reference up to `group_norm_reference.SMALL` elements what PyTorch's operations keep).

    Args:
        x: (B, C, H, W) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else
            is copied. B = 0 is fine.
        groups: number of groups, a divisor of C.
        weight: (C,), of the dtype of x.
        bias: (C,), of the dtype of x.
        scale: (B, C, 1, 1) or (1, C, 1, 1), of the dtype of x; given with shift or not at all.
        shift: (B, C, 1, 1) or (1, C, 1, 1), of the dtype of x.
        addend: (B, C), (1, C) or (C,), of the dtype of x: what each channel has added before it is normalised, such as
            a convolution's bias and the projection of an embedding. Triton adds it in registers.
        eps: added to the variance, > 0.
        activation: False leaves out SiLU.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, C, H, W) in x's dtype and memory format. Triton computes in float32 (float64 for float64) and rounds once:
        mean first, then the mean of squared differences from it; all sums in an order that depends on the shape alone.
        The reference rounds after each of PyTorch's operations, in 16 bits as they do to the bit.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or a scale without a shift.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: forward 2, backward 3 times those of x where a program's groups stay in registers (`group_config`);
    larger groups are read again, partly from cache. One launch each.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from ipfm.kernels import group_norm_silu
        >>> x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> weight, bias = torch.ones(8), torch.zeros(8)
        >>> y = group_norm_silu(x, 4, weight, bias)
        >>> torch.allclose(y, F.silu(F.group_norm(x, 4, weight, bias)), atol=1e-6)
        True
    """
    op = "group_norm_silu"
    _checks.samples(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W); got {tuple(x.shape)}")
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups must be a divisor of the {channels} channels; got {groups!r}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: scale and shift go together; got {'scale' if shift is None else 'shift'} alone")
    for what, vector in (("weight", weight), ("bias", bias)):
        _parameter(op, what, vector, x, ((channels,),))
    for what, factor in (("scale", scale), ("shift", shift)):
        if factor is not None:
            _parameter(op, what, factor, x, ((len(x), channels, 1, 1), (1, channels, 1, 1)))
    if addend is not None:
        _parameter(op, "addend", addend, x, ((len(x), channels), (1, channels), (channels,)))
    eps = _checks.positive(op, "eps", eps)
    return unchecked_group_norm_silu(
        x,
        groups,
        weight,
        bias,
        scale=scale,
        shift=shift,
        addend=addend,
        eps=eps,
        activation=activation,
        triton_runs=use_triton(op, backend, x.device),
    )


def unchecked_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    addend: Tensor | None = None,
    eps: float,
    activation: bool,
    triton_runs: bool,
) -> Tensor:
    """`group_norm_silu` for a layer that knows its arguments to be valid: small tensors would wait for the checks.

    The Triton kernels also take weight and bias as (B, C) with rows that are alike (one is read), in float32 for a
    narrower x. Their gradients then are those of each sample, for the caller to sum.
    """
    if not triton_runs:
        if addend is not None:
            x = x + addend[..., None, None]
        return group_norm_reference.group_norm_silu(
            x, groups, weight, bias, scale=scale, shift=shift, eps=eps, activation=activation
        )
    if scale is not None and shift is not None and scale.shape != shift.shape:
        scale, shift = torch.broadcast_tensors(scale, shift)
    if addend is not None:
        addend = _rows(addend)
    x, weight, bias = _dense(x), _row(weight), _row(bias)
    run: Callable[..., tuple[Tensor, Tensor]] = _forward
    if launches_directly(x):
        run = _apply if torch.is_grad_enabled() else _launch_forward
    return run(x, weight, bias, scale, shift, groups, eps, activation, addend)[0]


def branching_group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, eps: float, activation: bool
) -> tuple[Tensor, Tensor]:
    """(`group_norm_silu` by the Triton kernels, x itself) for x of which something else is made too.

    The gradient of that arrives by the x that is returned, and is added in registers: a pass over three tensors less.
    Arguments are valid.
    """
    x, weight, bias = _dense(x), _row(weight), _row(bias)
    given = (x, weight, bias, None, None, groups, eps, activation, None)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _forward(*given)[0], x
    y, _, same = _apply_branching(*given)
    return y, same


def _row(parameter: Tensor) -> Tensor:
    """A parameter whose row, or each of whose rows, is dense."""
    return parameter if parameter.stride(-1) == 1 else parameter.contiguous()


def _rows(addend: Tensor) -> Tensor:
    """The addend as (B or 1, C), each row dense."""
    addend = addend if addend.ndim == 2 else addend[None]
    return addend if addend.stride(1) == 1 else addend.contiguous()


def _parameter(op: str, what: str, value: object, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    given = _checks.tensor(op, what, value)
    if tuple(given.shape) not in shapes:
        raise ValueError(
            f"{op}: {what} must be {' or '.join(map(str, dict.fromkeys(shapes)))}; got {tuple(given.shape)}"
        )
    _checks.same(op, what, given, "x", x, ("dtype", "device"))
