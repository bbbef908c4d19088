"""pixel_norm_silu: each pixel's channels brought to size 1, and SiLU of that, in one pass each way."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import _checks
from ipfm.kernels._dispatch import Backend, pixel_config, use_triton
from ipfm.kernels._images import channels_last, dense, like, offsets
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways
from ipfm.kernels._silu import silu, silu_slope
from ipfm.kernels.mp_silu import SILU_SIZE, silu_gradient

EPS = 1e-4
"""Added to the size by which is divided, in all normalisations of EDM2."""

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _pixels(p_x, HW, LAST: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr):
    """(first element of the sample, offsets and mask (BLOCK, CP)) of this program's pixels."""
    splits = tl.cdiv(HW, BLOCK)
    i_b = (tl.program_id(0) // splits).to(tl.int64)
    o_hw = (tl.program_id(0) % splits) * BLOCK + tl.arange(0, BLOCK)[:, None]
    o_c = tl.arange(0, CP)[None, :]
    return i_b * HW * C, offsets(o_c, o_hw, HW, C, LAST), (o_c < C) & (o_hw < HW)


@triton.jit
def pixel_norm_silu_kernel(
    p_x, p_normed, p_activated, HW,
    EPS: tl.constexpr, FACTOR: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and pixels): n = x / (EPS + rms) over a pixel's channels, and FACTOR silu(n)."""
    start, o, m = _pixels(p_x, HW, LAST, C, CP, BLOCK)
    dtype = p_normed.dtype.element_ty
    b_x = tl.load(p_x + start + o, mask=m, other=0.0).to(COMPUTE)
    b_size = tl.sqrt(tl.sum(b_x * b_x, axis=1) * tl.full((), 1 / C, COMPUTE))
    b_n = b_x * (1.0 / (tl.full((), EPS, COMPUTE) + b_size))[:, None]
    tl.store(p_normed + start + o, b_n.to(dtype), mask=m)
    tl.store(p_activated + start + o, (silu(b_n) * tl.full((), FACTOR, COMPUTE)).to(dtype), mask=m)


@triton.jit
def pixel_norm_silu_backward_kernel(
    p_x, p_dnormed, p_dactivated, p_dx, HW,
    EPS: tl.constexpr, FACTOR: tl.constexpr, NORMED: tl.constexpr, ACTIVATED: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (sample and pixels): dx = dn / s - n mean(n dn) / rms, s = EPS + rms, dn of both results together."""
    start, o, m = _pixels(p_x, HW, LAST, C, CP, BLOCK)
    b_x = tl.load(p_x + start + o, mask=m, other=0.0).to(COMPUTE)
    b_size = tl.sqrt(tl.sum(b_x * b_x, axis=1) * tl.full((), 1 / C, COMPUTE))
    b_r = 1.0 / (tl.full((), EPS, COMPUTE) + b_size)
    b_n = b_x * b_r[:, None]
    b_dn = tl.zeros((BLOCK, CP), COMPUTE)
    if ACTIVATED:
        b_dy = tl.load(p_dactivated + start + o, mask=m, other=0.0).to(COMPUTE)
        b_dn = b_dy * tl.full((), FACTOR, COMPUTE) * silu_slope(b_n)
    if NORMED:
        b_dn += tl.load(p_dnormed + start + o, mask=m, other=0.0).to(COMPUTE)
    b_mean = tl.sum(b_n * b_dn, axis=1) * tl.full((), 1 / C, COMPUTE)
    # Where all is 0 there is no direction, and its gradient is 0.
    b_along = tl.where(b_size == 0.0, 0.0, b_mean / tl.where(b_size == 0.0, 1.0, b_size))
    b_dx = b_dn * b_r[:, None] - b_n * b_along[:, None]
    tl.store(p_dx + start + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(channels: int, pixels: int, dtype: torch.dtype, last: bool) -> tuple[dict[str, Any], int, int]:
    """(what is constant in the kernels for this shape, programs of a sample, warps)."""
    padded, block, warps = pixel_config(channels, pixels, last)
    sizes = {
        "FACTOR": 1 / SILU_SIZE,
        "LAST": last,
        "C": channels,
        "CP": padded,
        "BLOCK": block,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    return sizes, triton.cdiv(pixels, block), warps


@lru_cache(maxsize=4096)
def _launch(
    kernel: Any,
    shape: tuple[int, ...],
    last: bool,
    device: torch.device,
    dtype: torch.dtype,
    eps: float,
    given: tuple[bool, bool] = (True, True),
) -> Launch:
    """The launch for a dense x of this shape and format."""
    batch, channels, height, width = shape
    sizes, splits, warps = block_sizes(channels, height * width, dtype, last)
    values = {"HW": height * width, "EPS": eps, "NORMED": given[0], "ACTIVATED": given[1], **sizes}
    return Launch(kernel, (batch * splits,), warps, values)


def _launch_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n(x), silu(n(x)) / 0.596); x is dense."""
    normed, activated = _results(x, eps)
    if x.numel():
        launch = _launch(pixel_norm_silu_kernel, x.shape, channels_last(x), x.device, x.dtype, eps)
        launch(x.device, x, normed, activated)
    return normed, activated


def _launch_backward(x: Tensor, dnormed: Tensor | None, dactivated: Tensor | None, eps: float) -> Tensor:
    """dx; all are dense and alike."""
    dx = torch.empty_like(x)
    if x.numel():
        launch = _launch(
            pixel_norm_silu_backward_kernel, x.shape, channels_last(x), x.device, x.dtype, eps,
            (dnormed is not None, dactivated is not None),
        )  # fmt: skip
        launch(x.device, x, *(x if d is None else d for d in (dnormed, dactivated)), dx)
    return dx


def _results(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _gradient(x: Tensor, dnormed: Tensor | None, dactivated: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _size(x: Tensor) -> Tensor:
    """The root mean square over the channels, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide) * (1 / math.sqrt(x.shape[1]))


def _plain_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = x / (eps + _size(x)).to(x.dtype)
    return normed, F.silu(normed).mul_(1 / SILU_SIZE)


def _plain_backward(x: Tensor, dnormed: Tensor | None, dactivated: Tensor | None, eps: float) -> Tensor:
    size = _size(x)
    divisor = (eps + size).to(x.dtype)
    normed, d = x / divisor, dnormed
    if dactivated is not None:
        d = silu_gradient(dactivated, normed)
        d = d if dnormed is None else d.add_(dnormed)
    assert d is not None
    mean = (normed * d).mean(1, keepdim=True, dtype=size.dtype)
    along = torch.where(size == 0, 0, mean / size).to(x.dtype)
    return d / divisor - normed * along


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, backward: Any, dnormed: Tensor | None, dactivated: Tensor | None) -> tuple[Any, None]:
    if dnormed is None and dactivated is None:
        return None, None
    (x,) = ctx.saved_tensors
    return backward(x, *(None if d is None else like(d, x) for d in (dnormed, dactivated)), ctx.eps), None


_operation = Operation(
    "pixel_norm_silu",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_results, _gradient),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def pixel_norm_silu(x: Tensor, *, eps: float = EPS, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """(n, silu(n) / 0.596) with n = x / (eps + r), r the root mean square of each pixel's channels.

    Both results are what an encoder's block of EDM2 needs [Karras et al. 2024, eq. 30 and 81]. Differentiable once;
    autograd keeps x alone. Where all channels are 0 the gradient of r is 0.

    Args:
        x: (B, C, H, W) float32, bfloat16, float16 or float64; contiguous and channels_last as they are, anything else
            is copied. B = 0 is fine.
        eps: added to r, > 0.
        backend: "auto", "triton" or "reference".

    Returns:
        Two tensors of the shape, dtype and memory format of x. Triton computes in float32 (float64 for float64)
        and rounds each result once.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: forward 3, backward 4 times those of x.

    Example:
        >>> import torch
        >>> from ipfm.kernels import pixel_norm_silu
        >>> normed, activated = pixel_norm_silu(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
        >>> [[round(x, 3) for x in t.flatten().tolist()] for t in (normed, activated)]
        [[0.849, 1.131], [0.997, 1.435]]
    """
    op = "pixel_norm_silu"
    _checks.images(op, "x", x)
    eps = _checks.positive(op, "eps", eps)
    return unchecked_pixel_norm_silu(x, eps=eps, triton_runs=use_triton(op, backend, x.device))


def unchecked_pixel_norm_silu(x: Tensor, *, eps: float = EPS, triton_runs: bool) -> tuple[Tensor, Tensor]:
    """`pixel_norm_silu` for a layer that knows its arguments to be valid."""
    normed, activated = _operation(dense(x), eps, triton_runs=triton_runs)
    return normed, activated
