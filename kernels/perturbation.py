"""perturb: the PFGM++ perturbation kernel x = y + σ·g/√(K/D), noise drawn and added in one pass."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, reference
from ipfm.kernels._dispatch import Backend, float64_bits, noise_config, on_device, use_triton
from ipfm.kernels._operators import applied, direct, launches_directly, operator
from ipfm.kernels.philox import gamma_parts, interleave4, normals, operands, philox_seed, philox_step, scalar_arguments

# ---------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _offsets(o_i, n_1, n_2, s_0, s_1, s_2, NDIM: tl.constexpr):
    """Memory offsets of the elements `o_i` of a C-contiguous index over (·, n_1, n_2) in a tensor of these strides."""
    if NDIM == 1:
        return o_i * s_2
    o_2 = o_i % n_2
    o_01 = o_i // n_2
    if NDIM == 2:
        return o_01 * s_1 + o_2 * s_2
    return (o_01 // n_1) * s_0 + (o_01 % n_1) * s_1 + o_2 * s_2


@triton.jit
def _perturb_block(p_y, p_x, p_scaled, m_e, b_noise, b_scale, b_c_in, SCALED: tl.constexpr, COMPUTE: tl.constexpr):
    b_x = tl.load(p_y, mask=m_e, other=0.0).to(COMPUTE) + b_scale * b_noise
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_e)
    if SCALED:
        b_scaled = b_c_in * b_x
        if p_scaled.dtype.element_ty.primitive_bitwidth == 16:
            b_scaled = b_scaled.to(tl.float32)  # the interpreter casts float64 to bfloat16 wrongly
        tl.store(p_scaled, b_scaled.to(p_scaled.dtype.element_ty), mask=m_e)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "step", "stream", "half_dof_bits"])
def perturb_kernel(
    p_y, p_sigma, p_c_in, p_index, p_x, p_scaled,
    seed_lo, seed_hi, step, stream, half_dof_bits,
    inner, n_1, n_2,
    sy_b, sy_c, sy_0, sy_1, sy_2,
    sx_b, sx_c, sx_0, sx_1, sx_2,
    CHANNELS: tl.constexpr, RGB: tl.constexpr, NDIM: tl.constexpr, HEAVY: tl.constexpr, BOOST: tl.constexpr,
    SCALED: tl.constexpr, COMPUTE: tl.constexpr, MAX: tl.constexpr, LOG_RATIO_MAX: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (sample, segment): x = y + σ·√(D/K)·g and, with SCALED, c_in·x, for TILES·BLOCK inner elements.

    A sample is CHANNELS × inner elements. All channels of a stretch of pixels go through one program, so that a sector
    of memory that holds several channels is completed where it is opened. `inner` is a multiple of 4 unless CHANNELS
    is 1, so that a Philox block never straddles two channels. RGB: three channels interleaved in memory, as in a
    channels_last image; the noise is computed by channel and gathered into memory order, for wide accesses.
    """
    # The program's sample and its stretch of it.
    segments = tl.cdiv(tl.cdiv(inner, BLOCK), TILES)
    i_sample = (tl.program_id(0) // segments).to(tl.int64)
    first = (tl.program_id(0) % segments) * (TILES * BLOCK)

    # Load and compute: the sample's numbers, of which the gamma variable makes σ·√(D/K).
    b_index = tl.load(p_index + i_sample)
    b_scale = tl.load(p_sigma + i_sample).to(tl.float64)
    seed = philox_seed(seed_lo, seed_hi)
    step = philox_step(step)
    if HEAVY:
        a = half_dof_bits.to(tl.int64).to(tl.float64, bitcast=True)
        g, boost = gamma_parts(b_index, a, seed, step, stream, BOOST=BOOST)
        if BOOST:
            ratio = tl.exp(tl.minimum(0.5 * (tl.log(a) - (tl.log(g) + boost)), LOG_RATIO_MAX))
        else:
            ratio = tl.sqrt(a / g)
        b_scale = b_scale * ratio
    b_scale = tl.where(b_scale > MAX, MAX, b_scale).to(COMPUTE)  # finite, so that a normal of 0 adds 0
    b_c_in = b_scale
    if SCALED:
        b_c_in = tl.load(p_c_in + i_sample).to(COMPUTE)
    p_y += i_sample * sy_b
    p_x += i_sample * sx_b
    p_scaled += i_sample * sx_b

    # Draw, load, add and store, a tile at a time.
    for tile in range(TILES):
        o_i = first + tile * BLOCK + tl.arange(0, BLOCK)
        o_q = (first + tile * BLOCK) // 4 + tl.arange(0, BLOCK // 4)
        if RGB:
            # The normals of three channels, gathered into memory order.
            b_0 = normals(b_index, o_q, seed, step, stream, COMPUTE)
            b_1 = normals(b_index, inner // 4 + o_q, seed, step, stream, COMPUTE)
            b_2 = normals(b_index, inner // 4 * 2 + o_q, seed, step, stream, COMPUTE)
            b_pixels = interleave4(b_0, b_1, b_2, b_2)  # four to a pixel, the last one unused
            for third in tl.static_range(3):
                o_m = third * BLOCK + tl.arange(0, BLOCK)
                b_noise = tl.gather(b_pixels, o_m // 3 * 4 + o_m % 3, axis=0)
                o_m += 3 * (first + tile * BLOCK)
                _perturb_block(
                    p_y + o_m, p_x + o_m, p_scaled + o_m, o_m < 3 * inner, b_noise, b_scale, b_c_in, SCALED, COMPUTE
                )
        else:
            # One channel after the other, each by its strides.
            m_i = o_i < inner
            o_y = _offsets(o_i, n_1, n_2, sy_0, sy_1, sy_2, NDIM)
            o_x = _offsets(o_i, n_1, n_2, sx_0, sx_1, sx_2, NDIM)
            for channel in range(CHANNELS):
                b_noise = normals(b_index, channel * (inner // 4) + o_q, seed, step, stream, COMPUTE)
                c_y = channel * sy_c + o_y
                c_x = channel * sx_c + o_x
                _perturb_block(p_y + c_y, p_x + c_x, p_scaled + c_x, m_i, b_noise, b_scale, b_c_in, SCALED, COMPUTE)


# -------------------------------------------------------------------------------------------------------- launcher


def sample_layout(
    shape: tuple[int, ...], y_strides: tuple[int, ...], x_strides: tuple[int, ...]
) -> tuple[int, int, list[tuple[int, int, int]]]:
    """How the kernel walks a sample.

    Args:
        shape: of the sample, without the batch.
        y_strides: of the sample in y.
        x_strides: of the sample in x.

    Returns:
        (channels, inner, dims). `dims` are the inner dimensions as (size, stride in y, stride in x), neighbours merged
        where both tensors allow: one of stride 1 for a contiguous sample, one of stride C for a channels_last one.
        `channels` is split off only where that helps (several inner dimensions would be needed) and may be done (Philox
        blocks stay within a channel).
    """

    def merged(first: int) -> list[tuple[int, int, int]]:
        dims: list[tuple[int, int, int]] = []
        for size, sy, sx in zip(shape[first:], y_strides[first:], x_strides[first:], strict=True):
            if size == 1:
                continue
            if dims and dims[-1][1] == size * sy and dims[-1][2] == size * sx:
                dims[-1] = (dims[-1][0] * size, sy, sx)
            else:
                dims.append((size, sy, sx))
        return dims or [(1, 1, 1)]

    whole = merged(0)
    inner = math.prod(shape[1:])
    if len(whole) > 1 and inner % 4 == 0:
        return shape[0], inner, merged(1)
    return 1, math.prod(shape), whole


def launch_perturb(
    y: Tensor,
    sigma: Tensor,
    D: float,
    position: tuple[int, int, int | Tensor, int],
    index: Tensor,
    c_in: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """One launch of the Triton kernel; arguments are valid.

    Args:
        y: as in `perturb`.
        sigma: as in `perturb`.
        D: as in `perturb`.
        position: (seed_lo, seed_hi, step, stream), from `philox.scalar_arguments`.
        index: (B,) int64, sample indices.
        c_in: as in `perturb`.
        out_dtype: dtype of c_in·x.

    Returns:
        x, and c_in·x or None without c_in.
    """
    x = torch.empty_like(y)
    scaled = None if c_in is None else torch.empty_like(y, dtype=out_dtype)
    if not y.numel():
        return x, scaled
    shape, y_strides = tuple(y.shape[1:]), y.stride()[1:]
    channels, inner, dims = sample_layout(shape, y_strides, x.stride()[1:])
    if len(dims) > 3 or sum((n - 1) * s for n, s in zip(shape, y_strides, strict=True)) >= 1 << 31:
        # More dimensions than the kernel walks, or offsets in a sample that int32 does not hold: through a copy.
        plain, plain_scaled = launch_perturb(y.contiguous(), sigma, D, position, index, c_in, out_dtype)
        if scaled is not None and plain_scaled is not None:
            scaled.copy_(plain_scaled)
        return x.copy_(plain), scaled
    compute = torch.promote_types(y.dtype, torch.float32)
    heavy = not math.isinf(D)
    rgb = channels == 3 and dims == [(inner, 3, 3)] and y.stride(1) == x.stride(1) == 1
    block, tiles, warps = noise_config(len(y), inner, rgb)
    ndim = len(dims)
    dims = [(1, 0, 0)] * (3 - ndim) + dims
    sizes, sy, sx = zip(*dims, strict=True)
    grid = (len(y) * triton.cdiv(triton.cdiv(inner, block), tiles),)
    with on_device(y.device):
        perturb_kernel[grid](
            y, sigma, sigma if c_in is None else c_in, index, x, x if scaled is None else scaled,
            *position, float64_bits(D / 2 if heavy else 1.0),
            inner, *sizes[1:],
            y.stride(0), y.stride(1), *sy,
            x.stride(0), x.stride(1), *sx,
            CHANNELS=channels, NDIM=ndim, HEAVY=heavy, BOOST=heavy and D < 2, SCALED=c_in is not None, RGB=rgb,
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32, MAX=torch.finfo(compute).max,
            LOG_RATIO_MAX=reference.LOG_RATIO_MAX, BLOCK=block, TILES=tiles, num_warps=warps,
        )  # fmt: skip
    return x, scaled


@operator("perturb")
def _perturb(
    y: Tensor, sigma: Tensor, D: float, seed: int, stream: int, step: int, clock: Tensor | None, index: Tensor
) -> Tensor:
    """x."""
    x, _ = launch_perturb(y, sigma, D, scalar_arguments(seed, stream, step, clock), index, None, y.dtype)
    return x


@_perturb.register_fake
def _(
    y: Tensor, sigma: Tensor, D: float, seed: int, stream: int, step: int, clock: Tensor | None, index: Tensor
) -> Tensor:
    return torch.empty_like(y)


@operator("perturb_scaled")
def _perturb_scaled(
    y: Tensor,
    sigma: Tensor,
    D: float,
    seed: int,
    stream: int,
    step: int,
    clock: Tensor | None,
    index: Tensor,
    c_in: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(x, c_in·x)."""
    x, scaled = launch_perturb(y, sigma, D, scalar_arguments(seed, stream, step, clock), index, c_in, out_dtype)
    assert scaled is not None
    return x, scaled


@_perturb_scaled.register_fake
def _(
    y: Tensor,
    sigma: Tensor,
    D: float,
    seed: int,
    stream: int,
    step: int,
    clock: Tensor | None,
    index: Tensor,
    c_in: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y, dtype=out_dtype)


# -------------------------------------------------------------------------------------------------------- autograd


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx/dy = I: the noise does not depend on y."""
    return grad, None, None, None, None, None, None, None


def _setup_scaled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[8])
    ctx.dtype = inputs[0].dtype


def _backward_scaled(ctx: Any, grad: Tensor | None, grad_scaled: Tensor | None) -> tuple[Tensor | None, ...]:
    """d(c_in·x)/dy = c_in."""
    if grad_scaled is not None:
        (c_in,) = ctx.saved_tensors
        compute = torch.promote_types(ctx.dtype, torch.float32)
        through = c_in.to(compute).view(-1, *[1] * (grad_scaled.ndim - 1)) * grad_scaled.to(compute)
        grad = (through if grad is None else through + grad).to(ctx.dtype)
    return grad, None, None, None, None, None, None, None, None, None


_perturb.register_autograd(_backward)
_perturb_scaled.register_autograd(_backward_scaled, setup_context=_setup_scaled)


class _Perturb(torch.autograd.Function):
    """The launch without an operator around it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x: Tensor = _perturb._init_fn(*inputs)
        return x

    backward = staticmethod(_backward)


class _PerturbScaled(torch.autograd.Function):
    """The launch without an operator around it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = _perturb_scaled._init_fn(*inputs)
        _setup_scaled(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_scaled)


_apply, _apply_scaled = applied(_Perturb), applied(_PerturbScaled)


# -------------------------------------------------------------------------------------------------- public function


@overload
def perturb(
    y: Tensor,
    sigma: Tensor,
    D: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
    c_in: None = None,
    out_dtype: None = None,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def perturb(
    y: Tensor,
    sigma: Tensor,
    D: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
    c_in: Tensor,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def perturb(
    y: Tensor,
    sigma: Tensor,
    D: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
    c_in: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw x ~ p_r(x | y) ∝ (‖x - y‖² + r²)^(-(N+D)/2), r = σ√D, and optionally c_in·x, in one pass over the data.

        x = y + σ·g / √(K/D),   g ~ N(0, I_N),   K = 2·Gamma(D/2);   K/D = 1 at D = ∞ (the Gaussian kernel)

    Source: PFGM++ (Xu et al. 2023) eq. 4, sampled as the multivariate Student t that it is.

    Args:
        y: (B, C, H, W) or (B, N), float32, bfloat16, float16 or float64, of any strides; B = 0 is fine. y = 0 gives the
            samplers' prior. Half precision is perturbed in float32 and rounded once.
        sigma: (B,) float32 or float64, noise levels in the units of y. Not PFGM++'s r: one that is given r draws noise
            √D times too large; σ = r/√D.
        D: number of auxiliary dimensions, any real in (0, ∞].
        seed: in [0, 2⁶⁴); with stream, step and sample_index the position of the noise, as in
            `ipfm.kernels.philox.uniform`. Element i (in C-contiguous order) of a sample gets the same noise whatever
            the batch, the order, the memory format, the dtype and the backend.
        stream: in [0, 2¹⁶); different purposes take different streams.
        step: in [0, 2³²), a number or a 0-d int64 tensor on y's device.
        sample_index: (B,) int64 in [0, 2⁴⁸), the samples' global indices.
        c_in: (B,) float32 or float64; asks for c_in·x too, computed from x before it is rounded.
        out_dtype: dtype of c_in·x; y's when None.
        backend: "auto", "triton" or "reference".

    Returns:
        x, or (x, c_in·x): shape and memory format of y; x in y's dtype. Differentiable in y (dx/dy = I),
        not in sigma and c_in.

    Where the heavy tail leaves the range of the dtype (most draws at D = 0.001 do), x is ±inf, never NaN.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.

    Bytes moved: y read once, x (and c_in·x) written once; the noise never exists in memory.

    Example:
        >>> import torch
        >>> from ipfm.kernels import perturb
        >>> y, sigma, index = torch.zeros(4, 3, 8, 8), torch.full((4,), 0.5), torch.arange(4)
        >>> x = perturb(y, sigma, 128.0, seed=0, stream=0, step=0, sample_index=index)
        >>> x.shape
        torch.Size([4, 3, 8, 8])
        >>> third = perturb(y[2:3], sigma[2:3], 128.0, seed=0, stream=0, step=0, sample_index=index[2:3])
        >>> torch.equal(third, x[2:3])
        True
    """
    op = "perturb"
    _checks.samples(op, "y", y)
    if y[:1].numel() > 1 << 30:
        raise ValueError(f"{op}: y may have at most 2**30 elements a sample; got {tuple(y.shape)}")
    sigma = _checks.per_sample(op, "sigma", sigma, y).detach()
    D = _checks.positive(op, "D", D, infinite=True)
    index = _checks.index(op, sample_index, y)
    position = _checks.position(op, seed, stream, step, y)
    if c_in is not None:
        c_in = _checks.per_sample(op, "c_in", c_in, y).detach()
    elif out_dtype is not None:
        raise ValueError(f"{op}: out_dtype is the dtype of c_in·x and needs c_in; got out_dtype without it")
    if out_dtype is None:
        out_dtype = y.dtype
    _checks.float_dtype(op, "out_dtype", out_dtype)
    if use_triton(op, backend, y.device):
        recorded = y.requires_grad and torch.is_grad_enabled() and launches_directly(y)
        if c_in is None:
            run = _apply if recorded else direct(_perturb, y)
            x: Tensor = run(y, sigma, D, *operands(position), index)
            return x
        run = _apply_scaled if recorded else direct(_perturb_scaled, y)
        both: tuple[Tensor, Tensor] = run(y, sigma, D, *operands(position), index, c_in, out_dtype)
        return both
    return reference.perturb(y, sigma, D, **position, sample_index=index, c_in=c_in, out_dtype=out_dtype)
