"""Counter-based random numbers: Philox4x32-10 as Triton device functions, and uniform, normal and gamma draws.

The counter layout stands in `ipfm.kernels.reference`. A number depends on (seed, stream, step, sample index, element)
alone, so neither the batch's size and order nor the device, the dtype and the number of ranks changes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, reference
from ipfm.kernels._checks import Position
from ipfm.kernels._dispatch import Backend, float64_bits, on_device, signed32, signed64, use_triton
from ipfm.kernels._numpy_philox import blocks_of, words_of
from ipfm.kernels._operators import direct, operator

WORDS, UNIFORM, NORMAL = 0, 1, 2
_BLOCK = 256  # Philox blocks a program

# ----------------------------------------------------------------------------------------------- device functions


@triton.jit
def philox_seed(seed_lo, seed_hi):
    """The 64-bit seed from its two int32 halves."""
    return (seed_hi.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_lo.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def philox_step(step):
    """The step as an int32: the argument itself, or what it points to. A replayed graph reads the latter anew."""
    if step.dtype.is_ptr():
        return tl.load(step).to(tl.int32)
    else:
        return step


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    """One of Philox's rounds on uint32. A full product is one wide multiplication; a high and a low half are two."""
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p1 = c2.to(tl.uint64) * 0xCD9E8D57
    return (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def philox_words(b_index, o_block, seed, step, stream):
    """The four uint32 words of Philox blocks `o_block` (int32 or uint32) of the sample with index `b_index` (int64).

    The counter layout is that of `ipfm.kernels.reference`; the words are those of `tl.philox`.
    """
    c0 = o_block.to(tl.uint32)
    c1 = c0 * 0 + b_index.to(tl.uint32)
    c2 = c0 * 0 + step.to(tl.uint32, bitcast=True)
    c3 = c0 * 0 + (((b_index >> 16) & 0xFFFF0000).to(tl.uint32) | stream.to(tl.uint32, bitcast=True))
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def word_to_uniform(b_word):
    """u = w·2⁻³² + 2⁻³³ in (0, 1], float32."""
    return b_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def minus_two_log(b_u):
    """-2 ln u for float32 or float64 u in [2⁻³³, 1].

    float32: u = m·2^e with m in [√½, √2), then a polynomial in m - 1 with relative error 3e-8. The library's logarithm
    costs twice as much, most of it for arguments that cannot occur here.
    """
    if b_u.dtype == tl.float64:
        return -2.0 * tl.log(b_u)
    else:
        bits = b_u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        p = f * -0.17400875314703323 + 0.28534974433320126
        p = p * f - 0.29829534876711583
        p = p * f + 0.33155169284315084
        p = p * f - 0.39926127677335793
        p = p * f + 0.5000267407644493
        p = p * f - 0.6666782147284825
        p = p * f + 1.0
        p = p * f - 2.0
        return exponent.to(tl.float32) * -1.3862943611198906 + p * f


@triton.jit
def cos_sin_turns(b_u):
    """(cos 2πu, sin 2πu) for float32 or float64 u in [0, 1].

    4u = q + f with an integer q and |f| <= ½, exactly; then polynomials in f² on the quarter turn, within one ulp. The
    library's functions carry a slow path for huge angles, which puts an array into local memory.
    """
    if b_u.dtype == tl.float64:
        quarter = (4.0 * b_u + 0.5).to(tl.int32)
        f = (4.0 * b_u - quarter.to(tl.float64)) * 1.5707963267948966
        z = f * f  # Taylor series about 0, |f| <= π/4: the first term left out is below 1e-17
        s = z * 2.8114572543455206e-15 - 7.647163731819816e-13
        s = s * z + 1.6059043836821613e-10
        s = s * z - 2.505210838544172e-08
        s = s * z + 2.7557319223985893e-06
        s = s * z - 0.0001984126984126984
        s = s * z + 0.008333333333333333
        s = s * z - 0.16666666666666666
        sin = f + f * (z * s)
        c = z * 4.779477332387385e-14 - 1.1470745597729725e-11
        c = c * z + 2.08767569878681e-09
        c = c * z - 2.755731922398589e-07
        c = c * z + 2.48015873015873e-05
        c = c * z - 0.001388888888888889
        c = c * z + 0.041666666666666664
        c = c * z - 0.5
        cos = 1.0 + z * c
    else:
        shifted = 4.0 * b_u + 12582912.0  # 1.5·2²³: the addition rounds to an integer, which the last bits then hold
        quarter = shifted.to(tl.int32, bitcast=True)
        f = 4.0 * b_u - (shifted - 12582912.0)
        z = f * f
        s = z * -0.004601658099851846 + 0.07968003286213021
        s = s * z - 0.645963460245017
        sin = f * (s * z + 1.5707963217087146)
        c = z * 0.0009037665467816884 - 0.020860165113356366
        c = c * z + 0.2536692259658083
        c = c * z - 1.2337005425976826
        cos = c * z + 1.0
    odd = (quarter & 1) != 0
    b_cos = tl.where(odd, sin, cos)
    b_sin = tl.where(odd, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -b_cos, b_cos), tl.where((quarter & 2) != 0, -b_sin, b_sin)


@triton.jit
def box_muller(b_u_radius, b_u_angle):
    """Two standard normals, √(-2 ln u)·(cos 2πv, sin 2πv), of two uniforms u and v in (0, 1]."""
    b_radius = tl.sqrt(minus_two_log(b_u_radius))
    b_cos, b_sin = cos_sin_turns(b_u_angle)
    return b_radius * b_cos, b_radius * b_sin


@triton.jit
def interleave4(b_0, b_1, b_2, b_3):
    """(Q,) × 4 -> (4Q,): the words of a Philox block side by side, which one thread then stores as one vector."""
    return tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (4 * b_0.shape[0],))


