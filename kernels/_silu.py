"""SiLU and its derivative for kernels, of one exponential and one reciprocal each."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ipfm.kernels._dispatch import INTERPRETED

# The interpreter has no libdevice.
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def quotient(b_a, b_b):
    """a / b for a float32 b of at least 1: one reciprocal and a product, without what would serve other b."""
    if _INTERPRETED or b_b.dtype == tl.float64:
        return b_a / b_b
    else:
        return libdevice.fast_dividef(b_a, b_b)


@triton.jit
def exp_minus(b_u):
    """exp(-u), by the instruction for powers of 2; what is too small for a normal number is 0."""
    return tl.exp2(b_u * tl.full((), -1.4426950408889634, b_u.dtype))


@triton.jit
def silu(b_u):
    """u / (1 + exp(-u))."""
    return quotient(b_u, 1.0 + exp_minus(b_u))


@triton.jit
def silu_slope(b_u):
    """The derivative of silu, σ + u σ (1 - σ) with σ = σ(u), of e = exp(-|u|), from which nothing overflows.

    σ and 1 - σ are r = 1 / (1 + e) and e r, in one order or the other; nothing cancels in either.
    """
    b_e = exp_minus(tl.abs(b_u))
    b_r = quotient(tl.full((), 1.0, b_u.dtype), 1.0 + b_e)
    b_er = b_e * b_r
    return tl.where(b_u < 0, b_er, b_r) + b_u * (b_er * b_r)
