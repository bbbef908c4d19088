"""mp_cat_silu: a concatenation that balances its parts, and SiLU of it, in one pass each way."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import _checks
from ipfm.kernels._dispatch import Backend, residual_config, use_triton
from ipfm.kernels._images import channels_last, dense, like, offsets
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways
from ipfm.kernels._silu import silu, silu_slope
from ipfm.kernels.mp_silu import SILU_SIZE, silu_gradient

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _join(
    p_from, p_joined, p_activated, i_b, i_c, c_joined, first, last, HW,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr, C_ALL: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Channels i_c.. of one part, which are the channels c_joined.. of the concatenation."""
    p_from += i_b * HW * C
    o_c = tl.arange(0, CHANNELS)[:, None]
    dtype = p_joined.dtype.element_ty
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        m = (i_c + o_c < C) & (o_hw < HW)
        b_x = tl.load(p_from + offsets(i_c + o_c, o_hw, HW, C, LAST), mask=m, other=0.0).to(COMPUTE)
        b_x *= tl.full((), WEIGHT, COMPUTE)
        o = offsets(c_joined + o_c, o_hw, HW, C_ALL, LAST)
        tl.store(p_joined + o, b_x.to(dtype), mask=m)
        tl.store(p_activated + o, (silu(b_x) * tl.full((), FACTOR, COMPUTE)).to(dtype), mask=m)


@triton.jit
def mp_cat_silu_kernel(
    p_a, p_b, p_joined, p_activated, HW, STEPS,
    WA: tl.constexpr, WB: tl.constexpr, FACTOR: tl.constexpr, LAST: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels of a or of b, blocks of pixels): joined = [WA a, WB b], FACTOR silu(joined)."""
    chunks_a: tl.constexpr = (CA + CHANNELS - 1) // CHANNELS
    chunks: tl.constexpr = chunks_a + (CB + CHANNELS - 1) // CHANNELS
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % chunks
    first = tl.program_id(1) * STEPS * BLOCK
    last = tl.minimum(first + STEPS * BLOCK, HW)
    p_joined += i_b * HW * (CA + CB)
    p_activated += i_b * HW * (CA + CB)
    if i_chunk < chunks_a:
        i_c = i_chunk * CHANNELS
        _join(
            p_a, p_joined, p_activated, i_b, i_c, i_c, first, last, HW,
            WA, FACTOR, LAST, CA, CA + CB, CHANNELS, BLOCK, COMPUTE,
        )  # fmt: skip
    else:
        i_c = (i_chunk - chunks_a) * CHANNELS
        _join(
            p_b, p_joined, p_activated, i_b, i_c, CA + i_c, first, last, HW,
            WB, FACTOR, LAST, CB, CA + CB, CHANNELS, BLOCK, COMPUTE,
        )  # fmt: skip


@triton.jit
def _part_gradient(
    p_djoined, p_dactivated, p_joined, p_to, i_b, i_c, c_joined, first, last, HW,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, JOINED: tl.constexpr, ACTIVATED: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, C_ALL: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of channels i_c.. of one part."""
    p_to += i_b * HW * C
    o_c = tl.arange(0, CHANNELS)[:, None]
    for i_hw in range(first, last, BLOCK):
        o_hw = i_hw + tl.arange(0, BLOCK)[None, :]
        m = (i_c + o_c < C) & (o_hw < HW)
        o = offsets(c_joined + o_c, o_hw, HW, C_ALL, LAST)
        b_d = tl.zeros((CHANNELS, BLOCK), COMPUTE)
        if ACTIVATED:
            b_x = tl.load(p_joined + o, mask=m, other=0.0).to(COMPUTE)
            b_dy = tl.load(p_dactivated + o, mask=m, other=0.0).to(COMPUTE)
            b_d = b_dy * tl.full((), FACTOR, COMPUTE) * silu_slope(b_x)
        if JOINED:
            b_d += tl.load(p_djoined + o, mask=m, other=0.0).to(COMPUTE)
        b_d *= tl.full((), WEIGHT, COMPUTE)
        tl.store(p_to + offsets(i_c + o_c, o_hw, HW, C, LAST), b_d.to(p_to.dtype.element_ty), mask=m)


