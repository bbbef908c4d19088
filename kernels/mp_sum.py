"""mp_sum: a sum of two branches that keeps their size, cut to a range, in one pass each way."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks
from ipfm.kernels._dispatch import Backend, flat_config, use_triton
from ipfm.kernels._images import channels_last, dense, like, memory
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def mp_sum_kernel(
    p_a, p_b, p_y, p_inside, N,
    WA: tl.constexpr, WB: tl.constexpr, CLIP: tl.constexpr, CLIPPED: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements, y = WA a + WB b cut to [-CLIP, CLIP], and a bit for each that lay inside."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < N - first
    b_a = tl.load(p_a + first + o, mask=m, other=0.0).to(COMPUTE)
    b_b = tl.load(p_b + first + o, mask=m, other=0.0).to(COMPUTE)
    b_sum = b_a * tl.full((), WA, COMPUTE) + b_b * tl.full((), WB, COMPUTE)
    if CLIPPED:
        clip = tl.full((), CLIP, COMPUTE)
        if KEPT:
            o_8 = tl.arange(0, BLOCK // 8)
            b_bits = tl.reshape((tl.abs(b_sum) <= clip).to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
            tl.store(p_inside + first // 8 + o_8, tl.sum(b_bits, axis=1).to(tl.uint8), mask=8 * o_8 < N - first)
        # Comparisons let a NaN through.
        b_sum = tl.where(b_sum > clip, clip, tl.where(b_sum < -clip, -clip, b_sum))
    tl.store(p_y + first + o, b_sum.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def mp_sum_backward_kernel(
    p_dy, p_inside, p_da, p_db, N,
    WA: tl.constexpr, WB: tl.constexpr, CLIPPED: tl.constexpr, TO_A: tl.constexpr, TO_B: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements, da = WA dy and db = WB dy; 0 outside of the range."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < N - first
    b_dy = tl.load(p_dy + first + o, mask=m, other=0.0).to(COMPUTE)
    if CLIPPED:
        o_8 = tl.arange(0, BLOCK // 8)
        b_bytes = tl.load(p_inside + first // 8 + o_8, mask=8 * o_8 < N - first, other=0, eviction_policy="evict_last")
        b_bits = (b_bytes.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
        b_dy = tl.where(tl.reshape(b_bits, (BLOCK,)) != 0, b_dy, 0.0)
    if TO_A:
        tl.store(p_da + first + o, (b_dy * tl.full((), WA, COMPUTE)).to(p_da.dtype.element_ty), mask=m)
    if TO_B:
        tl.store(p_db + first + o, (b_dy * tl.full((), WB, COMPUTE)).to(p_db.dtype.element_ty), mask=m)


# -------------------------------------------------------------------------------------------------------- launchers


@lru_cache(maxsize=4096)
def _launch(kernel: Any, elements: int, device: torch.device, dtype: torch.dtype, **constants: Any) -> Launch:
    """The launch for so many elements; a kernel is another for each device and dtype."""
    block, warps = flat_config()
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    values = {"N": elements, "BLOCK": block, "COMPUTE": compute, **constants}
    return Launch(kernel, (triton.cdiv(elements, block),), warps, values)


def _bits(x: Tensor, kept: bool) -> Tensor:
    """An empty tensor for a bit of each element."""
    return x.new_empty((x.numel() + 7) // 8 if kept else 0, dtype=torch.uint8)


def _launch_forward(a: Tensor, b: Tensor, wa: float, wb: float, clip: float, kept: bool) -> tuple[Tensor, Tensor]:
    """(wa a + wb b cut to [-clip, clip], a bit of each element, or none if not `kept`); a and b are dense and alike."""
    y, inside = torch.empty_like(a), _bits(a, kept)
    if a.numel():
        launch = _launch(
            mp_sum_kernel, a.numel(), a.device, a.dtype, WA=wa, WB=wb, CLIP=clip, CLIPPED=clip < math.inf, KEPT=kept
        )
        launch(a.device, a, b, y, inside if kept else a)
    return y, inside


def _launch_backward(dy: Tensor, inside: Tensor, wa: float, wb: float, to_a: bool, to_b: bool) -> tuple[Tensor, Tensor]:
    """(wa dy, wb dy), 0 where a bit is; no elements for what is not asked for. dy is dense."""
    da, db = _gradients(dy, inside, wa, wb, to_a, to_b)
    if dy.numel() and (to_a or to_b):
        launch = _launch(
            mp_sum_backward_kernel, dy.numel(), dy.device, dy.dtype, WA=wa, WB=wb, CLIPPED=inside.numel() > 0,
            TO_A=to_a, TO_B=to_b,
        )  # fmt: skip
        launch(dy.device, dy, inside if inside.numel() else dy, da if to_a else dy, db if to_b else dy)
    return da, db


def _results(a: Tensor, b: Tensor, wa: float, wb: float, clip: float, kept: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), _bits(a, kept)


def _gradients(dy: Tensor, inside: Tensor, wa: float, wb: float, to_a: bool, to_b: bool) -> tuple[Tensor, Tensor]:
    da, db = (torch.empty_like(dy) if to else dy.new_empty(0) for to in (to_a, to_b))
    return da, db


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _plain_forward(a: Tensor, b: Tensor, wa: float, wb: float, clip: float, kept: bool) -> tuple[Tensor, Tensor]:
    total = torch.add(a * wa, b, alpha=wb)
    if clip == math.inf:
        return total, _bits(a, False)
    if torch.is_grad_enabled():
        return total.clamp(-clip, clip), _bits(a, False)
    inside = _packed(memory(total.abs() <= clip)) if kept else _bits(a, False)
    return total.clamp_(-clip, clip), inside


def _plain_backward(dy: Tensor, inside: Tensor, wa: float, wb: float, to_a: bool, to_b: bool) -> tuple[Tensor, Tensor]:
    if inside.numel():
        dy = torch.where(_unpacked(inside, dy), dy, 0)
    return dy * wa if to_a else dy, dy * wb if to_b else dy


def _packed(bits: Tensor) -> Tensor:
    """A vector of truth values, eight a byte, the first in the lowest bit."""
    missing = -len(bits) % 8
    if missing:
        bits = torch.cat([bits, bits.new_ones(missing)])
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(torch.uint8).view(-1, 8) << places).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """The truth values in the shape and layout of `like`, which is dense."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> places & 1).view(torch.bool).flatten()
    return bits.as_strided(like.shape, like.stride())


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, ctx.wa, ctx.wb, _, _ = inputs
    # The bits are in the order of the memory.
    ctx.format = torch.channels_last if channels_last(a) else torch.contiguous_format
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, backward: Any, dy: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    (inside,) = ctx.saved_tensors
    to_a, to_b = ctx.needs_input_grad[:2]
    da, db = backward(dy.contiguous(memory_format=ctx.format), inside, ctx.wa, ctx.wb, to_a, to_b)
    return da if to_a else None, db if to_b else None, None, None, None, None


