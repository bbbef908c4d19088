"""residual_sum: the sum of two branches of a residual block and of a convolution's bias, scaled, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks
from ipfm.kernels._dispatch import Backend, residual_config, use_triton
from ipfm.kernels._images import dense as _dense
from ipfm.kernels._images import like as _like
from ipfm.kernels._images import part
from ipfm.kernels._launch import Launch, dense_layout
from ipfm.kernels._operators import applied, launches_directly, operator

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def residual_sum_kernel(
    p_a, p_b, p_bias, p_y, HW, STEPS, s_b, s_c, s_hw,
    SCALE: tl.constexpr, BIASED: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels, blocks of pixels): y = (a + b + bias) SCALE."""
    i_b, o_c, first, last = part(HW, STEPS, C, CHANNELS, BLOCK)
    if BIASED:
        b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0, eviction_policy="evict_last").to(COMPUTE)
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        o, m = i_b * s_b + o_c * s_c + o_hw * s_hw, (o_c < C) & (o_hw < HW)
        b_sum = tl.load(p_a + o, mask=m, other=0.0).to(COMPUTE) + tl.load(p_b + o, mask=m, other=0.0).to(COMPUTE)
        if BIASED:
            b_sum += b_bias
        tl.store(p_y + o, (b_sum * tl.full((), SCALE, COMPUTE)).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def residual_sum_backward_kernel(
    p_dy, p_d, p_sums, HW, STEPS, s_b, s_c, s_hw, s_gb, s_ghw,
    SCALE: tl.constexpr, BIASED: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels, blocks of pixels): d = dy SCALE, and with a bias each channel's sum of it."""
    i_b, o_c, first, last = part(HW, STEPS, C, CHANNELS, BLOCK)
    b_sum = tl.zeros((CHANNELS, BLOCK), COMPUTE)
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        o, m = i_b * s_b + o_c * s_c + o_hw * s_hw, (o_c < C) & (o_hw < HW)
        o_g = i_b * s_gb + o_c * s_c + o_hw * s_ghw
        b_d = tl.load(p_dy + o_g, mask=m, other=0.0).to(COMPUTE) * tl.full((), SCALE, COMPUTE)
        tl.store(p_d + o, b_d.to(p_d.dtype.element_ty), mask=m)
        if BIASED:
            b_sum += b_d
    if BIASED:
        o_s = (i_b * tl.num_programs(1) + tl.program_id(1)) * C + o_c
        tl.store(p_sums + o_s, tl.sum(b_sum, axis=1)[:, None], mask=o_c < C)


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(
    channels: int, pixels: int, dtype: torch.dtype, channels_last: bool
) -> tuple[dict[str, Any], tuple[int, int], int, int]:
    """(what is constant in the kernels for this shape, programs of a sample, blocks of pixels a program, warps)."""
    together, block, steps, warps = residual_config(channels, pixels, channels_last)
    sizes = {
        "C": channels,
        "CHANNELS": together,
        "BLOCK": block,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return sizes, (triton.cdiv(channels, together), triton.cdiv(pixels, block * steps)), steps, warps


@lru_cache(maxsize=4096)
def _launch(
    backward: bool,
    shape: tuple[int, ...],
    last: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    gradient: tuple[int, int],
    scale: float,
    biased: bool,
) -> Launch:
    """The launch for a dense tensor of this shape and format, and on the way back for strides of the gradient."""
    batch, channels, height, width = shape
    pixels = height * width
    sizes, (chunks, splits), steps, warps = block_sizes(channels, pixels, dtypes[0], last)
    values = {
        **dense_layout(channels, pixels, last),
        "STEPS": steps,
        "s_gb": gradient[0],
        "s_ghw": gradient[1],
        "SCALE": scale,
        "BIASED": biased,
        **sizes,
    }
    kernel = residual_sum_backward_kernel if backward else residual_sum_kernel
    return Launch(kernel, (batch * chunks, splits), warps, values)


def _launch_forward(a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(a + b + bias) scale; a is dense, and b has its layout."""
    y = torch.empty_like(a)
    if a.numel():
        p_bias = a if bias is None else bias
        dtypes = a.dtype, b.dtype, p_bias.dtype
        # The strides of sides of one pixel say nothing.
        last = not a.is_contiguous()
        launch = _launch(False, a.shape, last, a.device, dtypes, (0, 0), scale, bias is not None)
        launch(a.device, a, b, p_bias, y)
    return y


def _launch_backward(dy: Tensor, scale: float, biased: bool) -> tuple[Tensor, Tensor]:
    """(dy scale, the sums of it over parts of each sample (parts, C), no parts without a bias); dy is `_regular`."""
    d, sums = _results(dy, biased)
    if dy.numel():
        strides = dy.stride(0), _pixel_stride(dy)
        launch = _launch(True, d.shape, not d.is_contiguous(), d.device, (dy.dtype,), strides, scale, biased)
        launch(d.device, dy, d, sums)
    return d, sums


def _results(dy: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for what `_launch_backward` gives: the first dense, in the memory format of dy."""
    d = torch.empty_like(dy, memory_format=torch.contiguous_format if _is_contiguous(dy) else torch.channels_last)
    # len() would make a compiler's batch a number.
    parts = 0
    if biased:
        # What a compiler takes for any number is one here: but for the batch, sizes choose the blocks.
        channels, height, width = map(int, dy.shape[1:])
        parts = dy.shape[0] * _splits(channels, height * width, dy.dtype, not d.is_contiguous())
    return d, dy.new_empty((parts, dy.shape[1]), dtype=torch.promote_types(dy.dtype, torch.float32))


@lru_cache(maxsize=4096)
def _splits(channels: int, pixels: int, dtype: torch.dtype, last: bool) -> int:
    """Into how many parts a sample's pixels go."""
    return block_sizes(channels, pixels, dtype, last)[1][1]


def _is_contiguous(x: Tensor) -> bool:
    """Whether each of the samples is contiguous."""
    # (Of a whole that is, or is channels_last, it is known without a view of the first.)
    return x.is_contiguous() or (not x.is_contiguous(memory_format=torch.channels_last) and x[:1].is_contiguous())


def _regular(dy: Tensor) -> Tensor:
    """dy where each sample is contiguous or has its channels side by side and its pixels evenly; else a dense copy.

    The gradient of a part of concatenated channels has gaps between its pixels, or between its samples.
    """
    if _is_contiguous(dy):
        return dy
    even = 1 in dy.shape[2:] or dy.stride(2) == dy.shape[3] * dy.stride(3)
    return dy if even and dy.stride(1) == 1 else _dense(dy)


def _pixel_stride(dy: Tensor) -> int:
    if _is_contiguous(dy):
        return 1
    return dy.stride(3) if dy.shape[3] > 1 else dy.stride(2)


_forward = operator("residual_sum")(_launch_forward)
_backward = operator("residual_sum_backward")(_launch_backward)


@_forward.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(a)


@_backward.register_fake
def _(dy: Tensor, scale: float, biased: bool) -> tuple[Tensor, Tensor]:
    return _results(dy, biased)


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, bias, ctx.scale = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.by_sample = bias is not None and bias.ndim == 2


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    biased = ctx.needs_input_grad[2]
    if torch.is_grad_enabled():
        # A second derivative goes through PyTorch's operations.
        d = dy if ctx.scale == 1 else dy * ctx.scale
        to_bias = d.sum((2, 3) if ctx.by_sample else (0, 2, 3)) if biased else None
    else:
        d, to_bias = backward_pass(dy, ctx.scale, biased, by_sample=ctx.by_sample)
    to_bias = None if to_bias is None else to_bias.to(ctx.bias_dtype)
    needed = ctx.needs_input_grad
    return d if needed[0] else None, d if needed[1] else None, to_bias, None


def forward_pass(a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`residual_sum` by the Triton kernels, without a graph; arguments are valid, a is dense, b laid out as it is."""
    run: Callable[..., Tensor] = _launch_forward if launches_directly(a) else _forward
    return run(a, b, bias, scale)


def backward_pass(dy: Tensor, scale: float, biased: bool, *, by_sample: bool) -> tuple[Tensor, Tensor | None]:
    """(dy scale, which is the gradient of both that are added; that of a bias, by sample (B, C) or (C,))."""
    if scale == 1 and not biased:
        return dy, None
    dy = _regular(dy)
    run: Callable[..., Any] = _launch_backward if launches_directly(dy) else _backward
    d, sums = run(dy, scale, biased)
    return d, _bias_gradient(sums, dy.shape[0] if by_sample else None) if biased else None


def _bias_gradient(sums: Tensor, samples: int | None) -> Tensor:
    """(C,), or (samples, C) where a number of them is given, of the sums over parts of each sample."""
    if samples is None:
        return sums.sum(0)
    return sums if len(sums) == samples else sums.unflatten(0, (samples, -1)).sum(1)


_forward.register_autograd(_differentiate, setup_context=_save)


class _ResidualSum(torch.autograd.Function):
    """The launches without an operator around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


_apply = applied(_ResidualSum)


# -------------------------------------------------------------------------------------------------- public function


def residual_sum(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, backend: Backend = "auto"
) -> Tensor:
    """(a + b + bias)·scale: both branches of a residual block, and the bias of the convolution that closes one.

    Differentiable any number of times, with respect to every tensor; autograd keeps nothing.

    Args:
        a: (B, C, H, W) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else
            is copied. B = 0 is fine.
        b: of the shape and dtype of a; another memory format is copied.
        bias: (C,), of the dtype of a.
        scale: the sum's factor, finite.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, C, H, W) in a's dtype and memory format. Triton computes in float32 (float64 for float64) and rounds once;
        sums are taken in an order that depends on the shape alone. The reference rounds after each of PyTorch's
        operations.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.

    Bytes moved: forward 3 times those of a, backward 2; without scale and bias the gradients are that of the result.

    Example:
        >>> import torch
        >>> from ipfm.kernels import residual_sum
        >>> a, b, bias = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0), torch.tensor([0.0, 1.0, 2.0])
        >>> residual_sum(a, b, bias, scale=0.5)[0, :, 0, 0].tolist()
        [1.5, 2.0, 2.5]
    """
    op = "residual_sum"
    _checks.samples(op, "a", a)
    if a.ndim != 4:
        raise ValueError(f"{op}: a must be (B, C, H, W); got {tuple(a.shape)}")
    _checks.same(op, "b", b, "a", a)
    if bias is not None:
        given = _checks.tensor(op, "bias", bias)
        if given.shape != a.shape[1:2]:
            raise ValueError(f"{op}: bias must be ({a.shape[1]},); got {tuple(given.shape)}")
        _checks.same(op, "bias", given, "a", a, ("dtype", "device"))
    scale = _checks.finite(op, "scale", scale)
    return unchecked_residual_sum(a, b, bias, scale=scale, triton_runs=use_triton(op, backend, a.device))


def unchecked_residual_sum(a: Tensor, b: Tensor, bias: Tensor | None, *, scale: float, triton_runs: bool) -> Tensor:
    """`residual_sum` for a layer that knows its arguments to be valid.

    The Triton kernels also take a bias (B, C) with rows that are alike (one is read), in float32 for a narrower a. Its
    gradient then is that of each sample, for the caller to sum.
    """
    if not triton_runs:
        total = a + b
        if bias is not None:
            total = total.add_(bias[:, None, None])
        # In place: the sum was made here and no gradient needs its value.
        return total if scale == 1 else total.mul_(scale)
    a = _dense(a)
    run: Callable[..., Tensor] = _forward
    if launches_directly(a):
        run = _apply if torch.is_grad_enabled() else _launch_forward
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    return run(a, _like(b, a), bias, scale)