@triton.jit
def mp_cat_silu_backward_kernel(
    p_djoined, p_dactivated, p_joined, p_da, p_db, HW, STEPS,
    WA: tl.constexpr, WB: tl.constexpr, FACTOR: tl.constexpr, JOINED: tl.constexpr, ACTIVATED: tl.constexpr,
    LAST: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels of a or of b, blocks of pixels): the gradient of this part."""
    chunks_a: tl.constexpr = (CA + CHANNELS - 1) // CHANNELS
    chunks: tl.constexpr = chunks_a + (CB + CHANNELS - 1) // CHANNELS
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % chunks
    first = tl.program_id(1) * STEPS * BLOCK
    last = tl.minimum(first + STEPS * BLOCK, HW)
    p_joined += i_b * HW * (CA + CB)
    p_djoined += i_b * HW * (CA + CB)
    p_dactivated += i_b * HW * (CA + CB)
    if i_chunk < chunks_a:
        i_c = i_chunk * CHANNELS
        _part_gradient(
            p_djoined, p_dactivated, p_joined, p_da, i_b, i_c, i_c, first, last, HW,
            WA, FACTOR, JOINED, ACTIVATED, LAST, CA, CA + CB, CHANNELS, BLOCK, COMPUTE,
        )  # fmt: skip
    else:
        i_c = (i_chunk - chunks_a) * CHANNELS
        _part_gradient(
            p_djoined, p_dactivated, p_joined, p_db, i_b, i_c, CA + i_c, first, last, HW,
            WB, FACTOR, JOINED, ACTIVATED, LAST, CB, CA + CB, CHANNELS, BLOCK, COMPUTE,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(
    channels: tuple[int, int], pixels: int, dtype: torch.dtype, last: bool
) -> tuple[dict[str, Any], tuple[int, int], int, int]:
    """(what is constant in the kernels for this shape, programs of a sample, blocks of pixels a program, warps).

    A program's channels divide those of both parts where a power of two does, so that no lane is idle.
    """
    common = math.gcd(*channels)
    together, block, steps, warps = residual_config(common if common % 8 == 0 else max(channels), pixels, last)
    sizes = {
        "FACTOR": 1 / SILU_SIZE,
        "LAST": last,
        "CA": channels[0],
        "CB": channels[1],
        "CHANNELS": together,
        "BLOCK": block,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    chunks = sum(triton.cdiv(c, together) for c in channels)
    return sizes, (chunks, triton.cdiv(pixels, block * steps)), steps, warps


@lru_cache(maxsize=4096)
def _launch(
    kernel: Any,
    shape: tuple[int, ...],
    channels: tuple[int, int],
    last: bool,
    device: torch.device,
    dtype: torch.dtype,
    weights: tuple[float, float],
    given: tuple[bool, bool] = (True, True),
) -> Launch:
    """The launch for a dense concatenation of this shape and format."""
    batch, _, height, width = shape
    sizes, (chunks, splits), steps, warps = block_sizes(channels, height * width, dtype, last)
    values = {
        "HW": height * width,
        "STEPS": steps,
        "WA": weights[0],
        "WB": weights[1],
        "JOINED": given[0],
        "ACTIVATED": given[1],
        **sizes,
    }
    return Launch(kernel, (batch * chunks, splits), warps, values)


def _launch_forward(a: Tensor, b: Tensor, wa: float, wb: float) -> tuple[Tensor, Tensor]:
    """([wa a, wb b], silu of it / 0.596); a and b are dense, in one format."""
    joined, activated = _results(a, b, wa, wb)
    if joined.numel():
        launch = _launch(
            mp_cat_silu_kernel, joined.shape, (a.shape[1], b.shape[1]), _last(a, b), a.device, a.dtype, (wa, wb)
        )
        launch(a.device, a, b, joined, activated)
    return joined, activated


def _launch_backward(
    joined: Tensor, djoined: Tensor | None, dactivated: Tensor | None, wa: float, wb: float, width: int
) -> tuple[Tensor, Tensor]:
    """(da, db), of which a has the channels before `width`; all are dense and alike."""
    da, db = _gradients(joined, djoined, dactivated, wa, wb, width)
    if joined.numel():
        launch = _launch(
            mp_cat_silu_backward_kernel, joined.shape, (width, joined.shape[1] - width), channels_last(joined),
            joined.device, joined.dtype, (wa, wb), (djoined is not None, dactivated is not None),
        )  # fmt: skip
        given = (joined if d is None else d for d in (djoined, dactivated))
        launch(joined.device, *given, joined, da, db)
    return da, db


def _last(a: Tensor, b: Tensor) -> bool:
    """Whether the concatenation is to be in channels_last; parts of one channel fit either format."""
    return channels_last(a) or channels_last(b)


def _results(a: Tensor, b: Tensor, wa: float, wb: float) -> tuple[Tensor, Tensor]:
    return _joint(a, b), _joint(a, b)


def _joint(a: Tensor, b: Tensor) -> Tensor:
    batch, channels, height, width = a.shape
    format_ = torch.channels_last if _last(a, b) else torch.contiguous_format
    shape = (batch, channels + b.shape[1], height, width)
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=format_)


def _gradients(
    joined: Tensor, djoined: Tensor | None, dactivated: Tensor | None, wa: float, wb: float, width: int
) -> tuple[Tensor, Tensor]:
    format_ = torch.channels_last if channels_last(joined) else torch.contiguous_format
    batch, channels, *sides = joined.shape
    da, db = (
        torch.empty((batch, part, *sides), dtype=joined.dtype, device=joined.device, memory_format=format_)
        for part in (width, channels - width)
    )
    return da, db


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _plain_forward(a: Tensor, b: Tensor, wa: float, wb: float) -> tuple[Tensor, Tensor]:
    joined = torch.cat([a * wa, b * wb], dim=1)
    return joined, F.silu(joined).mul_(1 / SILU_SIZE)


def _plain_backward(
    joined: Tensor, djoined: Tensor | None, dactivated: Tensor | None, wa: float, wb: float, width: int
) -> tuple[Tensor, Tensor]:
    d = djoined
    if dactivated is not None:
        d = silu_gradient(dactivated, joined)
        d = d if djoined is None else d.add_(djoined)
    assert d is not None
    return d[:, :width] * wa, d[:, width:] * wb


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, ctx.wa, ctx.wb = inputs
    ctx.width = a.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0])


def _differentiate(ctx: Any, backward: Any, djoined: Tensor | None, dactivated: Tensor | None) -> tuple[Any, ...]:
    if djoined is None and dactivated is None:
        return (None,) * 4
    (joined,) = ctx.saved_tensors
    given = (None if d is None else like(d, joined) for d in (djoined, dactivated))
    da, db = backward(joined, *given, ctx.wa, ctx.wb, ctx.width)
    return da if ctx.needs_input_grad[0] else None, db if ctx.needs_input_grad[1] else None, None, None


_operation = Operation(
    "mp_cat_silu",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_results, _gradients),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def mp_cat_silu(a: Tensor, b: Tensor, t: float = 0.5, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """(z, silu(z) / 0.596) with z = [wa a, wb b], a and b side by side so that each counts by its weight.

    wa = c (1 - t) / √Ca and wb = c t / √Cb with c = √((Ca + Cb) / ((1 - t)² + t²)) [Karras et al. 2024, eq. 103].
    Both results are what a decoder's block needs. Differentiable once; autograd keeps z alone, which a convolution that
    is trained keeps too.

    Args:
        a: (B, Ca, H, W) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else
            is copied. B = 0 is fine.
        b: (B, Cb, H, W), of the dtype of a; another memory format is copied.
        t: weight of b, in [0, 1].
        backend: "auto", "triton" or "reference".

    Returns:
        Two (B, Ca + Cb, H, W) in a's dtype and memory format. Triton computes in float32 (float64 for float64) and
        rounds each result once.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: forward 3, backward 4 times those of z.

    Example:
        >>> import torch
        >>> from ipfm.kernels import mp_cat_silu
        >>> joined, activated = mp_cat_silu(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0))
        >>> [[round(x, 3) for x in t.flatten().tolist()] for t in (joined, activated)]
        [[1.0, 2.0], [1.227, 2.956]]
    """
    op = "mp_cat_silu"
    _checks.images(op, "a", a)
    _checks.images(op, "b", b)
    if (a.shape[0], *a.shape[2:]) != (b.shape[0], *b.shape[2:]):
        batch, _, height, width = a.shape
        raise ValueError(f"{op}: b must be ({batch}, C, {height}, {width}); got {tuple(b.shape)}")
    _checks.same(op, "b", b, "a", a, ("dtype", "device"))
    t = _checks.share(op, "t", t)
    return unchecked_mp_cat_silu(a, b, t, triton_runs=use_triton(op, backend, a.device))


def unchecked_mp_cat_silu(a: Tensor, b: Tensor, t: float, *, triton_runs: bool) -> tuple[Tensor, Tensor]:
    """`mp_cat_silu` for a layer that knows its arguments to be valid."""
    wide, narrow = a.shape[1], b.shape[1]
    c = math.sqrt(wide + narrow) / math.hypot(1 - t, t)
    a = dense(a)
    if channels_last(a):
        b = b.contiguous(memory_format=torch.channels_last)
    elif channels_last(b := dense(b)):
        fits = a.is_contiguous(memory_format=torch.channels_last)
        a, b = (a, b) if fits else (a, b.contiguous())
    weights = (c * (1 - t) / math.sqrt(wide), c * t / math.sqrt(narrow))
    joined, activated = _operation(a, b, *weights, triton_runs=triton_runs)
    return joined, activated
