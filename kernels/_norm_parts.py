"""What all kernels of the group normalisation do with a channel, and with an element, on either way."""

from __future__ import annotations

import triton
import triton.language as tl

from ipfm.kernels._silu import silu, silu_slope


@triton.jit
def channel_parameters(
    p_weight, p_bias, p_scale, p_shift, i_b, o_c, m_c, s_pb, s_pc, SCALED: tl.constexpr, COMPUTE: tl.constexpr
):
    """v and c of the channels o_c, of which v n + c = (weight n + bias)(1 + scale) + shift; 0 where masked.

    One after the other: many warps have few registers for what is held at a time.
    """
    b_c = tl.load(p_bias + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE)
    if SCALED:
        o_p = i_b * s_pb + o_c * s_pc
        b_scale = 1.0 + tl.load(p_scale + o_p, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE)
        b_c = b_c * b_scale + tl.load(p_shift + o_p, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE)
        b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE)
        return b_w * b_scale, b_c
    else:
        return tl.load(p_weight + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE), b_c


@triton.jit
def channel_addend(p_addend, i_b, o_c, m_c, s_ab, ADDED: tl.constexpr, COMPUTE: tl.constexpr):
    """What is added to the channels o_c; 0 where there is nothing."""
    if ADDED:
        return tl.load(p_addend + i_b * s_ab + o_c, mask=m_c, other=0.0, eviction_policy="evict_last").to(COMPUTE)
    else:
        return tl.zeros(o_c.shape, COMPUTE)


@triton.jit
def with_addend(p_x, o, m, b_a, ADDED: tl.constexpr, COMPUTE: tl.constexpr):
    """What is normalised: x, and the channel's addend if there is one."""
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(COMPUTE)
    if ADDED:
        b_x += b_a
    return b_x


@triton.jit
def activated(b_u, SILU: tl.constexpr):
    if SILU:
        return silu(b_u)
    else:
        return b_u


@triton.jit
def through_silu(
    p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr
):
    """(n, ∂L/∂u) with n = (x - mean)·rstd and u = v n + c; where masked the latter is 0, and so are its products."""
    b_n = (with_addend(p_x, o, m, b_a, ADDED, COMPUTE) - mean) * rstd
    b_du = tl.load(p_dy + o, mask=m, other=0.0).to(COMPUTE)
    if SILU:
        b_du *= silu_slope(b_n * b_v + b_c)
    return b_n, b_du


@triton.jit
def with_more(b_dx, p_more, o, m, MORE: tl.constexpr, FACTOR: tl.constexpr, COMPUTE: tl.constexpr):
    if MORE:
        b_dx += tl.load(p_more + o, mask=m, other=0.0).to(COMPUTE)
    if FACTOR != 1.0:
        b_dx *= tl.full((), FACTOR, COMPUTE)
    return b_dx
