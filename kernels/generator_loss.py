"""ipfm_loss: the generator's loss of Inverse Poisson Flow Matching and its gradients, without autograd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, reference
from ._dispatch import Backend, on_device, row_config, use_triton
from ._operators import operator
from ._rows import as_rows, empty_rows
from .reference import IpfmLoss

# ---------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _differences(p_t, p_s, p_y, o_e, m_e, COMPUTE: tl.constexpr):
    """(T - y, T - S, S - y); 0 where masked."""
    b_t = tl.load(p_t + o_e, mask=m_e, other=0.0).to(COMPUTE)
    b_s = tl.load(p_s + o_e, mask=m_e, other=0.0).to(COMPUTE)
    b_y = tl.load(p_y + o_e, mask=m_e, other=0.0).to(COMPUTE)
    return b_t - b_y, b_t - b_s, b_s - b_y


@triton.jit
def _gradients(b_ty, b_ts, b_sy, BETA: tl.constexpr):
    """(∂L/∂T, ∂L/∂S, ∂L/∂y) / λ with BETA = 4(α-½)."""
    return 2.0 * b_ty - BETA * b_ts, BETA * b_ts - 2.0 * b_sy, -2.0 * b_ts


@triton.jit
def _peak(b_dt, b_ds, b_dy):
    return tl.maximum(tl.maximum(tl.abs(b_dt), tl.abs(b_ds)), tl.abs(b_dy))


@triton.jit
def _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, weight, valid):
    dtype = p_dt.dtype.element_ty
    tl.store(p_dt + o_e, tl.where(valid, weight * b_dt, 0.0).to(dtype), mask=m_e)
    tl.store(p_ds + o_e, tl.where(valid, weight * b_ds, 0.0).to(dtype), mask=m_e)
    tl.store(p_dy + o_e, tl.where(valid, weight * b_dy, 0.0).to(dtype), mask=m_e)


@triton.jit
def _ipfm_loss_kernel(
    p_t, p_s, p_y, p_dt, p_ds, p_dy, p_loss, p_weight, p_valid,
    elements, st_b, ss_b, sy_b, sdt_b, sds_b, sdy_b,
    ALPHA: tl.constexpr, BETA: tl.constexpr, FLOOR: tl.constexpr, COMPUTE: tl.constexpr,
    MAX_LOSS: tl.constexpr, MAX_GRAD: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program = sample.

    λ = 1 / max(mean|T-y|, FLOOR);  L = 2λ Σ (T-S)((T-y) - α(T-S)), which is λ[‖T-y‖² - ‖S-y‖² - 2(α-½)‖T-S‖²]
    without its cancellation. λ is needed before the first gradient is written: the row waits in registers (RESIDENT),
    or is read again, from cache. A sum that is not finite, or a gradient beyond its dtype, makes the sample invalid.
    """
    i_b = tl.program_id(0).to(tl.int64)
    p_t += i_b * st_b
    p_s += i_b * ss_b
    p_y += i_b * sy_b
    p_dt += i_b * sdt_b
    p_ds += i_b * sds_b
    p_dy += i_b * sdy_b
    if RESIDENT:
        o_e = tl.arange(0, BLOCK)
        m_e = o_e < elements
        b_ty, b_ts, b_sy = _differences(p_t, p_s, p_y, o_e, m_e, COMPUTE)
        b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, BETA)
        b_abs = tl.abs(b_ty)
        b_loss = b_ts * (b_ty - ALPHA * b_ts)
        b_peak = _peak(b_dt, b_ds, b_dy)
    else:
        b_abs = tl.zeros((BLOCK,), COMPUTE)
        b_loss = tl.zeros((BLOCK,), COMPUTE)
        b_peak = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            m_e = o_e < elements
            b_ty, b_ts, b_sy = _differences(p_t, p_s, p_y, o_e, m_e, COMPUTE)
            b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, BETA)
            b_abs += tl.abs(b_ty)
            b_loss += b_ts * (b_ty - ALPHA * b_ts)
            b_peak = tl.maximum(b_peak, _peak(b_dt, b_ds, b_dy))
    mean = tl.sum(b_abs, axis=0) / tl.cast(elements, COMPUTE)
    weight = 1.0 / tl.maximum(mean, tl.full((), FLOOR, COMPUTE))  # tl.cast would round FLOOR to float32
    loss = 2.0 * weight * tl.sum(b_loss, axis=0)
    valid = (tl.abs(loss) <= MAX_LOSS) & (weight > 0.0) & (weight * tl.max(b_peak, axis=0) <= MAX_GRAD)
    tl.store(p_loss + i_b, tl.where(valid, loss, 0.0))
    tl.store(p_weight + i_b, tl.where(valid, weight, 0.0))
    tl.store(p_valid + i_b, valid)
    if RESIDENT:
        _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, weight, valid)
    else:
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            m_e = o_e < elements
            b_ty, b_ts, b_sy = _differences(p_t, p_s, p_y, o_e, m_e, COMPUTE)
            b_dt, b_ds, b_dy = _gradients(b_ty, b_ts, b_sy, BETA)
            _store_gradients(p_dt, p_ds, p_dy, o_e, m_e, b_dt, b_ds, b_dy, weight, valid)


# -------------------------------------------------------------------------------------------------------- launcher


