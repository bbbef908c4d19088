"""ipfm_loss: the generator's loss of Inverse Poisson Flow Matching and its gradients, without autograd."""

from __future__ import annotations

import math
from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, reference
from ipfm.kernels._dispatch import Backend, on_device, row_config, use_triton
from ipfm.kernels._operators import direct, operator
from ipfm.kernels._rows import as_rows, empty_rows
from ipfm.kernels.reference import IpfmLoss, LossWeight

# ---------------------------------------------------------------------------------------------------------- kernel


# What is summed over a sample for its weight, see `ipfm_loss`.
DISTANCE = tl.constexpr(0)
GIVEN = tl.constexpr(1)
SCORE = tl.constexpr(2)
UNSQUARED = tl.constexpr(3)


@triton.jit
def _differences(
    p_t, p_s, p_y, p_x, o_e, m_e, c_skip, c_out, rest,
    A: tl.constexpr, B: tl.constexpr, RAW: tl.constexpr, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(what the weight sums, e, a (T - S), e - a (T - S)), e = a (T - c) - b (y - c); 0 where masked.

    RAW: T = c_skip x + c_out t, likewise S, and c = c_skip x; else c = 0. At a = b = 1 e is T - y. The weight sums
    |T - y|, of SCORE |x - T|^2 and of UNSQUARED |T - S|^2; GIVEN does not look at its sum.
    """
    b_t = tl.load(p_t + o_e, mask=m_e, other=0.0).to(COMPUTE)
    b_s = tl.load(p_s + o_e, mask=m_e, other=0.0).to(COMPUTE)
    b_y = tl.load(p_y + o_e, mask=m_e, other=0.0).to(COMPUTE)
    if RAW:
        b_x = tl.load(p_x + o_e, mask=m_e, other=0.0).to(COMPUTE)
    if WEIGHT == SCORE:
        b_away = rest * b_x - c_out * b_t
        b_weigh = b_away * b_away
    elif WEIGHT == UNSQUARED:
        b_apart = c_out * (b_t - b_s)
        b_weigh = b_apart * b_apart
    if A == 1.0 and B == 1.0:
        if RAW:
            b_skipped = c_skip * b_x
            b_ty = b_skipped + c_out * b_t - b_y
            b_ts = c_out * (b_t - b_s)
            b_sy = b_skipped + c_out * b_s - b_y
        else:
            b_ty = b_t - b_y
            b_ts = b_t - b_s
            b_sy = b_s - b_y
        if WEIGHT < SCORE:
            b_weigh = tl.abs(b_ty)
    else:
        a = tl.full((), A, COMPUTE)
        b = tl.full((), B, COMPUTE)
        if RAW:
            b_y = b_y - c_skip * b_x
            b_t = c_out * b_t
            b_s = c_out * b_s
        if WEIGHT < SCORE:
            b_weigh = tl.abs(b_t - b_y)
        b_ty = a * b_t - b * b_y
        b_ts = a * (b_t - b_s)
        b_sy = a * b_s - b * b_y
    return b_weigh, b_ty, b_ts, b_sy


@triton.jit
def _gradients(b_ty, b_ts, b_sy, A: tl.constexpr, B: tl.constexpr, BETA: tl.constexpr):
    """(∂L/∂T, ∂L/∂S, ∂L/∂y) / λ with BETA = 4(α-½), of what `_differences` gives but for its first."""
    if A == 1.0 and B == 1.0:
        return 2.0 * b_ty - BETA * b_ts, BETA * b_ts - 2.0 * b_sy, -2.0 * b_ts
    else:
        by_y = tl.full((), -2.0 * B / A, b_ts.dtype)
        return 2.0 * b_ty - BETA * b_ts, BETA * b_ts - 2.0 * b_sy, by_y * b_ts


@triton.jit
def _peaks(b_dt, b_ds, b_dy, RAW: tl.constexpr):
    """The larger of the gradients by T and S, and that by y; without RAW, where one limit holds for all, all in one."""
    b_peak = tl.maximum(tl.abs(b_dt), tl.abs(b_ds))
    if RAW:
        return b_peak, tl.abs(b_dy)
    else:
        return tl.maximum(b_peak, tl.abs(b_dy)), b_peak


@triton.jit
def _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, weight, weight_y, valid):
    dtype = p_dt.dtype.element_ty
    tl.store(p_dt + o_e, tl.where(valid, weight * b_dt, 0.0).to(dtype), mask=m_e)
    tl.store(p_ds + o_e, tl.where(valid, weight * b_ds, 0.0).to(dtype), mask=m_e)
    tl.store(p_dy + o_e, tl.where(valid, weight_y * b_dy, 0.0).to(p_dy.dtype.element_ty), mask=m_e)


@triton.jit
def ipfm_loss_kernel(
    p_t, p_s, p_y, p_x, p_c_skip, p_c_out, p_factor, p_sigma, p_dt, p_ds, p_dy, p_loss, p_weight, p_valid,
    elements, st_b, ss_b, sy_b, sx_b, sdt_b, sds_b, sdy_b,
    ALPHA: tl.constexpr, BETA: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FLOOR: tl.constexpr,
    WEIGHT: tl.constexpr, BY_D: tl.constexpr, SMALL: tl.constexpr, FACTOR: tl.constexpr,
    RAW: tl.constexpr, COMPUTE: tl.constexpr,
    MAX_LOSS: tl.constexpr, MAX_GRAD: tl.constexpr, MAX_DY: tl.constexpr,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program = sample.

    λ = 1 / max(mean|T-y|, FLOOR);  L = 2λ Σ (T-S)((T-y) - α(T-S)), which is λ[‖T-y‖² - ‖S-y‖² - 2(α-½)‖T-S‖²]
    without its cancellation. λ is needed before the first gradient is written: the row waits in registers (RESIDENT),
    or is read again, from cache. A sum that is not finite, or a gradient beyond its dtype, makes the sample invalid.

    With real data beside, e = A(T-c) - B(y-c) takes the place of T - y in all but λ, see `ipfm_loss`:
    L = 2λ Σ (T-S)(e - αA(T-S)).

    Other weights: GIVEN 1, SCORE (N BY_D + 1) / (|x-T|² BY_D + σ²), UNSQUARED (|T-S|² + N SMALL)^-½; with FACTOR each
    is multiplied by the sample's own number.

    RAW: T = c_skip x + c_out t and S = c_skip x + c_out s, so that the gradients by t and s have the factor c_out; and
    x = y + noise, so that ∂L/∂y gains c_skip (∂L/∂T + ∂L/∂S), which is -c_skip times itself.
    """
    # The sample's rows and numbers.
    i_b = tl.program_id(0).to(tl.int64)
    p_t += i_b * st_b
    p_s += i_b * ss_b
    p_y += i_b * sy_b
    p_x += i_b * sx_b
    p_dt += i_b * sdt_b
    p_ds += i_b * sds_b
    p_dy += i_b * sdy_b
    c_skip = tl.full((), 0.0, COMPUTE)
    c_out = tl.full((), 1.0, COMPUTE)
    rest = c_out
    if RAW:
        given = tl.load(p_c_skip + i_b)
        c_skip = given.to(COMPUTE)
        c_out = tl.load(p_c_out + i_b).to(COMPUTE)
        rest = (1.0 - given).to(COMPUTE)

    # Load and compute: the differences, and of each element what the sums and the largest gradients take.
    if RESIDENT:
        o_e = tl.arange(0, BLOCK)
        m_e = o_e < elements
        b_weigh, b_ty, b_ts, b_sy = _differences(
            p_t, p_s, p_y, p_x, o_e, m_e, c_skip, c_out, rest, A, B, RAW, WEIGHT, COMPUTE
        )
        b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, A, B, BETA)
        b_loss = b_ts * (b_ty - ALPHA * b_ts)
        b_peak, b_peak_y = _peaks(b_dt, b_ds, b_dy, RAW)
    else:
        b_weigh = tl.zeros((BLOCK,), COMPUTE)
        b_loss = tl.zeros((BLOCK,), COMPUTE)
        b_peak = tl.zeros((BLOCK,), COMPUTE)
        b_peak_y = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            m_e = o_e < elements
            b_share, b_ty, b_ts, b_sy = _differences(
                p_t, p_s, p_y, p_x, o_e, m_e, c_skip, c_out, rest, A, B, RAW, WEIGHT, COMPUTE
            )
            b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, A, B, BETA)
            b_weigh += b_share
            b_loss += b_ts * (b_ty - ALPHA * b_ts)
            b_sizes, b_sizes_y = _peaks(b_dt, b_ds, b_dy, RAW)
            b_peak = tl.maximum(b_peak, b_sizes)
            if RAW:
                b_peak_y = tl.maximum(b_peak_y, b_sizes_y)

    # Reduce: λ, the loss, and whether the sample is valid.
    if WEIGHT == GIVEN:
        weight = tl.full((), 1.0, COMPUTE)
    elif WEIGHT == SCORE:
        sigma = tl.load(p_sigma + i_b).to(COMPUTE)
        by_D = tl.full((), BY_D, COMPUTE)
        away = tl.sum(b_weigh, axis=0) * by_D + sigma * sigma
        weight = (tl.cast(elements, COMPUTE) * by_D + 1.0) / away
    elif WEIGHT == UNSQUARED:
        apart = tl.sum(b_weigh, axis=0) + tl.cast(elements, COMPUTE) * tl.full((), SMALL, COMPUTE)
        weight = 1.0 / tl.sqrt(apart)
    else:
        mean = tl.sum(b_weigh, axis=0) / tl.cast(elements, COMPUTE)
        weight = 1.0 / tl.maximum(mean, tl.full((), FLOOR, COMPUTE))  # tl.cast would round FLOOR to float32
    if FACTOR:
        weight = weight * tl.load(p_factor + i_b).to(COMPUTE)
    loss = 2.0 * weight * tl.sum(b_loss, axis=0)
    if A != 1.0:
        loss = loss / tl.full((), A, COMPUTE)
    slope = weight
    slope_y = weight
    if RAW:
        slope = weight * c_out
        slope_y = weight * rest
    valid = (tl.abs(loss) <= MAX_LOSS) & (weight > 0.0) & (tl.abs(slope) * tl.max(b_peak, axis=0) <= MAX_GRAD)
    if RAW:
        valid = valid & (tl.abs(slope_y) * tl.max(b_peak_y, axis=0) <= MAX_DY)
    tl.store(p_loss + i_b, tl.where(valid, loss, 0.0))
    tl.store(p_weight + i_b, tl.where(valid, weight, 0.0))
    tl.store(p_valid + i_b, valid)

    # Store: the gradients, which wait in registers or are computed again.
    if RESIDENT:
        _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, slope, slope_y, valid)
    else:
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            m_e = o_e < elements
            _, b_ty, b_ts, b_sy = _differences(
                p_t, p_s, p_y, p_x, o_e, m_e, c_skip, c_out, rest, A, B, RAW, WEIGHT, COMPUTE
            )
            b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, A, B, BETA)
            _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, slope, slope_y, valid)


