"""row_normalise: rows of a weight brought to size 1, scaled and cast, in one pass each way: forced normalisation."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks, reference
from ipfm.kernels._dispatch import Backend, float64_bits, row_config, use_triton
from ipfm.kernels._images import dense, like
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways
from ipfm.kernels.weight_rows import EPS

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["gain_bits"])
def row_normalise_kernel(
    p_m, p_w, columns, gain_bits,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program = row: w = gain m / (s √K), s = EPS + ‖m‖ / √K. It waits in registers (RESIDENT) or is read again."""
    start = tl.program_id(0).to(tl.int64) * columns
    k = tl.cast(columns, COMPUTE)
    gain = gain_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    if RESIDENT:
        o = tl.arange(0, BLOCK)
        b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
        b_square = b_m * b_m
    else:
        b_square = tl.zeros((BLOCK,), COMPUTE)
        for first in range(0, columns, BLOCK):
            o = first + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            b_square += b_m * b_m
    size = tl.sqrt(tl.sum(b_square, axis=0) / k)
    factor = gain / ((size + tl.full((), EPS, COMPUTE)) * tl.sqrt(k))
    if RESIDENT:
        tl.store(p_w + start + o, (b_m * factor).to(p_w.dtype.element_ty), mask=o < columns)
    else:
        for first in range(0, columns, BLOCK):
            o = first + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            tl.store(p_w + start + o, (b_m * factor).to(p_w.dtype.element_ty), mask=o < columns)