@triton.jit
def normals(b_index, o_block, seed, step, stream, DTYPE: tl.constexpr):
    """(4Q,) normals of the blocks `o_block` (Q,), computed in DTYPE."""
    w0, w1, w2, w3 = philox_words(b_index, o_block, seed, step, stream)
    n0, n1 = box_muller(word_to_uniform(w0).to(DTYPE), word_to_uniform(w1).to(DTYPE))
    n2, n3 = box_muller(word_to_uniform(w2).to(DTYPE), word_to_uniform(w3).to(DTYPE))
    return interleave4(n0, n1, n2, n3)


@triton.jit
def gamma_parts(b_index, shape, seed, step, stream, BOOST: tl.constexpr):
    """(g, b), float64 scalars with g·exp(b) ~ Gamma(shape), b = 0 without BOOST (shape >= 1) [Marsaglia & Tsang 2000].

    As many trials as it takes. float64 throughout, so that the reference accepts the same trials.
    """
    a = shape
    if BOOST:
        a = shape + 1.0
    d = a - 0.3333333333333333
    c = 1.0 / tl.sqrt(9.0 * d)
    boost = shape * 0.0
    g = shape * 0.0
    trial = 0
    pending = 1
    while pending > 0:
        o_block = tl.cast(trial + (-2147483647 - 1), tl.uint32, bitcast=True)  # 2^31 + trial
        w0, w1, w2, w3 = philox_words(b_index, o_block, seed, step, stream)
        x, _ = box_muller(word_to_uniform(w0).to(tl.float64), word_to_uniform(w1).to(tl.float64))
        u = word_to_uniform(w2).to(tl.float64)
        if BOOST:
            boost = tl.where(trial == 0, tl.log(word_to_uniform(w3).to(tl.float64)) / shape, boost)
        t = c * x
        g = d * (1.0 + t) * (1.0 + t) * (1.0 + t)
        accept = (t > -1.0) & (u < 1.0 - 0.0331 * (x * x) * (x * x))
        if (t > -1.0) & (accept == 0):
            # x²/2 + d(1 - v + ln v) for v = (1+t)³, written so that nothing of the size of d cancels; ln(1+t) from
            # ln(w) with the rounding of w = 1+t divided out.
            w = 1.0 + t
            log1p = tl.where(w == 1.0, t, tl.log(w) * (t / tl.where(w == 1.0, 1.0, w - 1.0)))
            bound = d * (3.0 * (log1p - t) + t * t * (1.5 - t))
            accept = tl.log(u) < bound
        pending = tl.where(accept, 0, 1)
        trial += 1
    return g, boost


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "step", "stream", "first_block"])
def philox_kernel(
    p_index, p_out, seed_lo, seed_hi, step, stream, first_block, count, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (sample, tile): `count` words, uniforms or normals a sample, from Philox block `first_block` on."""
    tiles = tl.cdiv(count, 4 * BLOCK)
    i_sample = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    b_index = tl.load(p_index + i_sample)
    seed = philox_seed(seed_lo, seed_hi)
    step = philox_step(step)
    o_q = i_tile * BLOCK + tl.arange(0, BLOCK)
    o_block = o_q.to(tl.uint32) + first_block.to(tl.uint32, bitcast=True)
    if KIND == 2:
        b_out = normals(b_index, o_block, seed, step, stream, tl.float32)
    else:
        w0, w1, w2, w3 = philox_words(b_index, o_block, seed, step, stream)
        b_out = interleave4(w0, w1, w2, w3)
        if KIND == 1:
            b_out = word_to_uniform(b_out)
    o_e = i_tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(p_out + i_sample * count + o_e, b_out.to(p_out.dtype.element_ty), mask=o_e < count)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "step", "stream", "shape_bits"])
def gamma_kernel(p_index, p_out, seed_lo, seed_hi, step, stream, shape_bits, BOOST: tl.constexpr):
    """One draw a program."""
    i_sample = tl.program_id(0)
    shape = shape_bits.to(tl.int64).to(tl.float64, bitcast=True)
    step = philox_step(step)
    g, boost = gamma_parts(tl.load(p_index + i_sample), shape, philox_seed(seed_lo, seed_hi), step, stream, BOOST=BOOST)
    if BOOST:
        g = tl.exp(tl.log(g) + boost)
    tl.store(p_out + i_sample, g)


# -------------------------------------------------------------------------------------------------------- launchers


def operands(position: Position) -> tuple[int, int, int, Tensor | None]:
    """(seed, stream, step, clock) as the operators take them: the seed signed, the step a number or the clock."""
    step = position["step"]
    number, clock = (0, step) if isinstance(step, Tensor) else (step, None)
    return signed64(position["seed"]), position["stream"], number, clock


def scalar_arguments(seed: int, stream: int, step: int, clock: Tensor | None) -> tuple[int, int, int | Tensor, int]:
    """(seed_lo, seed_hi, step, stream) as the kernels take them."""
    return signed32(seed), signed32(seed >> 32), signed32(step) if clock is None else clock, stream


def _dtype(kind: int) -> torch.dtype:
    return torch.int64 if kind == WORDS else torch.float32


@operator("philox")
def launch_philox(
    index: Tensor, count: int, kind: int, first_block: int, seed: int, stream: int, step: int, clock: Tensor | None
) -> Tensor:
    """(B, count) numbers of this kind."""
    out = torch.empty(len(index), count, dtype=_dtype(kind), device=index.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(-(-count // 4)))
        grid = (len(index) * triton.cdiv(count, 4 * block),)
        position = scalar_arguments(seed, stream, step, clock)
        with on_device(index.device):
            philox_kernel[grid](index, out, *position, signed32(first_block), count, KIND=kind, BLOCK=block)
    return out


@launch_philox.register_fake
def _(
    index: Tensor, count: int, kind: int, first_block: int, seed: int, stream: int, step: int, clock: Tensor | None
) -> Tensor:
    return torch.empty(index.shape[0], count, dtype=_dtype(kind), device=index.device)


@operator("gamma")
def launch_gamma(index: Tensor, shape: float, seed: int, stream: int, step: int, clock: Tensor | None) -> Tensor:
    """(B,) float64 draws of Gamma(shape, 1)."""
    out = torch.empty(len(index), dtype=torch.float64, device=index.device)
    if len(index):
        position = scalar_arguments(seed, stream, step, clock)
        with on_device(index.device):
            gamma_kernel[(len(index),)](index, out, *position, float64_bits(shape), BOOST=shape < 1, num_warps=1)
    return out


@launch_gamma.register_fake
def _(index: Tensor, shape: float, seed: int, stream: int, step: int, clock: Tensor | None) -> Tensor:
    return index.new_empty(index.shape, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------- public functions


def random_words(
    sample_index: Tensor,
    blocks: int,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    first_block: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """The 32-bit words of Philox blocks [first_block, first_block + blocks) of each sample, for tests.

    Args:
        sample_index: as in `uniform`.
        blocks: number of blocks, in [0, 2³¹).
        seed: as in `uniform`.
        stream: as in `uniform`.
        step: as in `uniform`.
        first_block: in [0, 2³²).
        backend: "auto", "triton" or "reference".

    Returns:
        (B, blocks, 4) int64 in [0, 2³²).

    Raises:
        ValueError: as in `uniform`, or for blocks beyond 2³².
    """
    op = "random_words"
    index = _checks.index(op, sample_index)
    position = _checks.position(op, seed, stream, step, index)
    blocks, first_block = _checks.integer(op, "blocks", blocks, 31), _checks.integer(op, "first_block", first_block, 32)
    if first_block + blocks > 1 << 32:
        raise ValueError(f"{op}: first_block + blocks must be at most 2**32; got {first_block + blocks}")
    if use_triton(op, backend, index.device):
        words: Tensor = direct(launch_philox, index)(index, 4 * blocks, WORDS, first_block, *operands(position))
        return words.view(len(index), blocks, 4)
    return reference.random_words(index, blocks, **position, first_block=first_block)


def host_word(*, seed: int, stream: int, step: int, index: int = 0) -> int:
    """Word 0 of Philox block 0 of a sample: by it the host decides without asking a device.

    Args:
        seed: as in `uniform`.
        stream: as in `uniform`.
        step: as in `uniform`, a number.
        index: the sample's global index.

    Returns:
        A Python number in [0, 2³²).

    Raises:
        ValueError: as in `uniform`.
    """
    sample = torch.tensor([index])
    words = words_of(sample, blocks_of(0, 1), _checks.position("host_word", seed, stream, step, sample))
    return int(words[0, 0, 0])


def uniform(
    sample_index: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor, backend: Backend = "auto"
) -> Tensor:
    """`count` uniform numbers in (0, 1] for each sample, u = w·2⁻³² + 2⁻³³ of a 32-bit word w.

    Two calls that agree in (seed, stream, step, sample index) return the same numbers: different purposes take
    different streams. Equal bits on every backend.

    Source: Salmon et al. 2011, Philox4x32-10.

    Args:
        sample_index: (B,) int64 in [0, 2⁴⁸), the samples' global indices (higher bits are ignored).
        count: numbers a sample, in [0, 2³¹).
        seed: in [0, 2⁶⁴).
        stream: in [0, 2¹⁶).
        step: in [0, 2³²). It may also be a 0-d int64 tensor on the samples' device, with the same result: a captured
            CUDA graph keeps a number but reads a tensor at each replay. Its value is not checked; the low 32 bits
            count.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, count) float32.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
    """
    op = "uniform"
    index = _checks.index(op, sample_index)
    position = _checks.position(op, seed, stream, step, index)
    count = _checks.integer(op, "count", count, 31)
    if use_triton(op, backend, index.device):
        numbers: Tensor = direct(launch_philox, index)(index, count, UNIFORM, 0, *operands(position))
        return numbers
    return reference.uniform(index, count, **position)


def normal(
    sample_index: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor, backend: Backend = "auto"
) -> Tensor:
    """`count` standard normal numbers for each sample, two Box-Muller pairs a Philox block.

    Equal on every backend up to the last bits of log, sqrt, sin and cos.

    Args:
        sample_index: as in `uniform`.
        count: numbers a sample, in [0, 2³¹).
        seed: as in `uniform`.
        stream: as in `uniform`.
        step: as in `uniform`.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, count) float32.

    Raises:
        ValueError: as in `uniform`.
    """
    op = "normal"
    index = _checks.index(op, sample_index)
    position = _checks.position(op, seed, stream, step, index)
    count = _checks.integer(op, "count", count, 31)
    if use_triton(op, backend, index.device):
        numbers: Tensor = direct(launch_philox, index)(index, count, NORMAL, 0, *operands(position))
        return numbers
    return reference.normal(index, count, dtype=torch.float32, **position)


def gamma(
    sample_index: Tensor, shape: float, *, seed: int, stream: int, step: int | Tensor, backend: Backend = "auto"
) -> Tensor:
    """One Gamma(shape, 1) draw for each sample.

    A value below the smallest float64, which shapes under about 0.03 do draw, comes back as 0.

    Source: Marsaglia & Tsang 2000, for shape < 1 through Gamma(shape + 1)·U^(1/shape), with as many trials as it takes.

    Args:
        sample_index: as in `uniform`.
        shape: in (0, inf).
        seed: as in `uniform`.
        stream: as in `uniform`.
        step: as in `uniform`.
        backend: "auto", "triton" or "reference".

    Returns:
        (B,) float64.

    Raises:
        ValueError: as in `uniform`, or for a shape that does not fit.
    """
    op = "gamma"
    index = _checks.index(op, sample_index)
    position = _checks.position(op, seed, stream, step, index)
    shape = _checks.positive(op, "shape", shape)
    if use_triton(op, backend, index.device):
        numbers: Tensor = direct(launch_gamma, index)(index, shape, *operands(position))
        return numbers
    return reference.gamma(index, shape, **position)