# -------------------------------------------------------------------------------------------------------- launcher


def _per_sample_outputs(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weight and validity, still empty."""
    batch, dtype = y.shape[:1], torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(batch, dtype=dtype), y.new_empty(batch, dtype=dtype), y.new_empty(batch, dtype=torch.bool)


def launch_ipfm_loss(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    alpha: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    weights: tuple[float, float],
    inplace: bool,
    weight_by: str = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> IpfmLoss:
    """One launch of the Triton kernel; dt and ds lie over t and s, or over copies of them in rows, if `inplace`."""
    dy = empty_rows(t, y.dtype)
    row_t, row_s, row_y = as_rows(t, dy), as_rows(s, dy), as_rows(y, dy)
    row_x = row_y if x is None else as_rows(x, dy)
    dt, ds = (row_t, row_s) if inplace else (empty_rows(t), empty_rows(t))
    loss, weight, valid = _per_sample_outputs(y)
    compute = loss.dtype
    kind = {"sid": DISTANCE, "given": GIVEN, "score": SCORE, "unsquared": UNSQUARED}[weight_by]
    if len(t):
        elements = t[0].numel()
        block, warps = row_config(elements, crowded=weights != (1.0, 1.0))
        with on_device(t.device):
            ipfm_loss_kernel[(len(t),)](
                row_t, row_s, row_y, row_x, loss if c_skip is None else c_skip, loss if c_out is None else c_out,
                loss if factor is None else factor, loss if sigma is None else sigma,
                dt, ds, dy, loss, weight, valid,
                elements, *(v.stride(0) for v in (row_t, row_s, row_y, row_x, dt, ds, dy)),
                ALPHA=alpha, BETA=4 * (alpha - 0.5), A=weights[0], B=weights[1], FLOOR=reference.WEIGHT_FLOOR,
                WEIGHT=kind.value, BY_D=by_D, SMALL=reference.SMALL_SQUARE, FACTOR=factor is not None,
                RAW=x is not None,
                COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
                MAX_LOSS=torch.finfo(compute).max, MAX_GRAD=torch.finfo(t.dtype).max, MAX_DY=torch.finfo(y.dtype).max,
                BLOCK=block, RESIDENT=block >= elements, num_warps=warps,
            )  # fmt: skip
    return IpfmLoss(loss, weight, dt, ds, dy, valid)


@operator("ipfm_loss")
def _ipfm_loss(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    alpha: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    a: float = 1.0,
    b: float = 1.0,
    weight_by: str = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `IpfmLoss`."""
    return launch_ipfm_loss(t, s, y, alpha, x, c_skip, c_out, (a, b), False, weight_by, factor, sigma, by_D)


@_ipfm_loss.register_fake
def _(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    alpha: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    a: float = 1.0,
    b: float = 1.0,
    weight_by: str = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, weight, valid = _per_sample_outputs(y)
    return loss, weight, empty_rows(t), empty_rows(t), empty_rows(t, y.dtype), valid


@operator("ipfm_loss_", mutates=("t", "s"))
def _ipfm_loss_(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    alpha: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    a: float = 1.0,
    b: float = 1.0,
    weight_by: str = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, weight, dy, valid); dt is written over t and ds over s."""
    got = launch_ipfm_loss(t, s, y, alpha, x, c_skip, c_out, (a, b), True, weight_by, factor, sigma, by_D)
    for given, row in ((t, got.dt), (s, got.ds)):
        if row is not given:
            given.copy_(row)
    return got.loss, got.weight, got.dy, got.valid


@_ipfm_loss_.register_fake
def _(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    alpha: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    a: float = 1.0,
    b: float = 1.0,
    weight_by: str = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    by_D: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, weight, valid = _per_sample_outputs(y)
    return loss, weight, empty_rows(t, y.dtype), valid


# -------------------------------------------------------------------------------------------------- public function


def _share_memory(*tensors: Tensor) -> bool:
    """Whether some start at one address, as far as there are addresses: a compiler traces tensors that have none."""
    addresses = [] if torch.compiler.is_compiling() else [v.data_ptr() for v in tensors if v.numel() and not v.is_meta]
    return len(set(addresses)) < len(addresses)


@torch.no_grad()
def ipfm_loss(
    t: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    alpha: float,
    inplace: bool = False,
    x: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
    real_weights: tuple[float, float] = (1.0, 1.0),
    weight: LossWeight = "sid",
    factor: Tensor | None = None,
    sigma: Tensor | None = None,
    D: float = math.inf,
    backend: Backend = "auto",
) -> IpfmLoss:
    """The generator's loss and its gradients with respect to the teacher's and student's outputs and the sample.

        L = λ [ ‖T-y‖² - ‖S-y‖² - 2(α-½)‖T-S‖² ],   λ = 1 / max(mean|T-y|, 1e-5), constant for the gradients
        ∂L/∂T = λ [2(T-y) - 4(α-½)(T-S)],   ∂L/∂S = λ [-2(S-y) + 4(α-½)(T-S)],   ∂L/∂y = 2λ (S-T)

    T = t and S = s. With x, c_skip and c_out, t and s are the networks' raw outputs, and the preconditioning is part of
    the loss: T = c_skip x + c_out t, S = c_skip x + c_out s. Since x = y + noise, y has a part in T and S too:

        dt = c_out ∂L/∂T,   ds = c_out ∂L/∂S,   dy = ∂L/∂y + c_skip (∂L/∂T + ∂L/∂S) = (1 - c_skip) 2λ (S-T)

    What y does by way of the networks' inputs is not in dy, with or without these arguments.

    With real_weights (a, b) other than (1, 1) the student has learned from real data beside the samples, see
    `denoising_loss`, and e = a(T-c) - b(y-c) takes the place of T - y, but for λ; c = c_skip x with the preconditioning
    and 0 without:

        L = 2λ Σ (T-S)(e - αa(T-S))
        ∂L/∂T = λ [2e - 4a(α-½)(T-S)],   ∂L/∂S = λ [-2e + 4aα(T-S)],   ∂L/∂y = 2λb (S-T)

    times c_out, c_out and 1 - c_skip with the preconditioning.

    Other weights λ, constant for the gradients too, N the number of elements of a sample:

        weight="given"      1
        weight="score"      (N + D) / (‖x-T‖² + σ²D), with the preconditioning
        weight="unsquared"  1 / (‖T-S‖² + 10⁻⁶ N)^½

    With `factor` every λ, that of "sid" too, is multiplied by the sample's number.

    Source: IPFM (Shlenskii & Korotin) eq. 21 at α = ½, its regularised eq. 28 at other α; for every α it is twice SiD
    (Zhou et al. 2024) eq. 23.
    Preconditioning: EDM (Karras et al. 2022) eq. 7. Real data: RealUID (arXiv 2509.22459), with the offset c that makes
    its targets those of the raw output. "unsquared" is the gradient of a distance in the place of its square (RealUID,
    A.4), and "score" that of a difference of scores sample by sample.

    Args:
        t: (B, C, H, W) or (B, N), float32, bfloat16, float16 or float64, any strides: the teacher's output T(x, σ).
            B = 0 is fine. Not recorded by autograd. Raw outputs may have any dtype, one for both, whose numbers y's
            holds, such as bfloat16 beside float32.
        s: the student's output S(x, σ), of t's shape, device and dtype, any strides.
        y: clean sample, of t's shape, device and dtype, any strides.
        alpha: SiD's α, in [-1e6, 1e6]; ½ is pure IPFM, 1 the regularised objective.
        inplace: writes dt over t and ds over s and returns them. t and s must then share no memory with each other and
            with y and x.
        x: noisy sample, of y's shape, device and dtype, any strides; given with c_skip and c_out or not at all.
        c_skip: (B,) float32 or float64, factor of x.
        c_out: (B,) float32 or float64, factor of t and s.
        real_weights: (a, b), the share of generated samples in the student's loss, in (0, 1], and the factor of their
            targets, above 0 and up to 1e6; (1, 1) is without real data.
        weight: "sid" for the λ above, or one of the others.
        factor: (B,) float32 or float64, of each sample's weight. One that is not finite and above 0 leaves its sample
            out.
        sigma: (B,) float32 or float64, noise levels, of weight "score" alone.
        D: of weight "score", in (0, inf].
        backend: "auto", "triton" or "reference".

    Returns:
        loss (B,), summed over elements, and weight (B,) λ, both float32 (float64 for a float64 y); dt and ds in t's
        dtype and dy in y's, all in t's memory format (C-contiguous where t's samples are not dense); valid (B,) bool.
        Computed, and summed in an order that depends on the shape alone, in float32 (float64 for a float64 y), so
        results repeat bit for bit.

    A sample is invalid when an input is not finite, when its loss overflows, or when a gradient exceeds its dtype. Its
    loss, weight and gradients are exactly 0; the caller divides by the number of valid ones. Reads no value on the
    host.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or tensors that share memory with inplace=True.

    Bytes moved: 6 a element and byte of dtype (3 read, 3 written) in one launch; samples of more than 4096 elements are
    read a second time, mostly from cache. With the preconditioning 28 a element in float32, 20 with bfloat16 outputs.
    Outside, it reads the outputs and x twice, writes T and S, and takes both gradients back to the outputs' and to x's:
    48 more than the 24 of the loss in float32, 40 more with bfloat16 outputs. A tensor whose memory format differs from
    t's is copied first.

    Example:
        >>> import torch
        >>> from ipfm.kernels import ipfm_loss
        >>> y = torch.zeros(2, 3, 8, 8)
        >>> result = ipfm_loss(y + 0.5, y + 0.25, y, alpha=1.0)
        >>> result.loss, result.weight
        (tensor([48., 48.]), tensor([2., 2.]))
        >>> result.dy[:, 0, 0, 0]
        tensor([-1., -1.])
    """
    op = "ipfm_loss"
    _checks.samples(op, "t", t)
    _checks.same(op, "s", s, "t", t)
    raw = not (x is None and c_skip is None and c_out is None)
    _checks.same(op, "y", y, "t", t, ("shape", "device") if raw else ("shape", "dtype", "device"))
    if raw:
        _checks.samples(op, "y", y)
        _checks.narrower(op, "t", t, "y", y)
    x, c_skip, c_out = _checks.preconditioning(op, x, c_skip, c_out, y)
    alpha = _checks.finite(op, "alpha", alpha)
    if abs(alpha) > 1e6:
        raise ValueError(f"{op}: alpha must be in [-1e6, 1e6]; got {alpha}")
    a, b = _checks.real_weights(op, real_weights)
    if weight not in get_args(LossWeight):
        raise ValueError(f"{op}: weight must be {', '.join(get_args(LossWeight))}; got {weight!r}")
    factor = None if factor is None else _checks.per_sample(op, "factor", factor, y)
    if (sigma is not None) != (weight == "score") or (weight == "score" and not raw):
        raise ValueError(
            f"{op}: sigma goes with weight score, which needs x, c_skip and c_out too; got weight {weight} "
            f"{'with' if sigma is not None else 'without'} sigma"
        )
    sigma = None if sigma is None else _checks.per_sample(op, "sigma", sigma, y)
    by_D = 1 / _checks.positive(op, "D", D, infinite=True)
    if inplace and (_share_memory(t, s, y) or (x is not None and _share_memory(t, s, x))):
        raise ValueError(f"{op}: inplace=True overwrites t and s; got tensors that share memory")
    if use_triton(op, backend, t.device):
        if not inplace:
            given = direct(_ipfm_loss, t)
            return IpfmLoss(*given(t, s, y, alpha, x, c_skip, c_out, a, b, weight, factor, sigma, by_D))
        run = direct(_ipfm_loss_, t)
        loss, taken, dy, valid = run(t, s, y, alpha, x, c_skip, c_out, a, b, weight, factor, sigma, by_D)
        if run is not _ipfm_loss_ and not t.is_inference():
            # An operator tells autograd for itself what it overwrote.
            torch.autograd.graph.increment_version((t, s))
        return IpfmLoss(loss, taken, t, s, dy, valid)
    weights = (a, b)
    return reference.ipfm_loss(
        t, s, y, alpha=alpha, inplace=inplace, x=x, c_skip=c_skip, c_out=c_out, real_weights=weights, weight_by=weight,
        factor=factor, sigma=sigma, by_D=by_D,
    )  # fmt: skip
