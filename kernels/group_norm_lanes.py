"""The kernels of `group_norm_silu` in channels_last for numbers of channels a group that no power of two divides."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ipfm.kernels._dispatch import lane_config
from ipfm.kernels._norm_parts import activated, channel_addend, channel_parameters, through_silu, with_addend, with_more


@triton.jit
def _lanes(WIDTH: tl.constexpr, LANES: tl.constexpr):
    """(pixel, channel, mask) of each lane, which hold as many whole pixels of WIDTH channels as fit."""
    o = tl.arange(0, LANES)
    return o // WIDTH, o % WIDTH, o < LANES // WIDTH * WIDTH


@triton.jit
def _channel_sums(b_v, WIDTH: tl.constexpr, PIXELS: tl.constexpr, PP: tl.constexpr, WP: tl.constexpr):
    """(LANES,) -> (WP,): the sums over the pixels, of WIDTH channels."""
    o_p, o_c = tl.arange(0, PP)[:, None], tl.arange(0, WP)[None, :]
    m = (o_p < PIXELS) & (o_c < WIDTH)
    b_lanes = tl.reshape(tl.where(m, o_p * WIDTH + o_c, 0), (PP * WP,))
    return tl.sum(tl.where(m, tl.reshape(tl.gather(b_v, b_lanes, 0), (PP, WP)), 0.0), axis=0)


@triton.jit
def _group_sums(b_v, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, CP: tl.constexpr):
    """(WP,) -> (GROUPS,): the sums over the channels of each group."""
    o_c = tl.arange(0, CP)[None, :]
    b_channels = tl.where(o_c < CHANNELS, tl.arange(0, GROUPS)[:, None] * CHANNELS + o_c, 0)
    b_found = tl.reshape(tl.gather(b_v, tl.reshape(b_channels, (GROUPS * CP,)), 0), (GROUPS, CP))
    return tl.sum(tl.where(o_c < CHANNELS, b_found, 0.0), axis=1)


@triton.jit
def _to_lanes(b_v, o_c, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """(GROUPS,) -> (LANES,): each lane's number."""
    if GROUPS == 1:
        return tl.sum(b_v, axis=0)
    else:
        return tl.gather(b_v, o_c // CHANNELS, 0)


@triton.jit
def group_norm_silu_lanes_kernel(
    p_x, p_weight, p_bias, p_scale, p_shift, p_addend, p_y, p_statistics,
    HW, s_b, s_pb, s_pc, s_ab,
    EPS: tl.constexpr, SCALED: tl.constexpr, ADDED: tl.constexpr, SILU: tl.constexpr, GROUPS_ALL: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, PP: tl.constexpr, WP: tl.constexpr,
    CP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`group_norm_silu_kernel` in channels_last for any number of channels a group, without idle lanes for it.

    A lane has one channel in all steps, and each step takes as many whole pixels of the program's channels as fill the
    lanes. Which lane belongs to which group is arithmetic; sums go from lanes to channels and from these to groups.
    """
    parts: tl.constexpr = GROUPS_ALL // GROUPS
    width: tl.constexpr = GROUPS * CHANNELS
    step: tl.constexpr = LANES // width
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    i_g = (tl.program_id(0) % parts) * GROUPS
    p_x += i_b * s_b + i_g * CHANNELS
    p_y += i_b * s_b + i_g * CHANNELS
    count = tl.cast(HW * CHANNELS, COMPUTE)
    o_p, o_c, m_l = _lanes(width, LANES)
    b_a = channel_addend(p_addend, i_b, i_g * CHANNELS + o_c, m_l, s_ab, ADDED, COMPUTE)

    # Load and reduce: each group's mean, and then its variance about that.
    b_sum = tl.zeros((LANES,), COMPUTE)
    for i_hw in range(0, HW, step):
        o, m = (i_hw + o_p) * (GROUPS_ALL * CHANNELS) + o_c, m_l & (i_hw + o_p < HW)
        b_x = with_addend(p_x, o, m, b_a, ADDED, COMPUTE)
        b_sum += tl.where(m, b_x, 0.0) if ADDED else b_x
    b_mean = _group_sums(_channel_sums(b_sum, width, step, PP, WP), CHANNELS, GROUPS, CP) / count
    # (At once: some GPUs' code would have no register left to keep it until the end.)
    o_g = i_b * GROUPS_ALL + i_g + tl.arange(0, GROUPS)
    tl.store(p_statistics + 2 * o_g, b_mean)
    mean = _to_lanes(b_mean, o_c, CHANNELS, GROUPS)
    b_sum = tl.zeros((LANES,), COMPUTE)
    for i_hw in range(0, HW, step):
        o, m = (i_hw + o_p) * (GROUPS_ALL * CHANNELS) + o_c, m_l & (i_hw + o_p < HW)
        b_d = tl.where(m, with_addend(p_x, o, m, b_a, ADDED, COMPUTE) - mean, 0.0)
        b_sum += b_d * b_d
    b_variance = _group_sums(_channel_sums(b_sum, width, step, PP, WP), CHANNELS, GROUPS, CP) / count
    b_rstd = 1.0 / tl.sqrt(b_variance + tl.full((), EPS, COMPUTE))
    tl.store(p_statistics + 2 * o_g + 1, b_rstd)

    # Compute and store: the normalised x, scaled, shifted and through SiLU.
    b_v, b_c = channel_parameters(
        p_weight, p_bias, p_scale, p_shift, i_b, i_g * CHANNELS + o_c, m_l, s_pb, s_pc, SCALED, COMPUTE
    )
    b_v *= _to_lanes(b_rstd, o_c, CHANNELS, GROUPS)
    for i_hw in range(0, HW, step):
        o, m = (i_hw + o_p) * (GROUPS_ALL * CHANNELS) + o_c, m_l & (i_hw + o_p < HW)
        b_u = (with_addend(p_x, o, m, b_a, ADDED, COMPUTE) - mean) * b_v + b_c
        tl.store(p_y + o, activated(b_u, SILU).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def group_norm_silu_lanes_backward_kernel(
    p_x, p_dy, p_weight, p_bias, p_scale, p_shift, p_addend, p_more, p_statistics, p_dx, p_sums,
    HW, s_b, s_pb, s_pc, s_ab,
    SCALED: tl.constexpr, ADDED: tl.constexpr, MORE: tl.constexpr, FACTOR: tl.constexpr, SILU: tl.constexpr,
    GROUPS_ALL: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, PP: tl.constexpr,
    WP: tl.constexpr, CP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`group_norm_silu_backward_kernel` in channels_last for any number of channels a group."""
    parts: tl.constexpr = GROUPS_ALL // GROUPS
    width: tl.constexpr = GROUPS * CHANNELS
    step: tl.constexpr = LANES // width
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    i_g = (tl.program_id(0) % parts) * GROUPS
    start = i_b * s_b + i_g * CHANNELS
    p_x += start
    p_dy += start
    p_dx += start
    p_more += start
    o_p, o_c, m_l = _lanes(width, LANES)
    o_g = i_b * GROUPS_ALL + i_g + o_c // CHANNELS
    mean = tl.load(p_statistics + 2 * o_g, eviction_policy="evict_last")
    rstd = tl.load(p_statistics + 2 * o_g + 1, eviction_policy="evict_last")
    b_a = channel_addend(p_addend, i_b, i_g * CHANNELS + o_c, m_l, s_ab, ADDED, COMPUTE)
    b_v, b_c = channel_parameters(
        p_weight, p_bias, p_scale, p_shift, i_b, i_g * CHANNELS + o_c, m_l, s_pb, s_pc, SCALED, COMPUTE
    )

    # Load and compute: n, and the gradient of what goes into SiLU.
    b_sum = tl.zeros((LANES,), COMPUTE)
    b_sum_n = tl.zeros((LANES,), COMPUTE)
    for i_hw in range(0, HW, step):
        o, m = (i_hw + o_p) * (GROUPS_ALL * CHANNELS) + o_c, m_l & (i_hw + o_p < HW)
        b_n, b_du = through_silu(p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED, SILU, COMPUTE)
        b_sum += b_du
        b_sum_n += b_du * b_n

    # Reduce: the channels' sums, which the parameters' gradients need too, and the groups' means.
    b_channels = _channel_sums(b_sum, width, step, PP, WP)
    b_channels_n = _channel_sums(b_sum_n, width, step, PP, WP)
    o_w = tl.arange(0, WP)
    o_s = i_b * (GROUPS_ALL * CHANNELS) + i_g * CHANNELS + o_w
    all_channels = (tl.num_programs(0) // parts).to(tl.int64) * (GROUPS_ALL * CHANNELS)
    tl.store(p_sums + o_s, b_channels, mask=o_w < width)
    tl.store(p_sums + all_channels + o_s, b_channels_n, mask=o_w < width)
    b_vw, _ = channel_parameters(
        p_weight, p_bias, p_scale, p_shift, i_b, i_g * CHANNELS + o_w, o_w < width, s_pb, s_pc, SCALED, COMPUTE
    )
    count = tl.cast(HW * CHANNELS, COMPUTE)
    mean_v = _to_lanes(_group_sums(b_channels * b_vw, CHANNELS, GROUPS, CP) / count, o_c, CHANNELS, GROUPS)
    mean_vn = _to_lanes(_group_sums(b_channels_n * b_vw, CHANNELS, GROUPS, CP) / count, o_c, CHANNELS, GROUPS)

    # Store: ∂L/∂x, and the sums of it.
    b_sum = tl.zeros((LANES,), COMPUTE)
    for i_hw in range(0, HW, step):
        o, m = (i_hw + o_p) * (GROUPS_ALL * CHANNELS) + o_c, m_l & (i_hw + o_p < HW)
        b_n, b_du = through_silu(p_x, p_dy, o, m, b_a, mean, rstd, b_v, b_c, ADDED, SILU, COMPUTE)
        b_dx = rstd * (b_du * b_v - mean_v - b_n * mean_vn)
        tl.store(p_dx + o, with_more(b_dx, p_more, o, m, MORE, FACTOR, COMPUTE).to(p_dx.dtype.element_ty), mask=m)
        if ADDED:
            b_sum += tl.where(m, b_dx, 0.0)
    if ADDED:
        tl.store(p_sums + 2 * all_channels + o_s, _channel_sums(b_sum, width, step, PP, WP), mask=o_w < width)


def lane_sizes(channels: int, groups: int, pixels: int, dtype: torch.dtype) -> tuple[dict[str, Any], int] | None:
    """(what is constant in the kernels that take channels_last by lanes, warps); None where tiles serve as well."""
    config = lane_config(channels // groups, groups, pixels, dtype.itemsize)
    if config is None:
        return None
    together, lanes, warps = config
    width = together * (channels // groups)
    sizes = {
        "GROUPS_ALL": groups,
        "CHANNELS": channels // groups,
        "GROUPS": together,
        "LANES": lanes,
        "PP": triton.next_power_of_2(lanes // width),
        "WP": triton.next_power_of_2(width),
        "CP": triton.next_power_of_2(channels // groups),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return sizes, warps
