"""mp_silu: SiLU that keeps the size of what it is given, a factor before it and dropout after it, in one pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import _checks, reference
from ipfm.kernels._dispatch import Backend, residual_config, use_triton
from ipfm.kernels._images import channels_last, dense, like, offsets, part
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways
from ipfm.kernels._silu import silu, silu_slope
from ipfm.kernels.philox import philox_words

SILU_SIZE = 0.596
"""Root mean square of silu(z) for a standard normal z [Karras et al. 2024, eq. 81]."""

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _kept(p_seed, i_b, o_hw, C: tl.constexpr, CHANNELS: tl.constexpr, THRESHOLD: tl.constexpr):
    """(CHANNELS, BLOCK): which elements dropout keeps. Four channels of a pixel take the words of a Philox block."""
    blocks: tl.constexpr = (C + 3) // 4
    chunks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    o_q = (tl.program_id(0) % chunks) * (CHANNELS // 4) + tl.arange(0, CHANNELS // 4)[:, None]
    seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    zero = tl.full((), 0, tl.int32)
    w0, w1, w2, w3 = philox_words(i_b, o_hw * blocks + o_q, seed, zero, zero)
    b_words = tl.permute(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (0, 2, 3, 1))
    return tl.reshape(b_words, (CHANNELS, o_hw.shape[1])) >= tl.full((), THRESHOLD, tl.uint32)


@triton.jit
def mp_silu_kernel(
    p_x, p_scale, p_seed, p_y, HW, STEPS, s_scale,
    FACTOR: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr, THRESHOLD: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels, blocks of pixels): y = FACTOR silu(x scale), 0 where dropout drops it."""
    i_b, o_c, first, last = part(HW, STEPS, C, CHANNELS, BLOCK)
    p_x += i_b * HW * C
    p_y += i_b * HW * C
    if SCALED:
        o_scale = i_b * s_scale + o_c
        b_scale = tl.load(p_scale + o_scale, mask=o_c < C, other=0.0, eviction_policy="evict_last").to(COMPUTE)
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        o, m = offsets(o_c, o_hw, HW, C, LAST), (o_c < C) & (o_hw < HW)
        b_u = tl.load(p_x + o, mask=m, other=0.0).to(COMPUTE)
        if SCALED:
            b_u *= b_scale
        b_y = silu(b_u) * tl.full((), FACTOR, COMPUTE)
        if DROPS:
            b_y = tl.where(_kept(p_seed, i_b, o_hw, C, CHANNELS, THRESHOLD), b_y, 0.0)
        tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def mp_silu_backward_kernel(
    p_dy, p_x, p_scale, p_seed, p_dx, p_sums, HW, STEPS, s_scale,
    FACTOR: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr, THRESHOLD: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels, blocks of pixels): dx, and with a scale each channel's sum of its gradient."""
    i_b, o_c, first, last = part(HW, STEPS, C, CHANNELS, BLOCK)
    p_dy += i_b * HW * C
    p_x += i_b * HW * C
    p_dx += i_b * HW * C
    b_sum = tl.zeros((CHANNELS, BLOCK), COMPUTE)
    if SCALED:
        o_scale = i_b * s_scale + o_c
        b_scale = tl.load(p_scale + o_scale, mask=o_c < C, other=0.0, eviction_policy="evict_last").to(COMPUTE)
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        o, m = offsets(o_c, o_hw, HW, C, LAST), (o_c < C) & (o_hw < HW)
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(COMPUTE)
        b_du = tl.load(p_dy + o, mask=m, other=0.0).to(COMPUTE) * tl.full((), FACTOR, COMPUTE)
        if DROPS:
            b_du = tl.where(_kept(p_seed, i_b, o_hw, C, CHANNELS, THRESHOLD), b_du, 0.0)
        if SCALED:
            b_du *= silu_slope(b_x * b_scale)
            b_sum += b_du * b_x
            b_du *= b_scale
        else:
            b_du *= silu_slope(b_x)
        tl.store(p_dx + o, b_du.to(p_dx.dtype.element_ty), mask=m)
    if SCALED:
        o_s = (i_b * tl.num_programs(1) + tl.program_id(1)) * C + o_c
        tl.store(p_sums + o_s, tl.sum(b_sum, axis=1)[:, None], mask=o_c < C)


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(
    channels: int, pixels: int, dtype: torch.dtype, last: bool, *, drops: bool = False
) -> tuple[dict[str, Any], tuple[int, int], int, int]:
    """(what is constant in the kernels for this shape, programs of a sample, blocks of pixels a program, warps).

    With dropout, whose random words wait in registers, half as many elements a thread.
    """
    together, block, steps, warps = residual_config(channels, pixels, last)
    together = max(4, together)
    warps *= 2 if drops else 1
    sizes = {
        "C": channels,
        "CHANNELS": together,
        "BLOCK": block,
        "LAST": last,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return sizes, (triton.cdiv(channels, together), triton.cdiv(pixels, block * steps)), steps, warps


def dropping(dropout: float) -> dict[str, Any]:
    """What is constant in the kernels for this probability."""
    return {
        "FACTOR": 1 / (SILU_SIZE * (1 - dropout)),
        "DROPS": dropout > 0,
        "THRESHOLD": reference.dropout_threshold(dropout),
    }


@lru_cache(maxsize=4096)
def _launch(
    kernel: Any,
    shape: tuple[int, ...],
    last: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    scaled: bool,
    stride: int,
    dropout: float,
) -> Launch:
    """The launch for a dense x of this shape and format."""
    batch, channels, height, width = shape
    sizes, (chunks, splits), steps, warps = block_sizes(channels, height * width, dtypes[0], last, drops=dropout > 0)
    values = {
        "HW": height * width,
        "STEPS": steps,
        "s_scale": stride,
        "SCALED": scaled,
        **dropping(dropout),
        **sizes,
    }
    return Launch(kernel, (batch * chunks, splits), warps, values)


def _launch_forward(x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    """silu(x scale) / 0.596, and dropout; x is dense, and a row of the scale."""
    y = torch.empty_like(x)
    if x.numel():
        p_scale, p_seed = x if scale is None else scale, x if seed is None else seed
        launch = _launch(
            mp_silu_kernel, x.shape, channels_last(x), x.device, (x.dtype, p_scale.dtype, p_seed.dtype),
            scale is not None, _batch_stride(scale), dropout,
        )  # fmt: skip
        launch(x.device, x, p_scale, p_seed, y)
    return y


def _launch_backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """(dx, the sums over parts of each sample (B, parts, C) of the scale's gradient, no parts without one)."""
    dx, sums = _gradients(dy, x, scale, seed, dropout)
    if x.numel():
        p_scale, p_seed = x if scale is None else scale, x if seed is None else seed
        launch = _launch(
            mp_silu_backward_kernel, x.shape, channels_last(x), x.device, (x.dtype, p_scale.dtype, p_seed.dtype),
            scale is not None, _batch_stride(scale), dropout,
        )  # fmt: skip
        launch(x.device, dy, x, p_scale, p_seed, dx, sums)
    return dx, sums


def _batch_stride(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)


def _results(x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    return torch.empty_like(x)


def _gradients(
    dy: Tensor, x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    parts = 0
    if scale is not None:
        # What a compiler takes for any number is one here: but for the batch, sizes choose the blocks.
        channels, height, width = map(int, x.shape[1:])
        parts = block_sizes(channels, height * width, x.dtype, channels_last(x))[1][1]
    sums = x.new_empty((x.shape[0], parts, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), sums


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _plain_forward(x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    u = x if scale is None else x * scale.to(x.dtype)[:, :, None, None]
    # In place: nobody needs silu's result for a gradient.
    return F.silu(u).mul_(1 / SILU_SIZE)


def _plain_backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    if scale is None:
        return silu_gradient(dy, x), x.new_empty((len(x), 0, x.shape[1]))
    columns = scale.to(x.dtype)[:, :, None, None]
    du = silu_gradient(dy, x * columns)
    sums = (du * x).sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return du.mul_(columns), sums[:, None]


def silu_gradient(dy: Tensor, u: Tensor) -> Tensor:
    """dy silu'(u) / 0.596, a new tensor, by PyTorch's operations."""
    scaled = dy * (1 / SILU_SIZE)
    out: Tensor = torch.ops.aten.silu_backward.grad_input(scaled, u, grad_input=scaled)
    return out


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, seed, ctx.dropout = inputs
    ctx.save_for_backward(x, scale, seed)


def _differentiate(ctx: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, seed = ctx.saved_tensors
    dx, sums = backward(like(dy, x), x, scale, seed, ctx.dropout)
    to_scale = None
    if scale is not None and ctx.needs_input_grad[1]:
        to_scale = sums.sum(1).sum_to_size(scale.shape).to(scale.dtype)
    return dx if ctx.needs_input_grad[0] else None, to_scale, None, None


_operation = Operation(
    "mp_silu",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_results, _gradients),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def mp_silu(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """silu(x) / 0.596, or silu(x scale) / 0.596, and dropout: what stands before the convolutions of EDM2's blocks.

    Of an x of size 1 it makes one of size 1 [Karras et al. 2024, eq. 81]. Differentiable once, with respect to x and
    scale; autograd keeps x alone. (In the reference dropout without a seed keeps a truth value of each element.)

    Args:
        x: (B, C, H, W) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else
            is copied. B = 0 is fine.
        scale: (B, C) or (1, C), of the dtype of x or float32.
        dropout: probability with which an element becomes 0, in [0, 1); the others are divided by 1 - dropout.
        seed: of dropout, an integer in [0, 2**63) or a 0-d int64 tensor on x's device: which elements are dropped is a
            function of it and of an element's place (sample, channel, pixel), the same on every backend and in every
            memory format. None: PyTorch's generator of the device draws it, without a wait for the device; on a CPU
            that generator draws the elements themselves.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, C, H, W) in x's dtype and memory format. Triton computes in float32 (float64 for float64) and rounds once.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: forward 2, backward 3 times those of x.

    Example:
        >>> import torch
        >>> from ipfm.kernels import mp_silu
        >>> y = mp_silu(torch.full((1, 2, 1, 1), 2.0), torch.tensor([[1.0, 0.0]]))
        >>> [round(x, 3) for x in y.flatten().tolist()]
        [2.956, 0.0]
    """
    op = "mp_silu"
    _checks.images(op, "x", x)
    if scale is not None:
        given = _checks.tensor(op, "scale", scale)
        if given.ndim != 2 or given.shape[1] != x.shape[1] or given.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{op}: scale must be ({x.shape[0]}, {x.shape[1]}) or (1, {x.shape[1]}); got {tuple(given.shape)}"
            )
        if given.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{op}: scale must be {_checks.name(x.dtype)} or float32; got {_checks.name(given.dtype)}")
        _checks.same(op, "scale", given, "x", x, ("device",))
    dropout = _checks.finite(op, "dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be in [0, 1); got {dropout!r}")
    if seed is not None:
        seed = _checks.seed(op, seed, x)
    return unchecked_mp_silu(x, scale, dropout=dropout, seed=seed, triton_runs=use_triton(op, backend, x.device))


def unchecked_mp_silu(
    x: Tensor, scale: Tensor | None = None, *, dropout: float = 0.0, seed: Tensor | None = None, triton_runs: bool
) -> Tensor:
    """`mp_silu` for a layer that knows its arguments to be valid."""
    x = dense(x)
    if scale is not None and scale.stride(1) != 1:
        scale = scale.contiguous()
    if triton_runs and dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
    drawn = (seed, dropout) if triton_runs and dropout else (None, 0.0)
    y: Tensor = _operation(x, scale, *drawn, triton_runs=triton_runs)
    if triton_runs or not dropout:
        return y
    if seed is None:
        # F.dropout's own on CUDA; elsewhere that one keeps a mask as wide as the activation.
        return torch.native_dropout(y, dropout, True)[0]
    return y * (reference.dropout_mask(x.shape, dropout, seed).to(y.dtype) * (1 / (1 - dropout)))