@triton.jit(do_not_specialize=["gain_bits"])
def row_normalise_backward_kernel(
    p_m, p_dw, p_dm, columns, gain_bits,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program = row: dm = (dw - m (m·dw) / (‖m‖ √K s)) gain / (s √K), s = EPS + ‖m‖ / √K."""
    start = tl.program_id(0).to(tl.int64) * columns
    k = tl.cast(columns, COMPUTE)
    gain = gain_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    if RESIDENT:
        o = tl.arange(0, BLOCK)
        b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
        b_g = tl.load(p_dw + start + o, mask=o < columns, other=0.0).to(COMPUTE)
        b_square, b_inner = b_m * b_m, b_m * b_g
    else:
        b_square, b_inner = tl.zeros((BLOCK,), COMPUTE), tl.zeros((BLOCK,), COMPUTE)
        for first in range(0, columns, BLOCK):
            o = first + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            b_g = tl.load(p_dw + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            b_square += b_m * b_m
            b_inner += b_m * b_g
    size = tl.sqrt(tl.sum(b_square, axis=0) / k)
    s = size + tl.full((), EPS, COMPUTE)
    # A row of zeros has no direction; NaN stays.
    share = tl.where(size == 0.0, 0.0, tl.sum(b_inner, axis=0) / (tl.where(size == 0.0, 1.0, size) * s * k))
    factor = gain / (s * tl.sqrt(k))
    if RESIDENT:
        tl.store(p_dm + start + o, ((b_g - b_m * share) * factor).to(p_dm.dtype.element_ty), mask=o < columns)
    else:
        for first in range(0, columns, BLOCK):
            o = first + tl.arange(0, BLOCK)
            b_m = tl.load(p_m + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            b_g = tl.load(p_dw + start + o, mask=o < columns, other=0.0).to(COMPUTE)
            tl.store(p_dm + start + o, ((b_g - b_m * share) * factor).to(p_dm.dtype.element_ty), mask=o < columns)


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(columns: int, wide: torch.dtype) -> tuple[dict[str, Any], int]:
    """(what is constant in the kernels for rows of so many elements, warps)."""
    block, warps = row_config(columns)
    compute = tl.float64 if wide == torch.float64 else tl.float32
    return {"COMPUTE": compute, "BLOCK": block, "RESIDENT": block >= columns}, warps


@lru_cache(maxsize=4096)
def _launch(
    kernel: Any,
    rows: int,
    columns: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    gain: float,
    eps: float,
) -> Launch:
    """The launch for so many rows of a length; a kernel is another for each device and for other dtypes."""
    sizes, warps = block_sizes(columns, _wide(*dtypes))
    values = {"columns": columns, "gain_bits": float64_bits(gain), "EPS": eps, **sizes}
    return Launch(kernel, (rows,), warps, values)


def _launch_forward(master: Tensor, gain: float, eps: float, out_dtype: torch.dtype) -> Tensor:
    """The weight; the rows of the master lie in memory without gaps."""
    out = _weight(master, gain, eps, out_dtype)
    if out.numel():
        dtypes = (master.dtype, out_dtype)
        launch = _launch(row_normalise_kernel, len(master), master[0].numel(), master.device, dtypes, gain, eps)
        launch(master.device, master, out)
    return out


def _launch_backward(master: Tensor, dweight: Tensor, gain: float, eps: float) -> Tensor:
    """dL/dM; the gradient of the weight is laid out as the master."""
    out = torch.empty_like(master)
    if out.numel():
        dtypes = (master.dtype, dweight.dtype)
        launch = _launch(
            row_normalise_backward_kernel, len(master), master[0].numel(), master.device, dtypes, gain, eps
        )
        launch(master.device, master, dweight, out)
    return out


def _weight(master: Tensor, gain: float, eps: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(master, dtype=out_dtype)


def _gradient(master: Tensor, dweight: Tensor, gain: float, eps: float) -> Tensor:
    return torch.empty_like(master)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _plain_forward(master: Tensor, gain: float, eps: float, out_dtype: torch.dtype) -> Tensor:
    wide = master.to(_wide(master.dtype, out_dtype))
    return reference.row_normalise(wide, gain=gain, eps=eps).to(out_dtype)


def _plain_backward(master: Tensor, dweight: Tensor, gain: float, eps: float) -> Tensor:
    wide = _wide(master.dtype, dweight.dtype)
    m, g = master.to(wide), dweight.to(wide)
    columns, inside = m.shape[1:].numel(), tuple(range(1, m.ndim))
    size = torch.linalg.vector_norm(m, dim=inside, keepdim=True) / math.sqrt(columns)
    s = eps + size
    share = torch.where(size == 0, 0, (m * g).sum(inside, keepdim=True) / (size * s * columns))
    return torch.addcmul(g, m, share, value=-1).mul_(gain / math.sqrt(columns) / s).to(master.dtype)


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    master, ctx.gain, ctx.eps, _ = inputs
    ctx.save_for_backward(master)


def _differentiate(ctx: Any, backward: Any, dweight: Tensor) -> tuple[Any, None, None, None]:
    (master,) = ctx.saved_tensors
    return backward(master, like(dweight, master), ctx.gain, ctx.eps), None, None, None


_operation = Operation(
    "row_normalise",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_weight, _gradient),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def row_normalise(
    master: Tensor,
    *,
    gain: float = 1.0,
    out_dtype: torch.dtype | None = None,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """gain·n(M)/√K with n(M) = M / (eps + ‖M‖/√K) a row at a time: the weight that a layer of EDM2 computes with.

        dL/dM = (G - M (M·G) / (‖M‖ √K s)) gain / (s √K),   G = dL/dw,   s = eps + ‖M‖/√K

    Forced weight normalisation [Karras et al. 2024, section 2.3], as an operation of its own: it is
    linear in G, so that a step may apply it once to a sum over micro-batches. Differentiable once; autograd keeps M
    alone. In a row of zeros M (M·G) / ‖M‖ is 0.

    Args:
        master: M, (rows, ...) with K elements a row, float32, bfloat16, float16 or float64; contiguous and
            channels_last as they are, anything else is copied. No row is fine.
        gain: a factor.
        out_dtype: of the weight, one of the same; default: that of M.
        eps: added to the root mean square of a row, > 0.
        backend: "auto", "triton" or "reference".

    Returns:
        The weight, in M's shape and memory format. Computed in float32 (float64 where M or the weight is) and rounded
        once. Its sums have an order that depends on K alone.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: M and the weight forward; M, G and dL/dM backward, which has M's dtype. Rows of more than 4096
    elements are read a second time, mostly from cache.

    Example:
        >>> import torch
        >>> from ipfm.kernels import row_normalise
        >>> row_normalise(torch.tensor([[3.0, -3.0, 3.0, -3.0], [0.0, 0.0, 0.0, 0.5]])).round(decimals=3)
        tensor([[ 0.5000, -0.5000,  0.5000, -0.5000],
                [ 0.0000,  0.0000,  0.0000,  1.0000]])
    """
    op = "row_normalise"
    _checks.tensor(op, "master", master)
    _checks.float_dtype(op, "master's dtype", master.dtype)
    if master.ndim < 2 or 0 in master.shape[1:]:
        raise ValueError(f"{op}: master must be (rows, ...) with an element a row; got {tuple(master.shape)}")
    gain, eps = _checks.finite(op, "gain", gain), _checks.positive(op, "eps", eps)
    out_dtype = master.dtype if out_dtype is None else out_dtype
    _checks.float_dtype(op, "out_dtype", out_dtype)
    return unchecked_row_normalise(
        master, gain=gain, out_dtype=out_dtype, eps=eps, triton_runs=use_triton(op, backend, master.device)
    )


def unchecked_row_normalise(
    master: Tensor, *, gain: float = 1.0, out_dtype: torch.dtype, eps: float = EPS, triton_runs: bool
) -> Tensor:
    """`row_normalise` where the arguments are known to be valid."""
    found: Tensor = _operation(dense(master), gain, eps, out_dtype, triton_runs=triton_runs)
    return found