_operation = Operation(
    "mp_sum",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_results, _gradients),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def mp_sum(a: Tensor, b: Tensor, t: float, *, clip: float | None = None, backend: Backend = "auto") -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²), cut to [-clip, clip]: the end of a residual block.

    Of two uncorrelated branches of size 1 it makes a sum of size 1 [Karras et al. 2024, eq. 88]. Differentiable once;
    the gradient is 1 inside the range and at its ends, 0 outside. Autograd keeps a bit an element, and nothing without
    `clip`.

    Args:
        a: (B, ...) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else is
            copied. B = 0 is fine.
        b: of the shape and dtype of a; another memory format is copied.
        t: weight of b, in [0, 1].
        clip: end of the range, > 0; None: there is none.
        backend: "auto", "triton" or "reference".

    Returns:
        Of the shape, dtype and memory format of a. A NaN stays one. Triton computes in float32 (float64 for float64)
        and rounds once.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: 3 times those of a each way, and a bit of each element.

    Example:
        >>> import torch
        >>> from ipfm.kernels import mp_sum
        >>> y = mp_sum(torch.tensor([[3.0, 400.0]]), torch.tensor([[4.0, 0.0]]), 0.5, clip=256.0)
        >>> [round(x, 3) for x in y.flatten().tolist()]
        [4.95, 256.0]
    """
    op = "mp_sum"
    _checks.samples(op, "a", a)
    _checks.same(op, "b", b, "a", a)
    t = _checks.share(op, "t", t)
    clip = math.inf if clip is None else _checks.positive(op, "clip", clip, infinite=True)
    return unchecked_mp_sum(a, b, t, clip=clip, triton_runs=use_triton(op, backend, a.device))


def unchecked_mp_sum(a: Tensor, b: Tensor, t: float, *, clip: float, triton_runs: bool) -> Tensor:
    """`mp_sum` for a layer that knows its arguments to be valid; `clip` is inf where there is no range."""
    size = math.hypot(1 - t, t)
    kept = clip < math.inf and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    a = dense(a)
    y: Tensor = _operation(a, like(b, a), (1 - t) / size, t / size, clip, kept, triton_runs=triton_runs)[0]
    return y
