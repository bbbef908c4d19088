"""denoising_loss: the weighted denoising loss and its gradient in one pass, without autograd."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, reference
from ipfm.kernels._dispatch import Backend, on_device, row_config, use_triton
from ipfm.kernels._operators import direct, operator
from ipfm.kernels._rows import as_rows, empty_rows
from ipfm.kernels.reference import DenoisingLoss

# ---------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _error(p_pred, p_y, p_x, o_e, m_e, c_skip, c_out, STRETCH: tl.constexpr, RAW: tl.constexpr, COMPUTE: tl.constexpr):
    """pred - y, or c_skip x + c_out pred - y; 0 where masked. STRETCH: c + STRETCH (y - c) for y, c = c_skip x or 0."""
    b_pred = tl.load(p_pred + o_e, mask=m_e, other=0.0).to(COMPUTE)
    if STRETCH != 1.0:
        b_y = tl.load(p_y + o_e, mask=m_e, other=0.0).to(COMPUTE)
        if RAW:
            b_y = b_y - c_skip * tl.load(p_x + o_e, mask=m_e, other=0.0).to(COMPUTE)
            b_pred = c_out * b_pred
        return b_pred - tl.full((), STRETCH, COMPUTE) * b_y
    else:
        if RAW:
            b_pred = c_skip * tl.load(p_x + o_e, mask=m_e, other=0.0).to(COMPUTE) + c_out * b_pred
        return b_pred - tl.load(p_y + o_e, mask=m_e, other=0.0).to(COMPUTE)


@triton.jit
def denoising_loss_kernel(
    p_pred, p_y, p_x, p_sigma, p_c_skip, p_c_out, p_grad, p_loss, p_valid,
    elements, sp_b, sy_b, sx_b, sg_b,
    DATA_TERM: tl.constexpr, STRETCH: tl.constexpr, SHARE: tl.constexpr, RAW: tl.constexpr, COMPUTE: tl.constexpr,
    MAX_LOSS: tl.constexpr, MAX_GRAD: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program = sample: loss = w·Σ(pred-y)², grad = 2w(pred-y), w = DATA_TERM + 1/σ² with DATA_TERM = 1/σ_d² or 0.

    RAW: c_skip x + c_out pred in place of pred, so that grad has the factor c_out. STRETCH: see `_error`. SHARE: factor
    of w.

    Whether the sample is valid is known only after its sum: the row waits in registers (RESIDENT), or is read again.
    """
    # The sample's rows and numbers.
    i_b = tl.program_id(0).to(tl.int64)
    p_pred += i_b * sp_b
    p_y += i_b * sy_b
    p_x += i_b * sx_b
    p_grad += i_b * sg_b
    sigma = tl.load(p_sigma + i_b).to(COMPUTE)
    weight = DATA_TERM + 1.0 / (sigma * sigma)
    if SHARE != 1.0:
        weight = tl.full((), SHARE, COMPUTE) * weight
    slope = 2.0 * weight
    c_skip = weight
    c_out = weight
    if RAW:
        c_skip = tl.load(p_c_skip + i_b).to(COMPUTE)
        c_out = tl.load(p_c_out + i_b).to(COMPUTE)
        slope = slope * c_out

    # Load and compute: the errors, their squares and the largest of them.
    if RESIDENT:
        o_e = tl.arange(0, BLOCK)
        m_e = o_e < elements
        b_e = _error(p_pred, p_y, p_x, o_e, m_e, c_skip, c_out, STRETCH, RAW, COMPUTE)
        b_loss = b_e * b_e
        b_peak = tl.abs(b_e)
    else:
        b_loss = tl.zeros((BLOCK,), COMPUTE)
        b_peak = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            b_e = _error(p_pred, p_y, p_x, o_e, o_e < elements, c_skip, c_out, STRETCH, RAW, COMPUTE)
            b_loss += b_e * b_e
            b_peak = tl.maximum(b_peak, tl.abs(b_e))

    # Reduce: the loss, and whether the sample is valid.
    loss = weight * tl.sum(b_loss, axis=0)
    fits = (tl.abs(loss) <= MAX_LOSS) & (tl.abs(slope) * tl.max(b_peak, axis=0) <= MAX_GRAD)
    valid = fits & (sigma > 0.0) & (sigma <= MAX_LOSS)
    tl.store(p_loss + i_b, tl.where(valid, loss, 0.0))
    tl.store(p_valid + i_b, valid)

    # Store: the gradient, of errors that wait in registers or are computed again.
    if RESIDENT:
        tl.store(p_grad + o_e, tl.where(valid, slope * b_e, 0.0).to(p_grad.dtype.element_ty), mask=m_e)
    else:
        for start in range(0, elements, BLOCK):
            o_e = start + tl.arange(0, BLOCK)
            m_e = o_e < elements
            b_e = _error(p_pred, p_y, p_x, o_e, m_e, c_skip, c_out, STRETCH, RAW, COMPUTE)
            tl.store(p_grad + o_e, tl.where(valid, slope * b_e, 0.0).to(p_grad.dtype.element_ty), mask=m_e)


