"""The Triton kernels of AdamEMA's step. They find the tensors of a whole network through a table of addresses.

    p_table   (rows, WIDTH) int64: elements, addresses of weights, v, m and the averages; a row is a tensor or a piece
    p_grads   (rows,) int64: addresses of the gradients, which may lie elsewhere in each step
    p_blocks  (programs, 2) int32: the row a program works on, and which SEGMENT elements of it
    p_found   (2,) float64: whether a square is not finite, 1 or 0 (or how many shards found one), and their sum
    p_numbers (8,) float64 of a parameter group: what its update needs, as below

Tables and numbers ask to stay in the cache, since every program reads them. ALIGNED promises addresses that 16 divides
and whole 16-byte vectors: accesses are 128 bits wide then.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of p_table after the number of elements; further averages follow.
WEIGHT, SECOND, FIRST, AVERAGE = (tl.constexpr(i) for i in range(1, 5))
# Where the numbers of a step stand in p_numbers, float64; shares of further averages follow. CORRECTION is that of √v,
# but for Rectified Adam, where it is 1 in a rectified step and 0 in one without a denominator.
APPLIED, FACTOR, RATE, CORRECTION, SHARE = (tl.constexpr(i) for i in range(5))


@triton.jit
def _stretch(
    p_blocks, p_table, first_program,
    WIDTH: tl.constexpr, SEGMENT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(row, first element, number of elements) of this program."""
    p = p_blocks + 2 * (tl.program_id(0) + first_program).to(tl.int64)
    row = tl.load(p, eviction_policy="evict_last").to(tl.int64)
    first = tl.load(p + 1, eviction_policy="evict_last").to(tl.int64) * SEGMENT
    elements = tl.load(p_table + row * WIDTH, eviction_policy="evict_last")
    count = tl.minimum(elements - first, SEGMENT).to(tl.int32)
    if ALIGNED:
        count = tl.multiple_of(count, 128 // COMPUTE.primitive_bitwidth)
    return row, first, count


@triton.jit
def _pointer(p_address, first, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `first` of the tensor whose address is at `p_address`."""
    p = tl.load(p_address, eviction_policy="evict_last").to(tl.pointer_type(COMPUTE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + first


@triton.jit
def _number(p, COMPUTE: tl.constexpr):
    return tl.load(p, eviction_policy="evict_last").to(COMPUTE)


@triton.jit(do_not_specialize=["first_program"])
def measure_kernel(
    p_blocks, p_table, p_grads, p_scale, p_partials, first_program,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, NORM: tl.constexpr, COMPUTE: tl.constexpr, MAX: tl.constexpr,
    ALIGNED: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program = SEGMENT elements: Σ (scale g)², 0 without NORM; NaN where a square is not finite."""
    row, first, count = _stretch(p_blocks, p_table, first_program, WIDTH, SEGMENT, COMPUTE, ALIGNED)
    o = tl.arange(0, SEGMENT)
    m = o < count
    b_g = tl.load(_pointer(p_grads + row, first, COMPUTE, ALIGNED) + o, mask=m, other=0.0)
    if SCALED:
        b_g = tl.where(m, b_g * _number(p_scale, COMPUTE), 0.0)  # NaN times 0 is NaN
    b_square = b_g * b_g
    overflows = tl.max((b_square <= MAX).to(tl.int32) ^ 1, axis=0)
    total = (tl.sum(b_square, axis=0) if NORM else tl.full((), 0.0, COMPUTE)).to(tl.float64)
    p_partials += first_program + tl.program_id(0)
    tl.store(p_partials, tl.where(overflows != 0, float("nan"), total))


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(p_partials, p_found, programs, MAX: tl.constexpr, BLOCK: tl.constexpr):
    """One program: whether any square is not finite (1 or 0), and the sum of all, which is infinite beyond MAX."""
    o = tl.arange(0, BLOCK)
    b_overflows = tl.full((BLOCK,), 0, tl.int32)
    b_total = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(0, programs, BLOCK):
        # Pairs are loaded whole, for wide accesses: there is room for an even number.
        b_part = tl.load(p_partials + start + o, mask=start + o // 2 * 2 < programs, other=0.0)
        b_part = tl.where(start + o < programs, b_part, 0.0)
        is_nan = b_part != b_part
        b_overflows |= is_nan.to(tl.int32)
        b_total += tl.where(is_nan, 0.0, b_part)
    total = tl.sum(b_total, axis=0)
    tl.store(p_found, tl.max(b_overflows, axis=0).to(tl.float64))
    tl.store(p_found + 1, tl.where(total <= MAX, total, float("inf")))


@triton.jit
def _bias(t, LOG_BETA: tl.constexpr):
    """1 - beta^t."""
    return 1.0 - tl.exp(t * tl.full((), LOG_BETA, tl.float64))


@triton.jit
def _rectification(t, LOG_BETA2: tl.constexpr, RHO: tl.constexpr):
    """As in `adam_reference`; RHO: rho_inf."""
    longest = tl.full((), RHO, tl.float64)
    bias = _bias(t, LOG_BETA2)
    rho = longest - 2.0 * t * (1.0 - bias) / bias
    square = (rho - 4.0) * (rho - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * rho)
    return tl.where(rho > 5.0, tl.sqrt(square * bias), 0.0)


@triton.jit(do_not_specialize=["rate_bits", "decay_bits_0", "decay_bits_1", "decay_bits_2", "decay_bits_3"])
def numbers_kernel(
    p_found, p_steps, p_applied, p_numbers, p_rate, p_decays,
    rate_bits, decay_bits_0, decay_bits_1, decay_bits_2, decay_bits_3,
    RATE_TENSOR: tl.constexpr, DECAY_TENSOR: tl.constexpr, COUNTS: tl.constexpr, LIMIT: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, RHO: tl.constexpr, MOMENT: tl.constexpr,
    AVERAGES: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """One program: what the update of a group needs; COUNTS: and the number of steps applied, for all groups.

    LIMIT: the largest norm, 0 for none. RHO: rho_inf of Rectified Adam, 0 for Adam. A rate, or decays, of *_TENSOR are
    read from the device.
    """
    squares = tl.load(p_found + 1)
    applied = (tl.load(p_found) == 0.0) & (squares <= MAX)  # not NaN either
    t = tl.load(p_steps)
    if COUNTS:
        t += applied.to(tl.float64)
        tl.store(p_steps, t)
        tl.store(p_applied, applied)
    t = tl.maximum(t, 1.0)  # 0 while every step was skipped: nothing is updated then
    tl.store(p_numbers + APPLIED, applied.to(tl.float64))
    factor = tl.full((), 1.0, tl.float64)
    if LIMIT > 0:
        limit = tl.full((), LIMIT, tl.float64)
        factor = limit / tl.maximum(tl.sqrt(squares), limit)
    tl.store(p_numbers + FACTOR, factor)
    rate = tl.load(p_rate) if RATE_TENSOR else rate_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if MOMENT:
        rate = rate / _bias(t, LOG_BETA1)
    if RHO > 0:
        rectification = _rectification(t, LOG_BETA2, RHO)
        rate *= tl.where(rectification > 0.0, rectification, 1.0)
    tl.store(p_numbers + RATE, -rate)
    correction = (rectification > 0.0).to(tl.float64) if RHO > 0 else 1.0 / tl.sqrt(_bias(t, LOG_BETA2))
    tl.store(p_numbers + CORRECTION, correction)
    for i in tl.static_range(AVERAGES):
        if DECAY_TENSOR:
            decay = tl.load(p_decays + i)
        else:
            bits = (decay_bits_0, decay_bits_1, decay_bits_2, decay_bits_3)[i]
            decay = bits.to(tl.int64).to(tl.float64, bitcast=True)
        tl.store(p_numbers + SHARE + i, 1.0 - decay)


@triton.jit
def _move(b_first, b_v, correction, RECTIFIED: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """m / (√v · correction + eps), or m in a step of Rectified Adam whose correction is 0; 0 where that divides by 0.

    Root and quotient are rounded as IEEE 754 has it, also for subnormal numbers; in float64 they are anyway.
    """
    DOUBLE: tl.constexpr = COMPUTE.primitive_bitwidth == 64
    b_root = tl.sqrt(b_v) if DOUBLE else tl.sqrt_rn(b_v)
    if not RECTIFIED:
        b_root *= correction
    if EPS > 0:
        b_root += tl.full((), EPS, COMPUTE)
    if RECTIFIED:
        b_root = tl.where(correction == 0.0, 1.0, b_root)
    b_move = b_first / b_root if DOUBLE else tl.div_rn(b_first, b_root)
    if EPS == 0:
        # Elements that never saw a gradient, or only ones whose squares vanish, stay.
        b_move = tl.where(b_root == 0.0, 0.0, b_move)
    return b_move


@triton.jit(do_not_specialize=["first_program"])
def update_kernel(
    p_blocks, p_table, p_grads, p_scale, p_numbers, first_program,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr, RECTIFIED: tl.constexpr, AVERAGES: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = SEGMENT elements: the step as AdamEMA states it, each number read once and written once.

    A step that is not applied reads and writes no element.
    """
    # The program's stretch of a tensor, and the numbers of the step.
    row, first, count = _stretch(p_blocks, p_table, first_program, WIDTH, SEGMENT, COMPUTE, ALIGNED)
    p_row = p_table + row * WIDTH
    count = tl.where(tl.load(p_numbers + APPLIED, eviction_policy="evict_last") != 0.0, count, 0)
    if ALIGNED:
        count = tl.multiple_of(count, 128 // COMPUTE.primitive_bitwidth)
    rate = tl.load(p_numbers + RATE, eviction_policy="evict_last").to(COMPUTE)
    correction = tl.load(p_numbers + CORRECTION, eviction_policy="evict_last").to(COMPUTE)
    p_g = _pointer(p_grads + row, first, COMPUTE, ALIGNED)
    p_w = _pointer(p_row + WEIGHT, first, COMPUTE, ALIGNED)
    p_v = _pointer(p_row + SECOND, first, COMPUTE, ALIGNED)
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < count
        # Load: all before anything is stored, for the compiler must not move a load across a store.
        b_g = tl.load(p_g + o, mask=m, other=0.0)
        b_w = tl.load(p_w + o, mask=m, other=0.0)
        b_v = tl.load(p_v + o, mask=m, other=0.0)
        averages = ()  # type: tuple
        for i in tl.static_range(AVERAGES):
            p_e = _pointer(p_row + AVERAGE + i, first, COMPUTE, ALIGNED) + o
            averages = averages + ((p_e, tl.load(p_e, mask=m, other=0.0)),)  # noqa: RUF005
        # Compute: g.
        if SCALED:
            b_g *= _number(p_scale, COMPUTE)
        if LIMITED:
            b_g *= _number(p_numbers + FACTOR, COMPUTE)
        if WEIGHT_DECAY > 0:
            b_g += tl.full((), WEIGHT_DECAY, COMPUTE) * b_w
        # Compute and store: m, v, w and the averages, in that order.
        b_first = b_g
        if BETA1 > 0:
            p_m = _pointer(p_row + FIRST, first, COMPUTE, ALIGNED) + o
            b_first = tl.load(p_m, mask=m, other=0.0) * tl.full((), BETA1, COMPUTE)
            b_first += b_g * tl.full((), 1.0 - BETA1, COMPUTE)
            tl.store(p_m, b_first, mask=m)
        b_v = b_v * tl.full((), BETA2, COMPUTE) + tl.full((), 1.0 - BETA2, COMPUTE) * b_g * b_g
        tl.store(p_v + o, b_v, mask=m)
        b_w += _move(b_first, b_v, correction, RECTIFIED, EPS, COMPUTE) * rate
        tl.store(p_w + o, b_w, mask=m)
        for i in tl.static_range(AVERAGES):
            p_e, b_e = averages[i]
            tl.store(p_e, b_e + (b_w - b_e) * _number(p_numbers + SHARE + i, COMPUTE), mask=m)