def _per_sample_outputs(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weight and validity, still empty."""
    batch, dtype = t.shape[:1], torch.promote_types(t.dtype, torch.float32)
    return t.new_empty(batch, dtype=dtype), t.new_empty(batch, dtype=dtype), t.new_empty(batch, dtype=torch.bool)


def launch_ipfm_loss(t: Tensor, s: Tensor, y: Tensor, alpha: float, inplace: bool) -> IpfmLoss:
    """One launch of the Triton kernel; dt and ds lie over t and s, or over copies of them in rows, if `inplace`."""
    dy = empty_rows(t)
    row_t, row_s, row_y = as_rows(t, dy), as_rows(s, dy), as_rows(y, dy)
    dt, ds = (row_t, row_s) if inplace else (empty_rows(t), empty_rows(t))
    loss, weight, valid = _per_sample_outputs(t)
    compute = loss.dtype
    if len(t):
        elements = t[0].numel()
        block, warps = row_config(elements)
        with on_device(t.device):
            _ipfm_loss_kernel[(len(t),)](
                row_t, row_s, row_y, dt, ds, dy, loss, weight, valid,
                elements, *(v.stride(0) for v in (row_t, row_s, row_y, dt, ds, dy)),
                ALPHA=alpha, BETA=4 * (alpha - 0.5), FLOOR=reference.WEIGHT_FLOOR,
                COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
                MAX_LOSS=torch.finfo(compute).max, MAX_GRAD=torch.finfo(t.dtype).max,
                BLOCK=block, RESIDENT=block >= elements, num_warps=warps,
            )  # fmt: skip
    return IpfmLoss(loss, weight, dt, ds, dy, valid)


@operator("ipfm_loss")
def _ipfm_loss(t: Tensor, s: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `IpfmLoss`."""
    return launch_ipfm_loss(t, s, y, alpha, inplace=False)


@_ipfm_loss.register_fake
def _(t: Tensor, s: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, weight, valid = _per_sample_outputs(t)
    return loss, weight, empty_rows(t), empty_rows(t), empty_rows(t), valid


@operator("ipfm_loss_", mutates=("t", "s"))
def _ipfm_loss_(t: Tensor, s: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, weight, dy, valid); dt is written over t and ds over s."""
    got = launch_ipfm_loss(t, s, y, alpha, inplace=True)
    for given, row in ((t, got.dt), (s, got.ds)):
        if row is not given:
            given.copy_(row)
    return got.loss, got.weight, got.dy, got.valid


@_ipfm_loss_.register_fake
def _(t: Tensor, s: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, weight, valid = _per_sample_outputs(t)
    return loss, weight, empty_rows(t), valid


# -------------------------------------------------------------------------------------------------- public function


def _share_memory(*tensors: Tensor) -> bool:
    """Whether some start at one address, as far as there are addresses: a compiler traces tensors that have none."""
    addresses = [] if torch.compiler.is_compiling() else [v.data_ptr() for v in tensors if v.numel() and not v.is_meta]
    return len(set(addresses)) < len(addresses)


@torch.no_grad()
def ipfm_loss(
    t: Tensor, s: Tensor, y: Tensor, *, alpha: float, inplace: bool = False, backend: Backend = "auto"
) -> IpfmLoss:
    """The generator's loss and its gradients with respect to the teacher's and student's outputs and the sample.

        L = λ [ ‖T-y‖² - ‖S-y‖² - 2(α-½)‖T-S‖² ],   λ = 1 / max(mean|T-y|, 1e-5), constant for the gradients
        ∂L/∂T = λ [2(T-y) - 4(α-½)(T-S)],   ∂L/∂S = λ [-2(S-y) + 4(α-½)(T-S)],   ∂L/∂y = 2λ (S-T)

    Source: IPFM (Shlenskii & Korotin) eq. 21 at α = ½; for every α it is twice SiD (Zhou et al. 2024) eq. 23.

    Args:
        t, s, y: (B, C, H, W) or (B, N), one shape, device and dtype (float32, bfloat16, float16 or float64), each of
            any strides: T(x, σ), S(x, σ) and the clean sample. B = 0 is fine. Not recorded by autograd.
        alpha: SiD's α, in [-1e6, 1e6]; ½ is pure IPFM, 1 the regularised objective.
        inplace: writes ∂L/∂T over t and ∂L/∂S over s and returns them. t, s and y must then not share memory.
        backend: "auto", "triton" or "reference".

    Returns:
        loss (B,), summed over elements, and weight (B,) λ, both float32 (float64 for float64 inputs); dt, ds, dy in the
        inputs' dtype and t's memory format (C-contiguous where t's samples are not dense); valid (B,) bool. Sums are
        float32 (float64 for float64), in an order that depends on the shape alone, so results repeat bit for bit.

    A sample is invalid when an input is not finite, when its loss overflows, or when a gradient exceeds its dtype. Its
    loss, weight and gradients are exactly 0; the caller divides by the number of valid ones. Reads no value on the
    host. Raises ValueError for a shape, dtype, device or number that does not fit.

    Bytes moved: 6 a element and byte of dtype (3 read, 3 written) in one launch; samples of more than 4096 elements are
    read a second time, mostly from cache. A tensor whose memory format differs from t's is copied first.
    """
    op = "ipfm_loss"
    _checks.samples(op, "t", t)
    _checks.same(op, "s", s, "t", t)
    _checks.same(op, "y", y, "t", t)
    alpha = _checks.finite(op, "alpha", alpha)
    if abs(alpha) > 1e6:
        raise ValueError(f"{op}: alpha must be in [-1e6, 1e6]; got {alpha}")
    if inplace and _share_memory(t, s, y):
        raise ValueError(f"{op}: inplace=True overwrites t and s; got tensors that share memory")
    if use_triton(op, backend, t.device):
        if not inplace:
            return IpfmLoss(*_ipfm_loss(t, s, y, alpha))
        loss, weight, dy, valid = _ipfm_loss_(t, s, y, alpha)
        return IpfmLoss(loss, weight, t, s, dy, valid)
    return reference.ipfm_loss(t, s, y, alpha=alpha, inplace=inplace)