# -------------------------------------------------------------------------------------------------------- launcher


def _outputs(pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and validity, still empty."""
    batch, dtype = pred.shape[:1], torch.promote_types(y.dtype, torch.float32)
    return pred.new_empty(batch, dtype=dtype), empty_rows(pred), pred.new_empty(batch, dtype=torch.bool)


@operator("denoising_loss")
def _denoising_loss(
    pred: Tensor,
    y: Tensor,
    sigma: Tensor,
    sigma_data: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    stretch: float = 1.0,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `DenoisingLoss`, in one launch of the Triton kernel."""
    loss, grad, valid = _outputs(pred, y)
    row_pred, row_y = as_rows(pred, grad), as_rows(y, grad)
    row_x = row_y if x is None else as_rows(x, grad)
    compute = loss.dtype
    if len(pred):
        elements = pred[0].numel()
        block, warps = row_config(elements)
        with on_device(pred.device):
            denoising_loss_kernel[(len(pred),)](
                row_pred, row_y, row_x, sigma, sigma if c_skip is None else c_skip, sigma if c_out is None else c_out,
                grad, loss, valid,
                elements, row_pred.stride(0), row_y.stride(0), row_x.stride(0), grad.stride(0),
                DATA_TERM=sigma_data**-2, STRETCH=stretch, SHARE=share, RAW=x is not None,
                COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
                MAX_LOSS=torch.finfo(compute).max, MAX_GRAD=torch.finfo(pred.dtype).max,
                BLOCK=block, RESIDENT=block >= elements, num_warps=warps,
            )  # fmt: skip
    return loss, grad, valid


@_denoising_loss.register_fake
def _(
    pred: Tensor,
    y: Tensor,
    sigma: Tensor,
    sigma_data: float,
    x: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    stretch: float = 1.0,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(pred, y)


# -------------------------------------------------------------------------------------------------- public function


@torch.no_grad()
def denoising_loss(
    pred: Tensor,
    y: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    x: Tensor | None = None,
    c_skip: Tensor | None = None,
    c_out: Tensor | None = None,
    stretch: float = 1.0,
    share: float = 1.0,
    backend: Backend = "auto",
) -> DenoisingLoss:
    """The denoising loss of the student and teacher training, and its gradient with respect to the prediction.

        L = w ‖pred - y‖²,   ∂L/∂pred = 2w (pred - y),   w = (σ² + σ_d²) / (σσ_d)²

    With x, c_skip and c_out `pred` is a network's raw output F, and the preconditioning is part of the loss:

        L = w ‖c_skip x + c_out F - y‖²,   ∂L/∂F = 2w c_out (c_skip x + c_out F - y)

    A stretch other than 1 puts c + stretch (y - c) in the place of y, c = c_skip x with the preconditioning and 0
    without: the target of a raw output is then stretch (y - c) / c_out. A share other than 1 is a factor of w. A
    student that learns from real data too has b/a and a on the generator's samples and (1-b)/(1-a) and 1-a on real
    images, of the (a, b) of `ipfm_loss`.

    Source: EDM (Karras et al. 2022) table 1 and eq. 7; PFGM++ keeps them for every D. σ_d = inf leaves w = 1/σ², the
    weight of VP and VE in the same table. Real data: RealUID (arXiv 2509.22459).

    Args:
        pred: (B, C, H, W) or (B, N), float32, bfloat16, float16 or float64, any strides: the denoiser's output. B = 0
            is fine. Not recorded by autograd. A raw output may have any dtype whose numbers y's holds, such as bfloat16
            beside float32.
        y: clean sample, of pred's shape, device and dtype, any strides.
        sigma: (B,) float32 or float64, noise levels in the units of y.
        sigma_data: σ_d, in [1e-6, 1e6], or inf.
        x: noisy sample, of y's shape, device and dtype, any strides; given with c_skip and c_out or not at all.
        c_skip: (B,) float32 or float64, factor of x.
        c_out: (B,) float32 or float64, factor of F.
        stretch: of the target, see above; in [-1e6, 1e6].
        share: factor of the loss; above 0 and up to 1e6.
        backend: "auto", "triton" or "reference".

    Returns:
        loss (B,), summed over elements, float32 (float64 for a float64 y); grad in pred's dtype and memory format
        (C-contiguous where pred's samples are not dense); valid (B,) bool. Computed, and summed in an order that
        depends on the shape alone, in float32 (float64 for a float64 y).

    A sample is invalid when pred, y, x, c_skip or c_out is not finite, σ is not finite and positive, the loss
    overflows, or the gradient exceeds its dtype. Its loss and gradient are exactly 0. Reads no value on the host.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.

    Bytes moved: 3 a element and byte of dtype (2 read, 1 written) in one launch; samples of more than 4096 elements are
    read a second time, mostly from cache. With the preconditioning 16 a element in float32, 12 with F in bfloat16.
    Outside, it reads F and x, writes the prediction, and takes the gradient back to F's: 20 more than the 12 of the
    loss in float32, 16 more with F in bfloat16. A y or x whose memory format differs from pred's is copied first.

    Example:
        >>> import torch
        >>> from ipfm.kernels import denoising_loss
        >>> y, sigma = torch.zeros(2, 3, 8, 8), torch.tensor([0.5, 1.0])
        >>> result = denoising_loss(y + 0.5, y, sigma)
        >>> result.loss
        tensor([384., 240.])
        >>> result.grad[:, 0, 0, 0]
        tensor([8., 5.])
    """
    op = "denoising_loss"
    _checks.samples(op, "pred", pred)
    raw = not (x is None and c_skip is None and c_out is None)
    _checks.same(op, "y", y, "pred", pred, ("shape", "device") if raw else ("shape", "dtype", "device"))
    if raw:
        _checks.samples(op, "y", y)
        _checks.narrower(op, "pred", pred, "y", y)
    x, c_skip, c_out = _checks.preconditioning(op, x, c_skip, c_out, y)
    sigma = _checks.per_sample(op, "sigma", sigma, pred)
    sigma_data = _checks.positive(op, "sigma_data", sigma_data, infinite=True)
    if not (1e-6 <= sigma_data <= 1e6 or math.isinf(sigma_data)):
        raise ValueError(f"{op}: sigma_data must be in [1e-6, 1e6], or inf; got {sigma_data}")
    stretch, share = _checks.finite(op, "stretch", stretch), _checks.positive(op, "share", share)
    if abs(stretch) > 1e6 or share > 1e6:
        raise ValueError(f"{op}: stretch must be in [-1e6, 1e6] and share up to 1e6; got {stretch} and {share}")
    if use_triton(op, backend, pred.device):
        run = direct(_denoising_loss, pred)
        return DenoisingLoss(*run(pred, y, sigma, sigma_data, x, c_skip, c_out, stretch, share))
    given = {"sigma_data": sigma_data, "stretch": stretch, "share": share}
    return reference.denoising_loss(pred, y, sigma, x=x, c_skip=c_skip, c_out=c_out, **given)
