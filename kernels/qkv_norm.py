"""qkv_norm: queries, keys and values of attention, each brought to size 1 in every head, in one pass each way."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipfm.kernels import _checks
from ipfm.kernels._dispatch import Backend, head_config, use_triton
from ipfm.kernels._launch import Launch
from ipfm.kernels._operators import Operation, Ways
from ipfm.kernels.pixel_norm_silu import EPS

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _vectors(N, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """(first vector of this program, its begin in the projection, offsets from both (ROWS, DP), mask)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_r, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    # A token of the projection has those of q, k and v one after the other.
    begin = first // HEADS * (3 * HEADS * D) + tl.program_id(1) * (HEADS * D)
    o_h = (first % HEADS).to(tl.int32) + o_r
    o_qkv = o_h * D + o_h // HEADS * (2 * HEADS * D) + o_d
    return first, begin, o_r * D + o_d, o_qkv, (o_r < N - first) & (o_d < D)


@triton.jit
def qkv_norm_kernel(
    p_qkv, p_q, p_k, p_v, p_sizes, N,
    EPS: tl.constexpr, K_SCALE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, KEPT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (ROWS vectors, of q, k or v): x / (EPS + rms), of k times K_SCALE, and if KEPT the rms."""
    first, begin, o, o_qkv, m = _vectors(N, HEADS, D, DP, ROWS)
    b_x = tl.load(p_qkv + begin + o_qkv, mask=m, other=0.0).to(COMPUTE)
    b_size = tl.sqrt(tl.sum(b_x * b_x, axis=1) * tl.full((), 1 / D, COMPUTE))
    if KEPT:
        o_s = first + tl.arange(0, ROWS)
        tl.store(p_sizes + tl.program_id(1) * N + o_s, b_size, mask=o_s < N)
    b_n = b_x * (1.0 / (tl.full((), EPS, COMPUTE) + b_size))[:, None]
    dtype = p_q.dtype.element_ty
    if tl.program_id(1) == 0:
        tl.store(p_q + first * D + o, b_n.to(dtype), mask=m)
    elif tl.program_id(1) == 1:
        tl.store(p_k + first * D + o, (b_n * tl.full((), K_SCALE, COMPUTE)).to(dtype), mask=m)
    else:
        tl.store(p_v + first * D + o, b_n.to(dtype), mask=m)


@triton.jit
def _normed_gradient(p_n, p_dn, o, m, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """(n, dn) of what is SCALE n and has this gradient."""
    b_n = tl.load(p_n + o, mask=m, other=0.0).to(COMPUTE)
    b_dn = tl.load(p_dn + o, mask=m, other=0.0).to(COMPUTE)
    return b_n * tl.full((), 1 / SCALE, COMPUTE), b_dn * tl.full((), SCALE, COMPUTE)


@triton.jit
def qkv_norm_backward_kernel(
    p_q, p_k, p_v, p_dq, p_dk, p_dv, p_sizes, p_dqkv, N,
    EPS: tl.constexpr, K_SCALE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Program (ROWS vectors, of q, k or v): dx = dn / s - n mean(n dn) / rms, s = EPS + rms."""
    first, begin, o, o_qkv, m = _vectors(N, HEADS, D, DP, ROWS)
    if tl.program_id(1) == 0:
        b_n, b_dn = _normed_gradient(p_q + first * D, p_dq + first * D, o, m, 1.0, COMPUTE)
    elif tl.program_id(1) == 1:
        b_n, b_dn = _normed_gradient(p_k + first * D, p_dk + first * D, o, m, K_SCALE, COMPUTE)
    else:
        b_n, b_dn = _normed_gradient(p_v + first * D, p_dv + first * D, o, m, 1.0, COMPUTE)
    o_s = first + tl.arange(0, ROWS)
    p_size = p_sizes + tl.program_id(1) * N + o_s
    b_size = tl.load(p_size, mask=o_s < N, other=1.0, eviction_policy="evict_last")
    b_mean = tl.sum(b_n * b_dn, axis=1) * tl.full((), 1 / D, COMPUTE)
    # Where all is 0 there is no direction, and its gradient is 0.
    b_along = tl.where(b_size == 0.0, 0.0, b_mean / tl.where(b_size == 0.0, 1.0, b_size))
    b_dx = b_dn * (1.0 / (tl.full((), EPS, COMPUTE) + b_size))[:, None] - b_n * b_along[:, None]
    tl.store(p_dqkv + begin + o_qkv, b_dx.to(p_dqkv.dtype.element_ty), mask=m)


# -------------------------------------------------------------------------------------------------------- launchers


def block_sizes(heads: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """(what is constant in the kernels for these heads, warps)."""
    padded, rows, warps = head_config(width)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    return {"HEADS": heads, "D": width, "DP": padded, "ROWS": rows, "COMPUTE": compute}, warps


@lru_cache(maxsize=4096)
def _launch(
    kernel: Any,
    tokens: int,
    heads: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    eps: float,
    k_scale: float,
    kept: bool,
) -> Launch:
    """The launch for so many tokens."""
    sizes, warps = block_sizes(heads, width, dtype)
    values = {"N": tokens * heads, "EPS": eps, "K_SCALE": k_scale, "KEPT": kept, **sizes}
    return Launch(kernel, (triton.cdiv(tokens * heads, sizes["ROWS"]), 3), warps, values)


def _launch_forward(
    qkv: Tensor, heads: int, eps: float, k_scale: float, kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, and if `kept` the sizes (3, B L heads) of their vectors); qkv is contiguous."""
    q, k, v, sizes = _results(qkv, heads, eps, k_scale, kept)
    if qkv.numel():
        launch = _launch(
            qkv_norm_kernel, q.shape[0] * q.shape[1], heads, q.shape[3], qkv.device, qkv.dtype, eps, k_scale, kept
        )
        launch(qkv.device, qkv, q, k, v, sizes if kept else qkv)
    return q, k, v, sizes


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, sizes: Tensor, eps: float, k_scale: float
) -> Tensor:
    """dqkv (B, L, 3·C); all are contiguous."""
    dqkv = _gradient(q, k, v, dq, dk, dv, sizes, eps, k_scale)
    if dqkv.numel():
        batch, tokens, heads, width = q.shape
        launch = _launch(qkv_norm_backward_kernel, batch * tokens, heads, width, q.device, q.dtype, eps, k_scale, True)
        launch(q.device, q, k, v, dq, dk, dv, sizes, dqkv)
    return dqkv


def _results(qkv: Tensor, heads: int, eps: float, k_scale: float, kept: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, channels = qkv.shape
    q, k, v = (qkv.new_empty(batch, tokens, heads, channels // (3 * heads)) for _ in range(3))
    vectors = batch * tokens * heads if kept else 0
    return q, k, v, qkv.new_empty((3, vectors), dtype=torch.promote_types(qkv.dtype, torch.float32))


def _gradient(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, sizes: Tensor, eps: float, k_scale: float
) -> Tensor:
    batch, tokens, heads, width = q.shape
    return q.new_empty(batch, tokens, 3 * heads * width)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _plain_forward(
    qkv: Tensor, heads: int, eps: float, k_scale: float, kept: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = qkv.unflatten(2, (3, heads, -1))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    norm = torch.linalg.vector_norm(split, dim=-1, keepdim=True, dtype=wide)
    sizes = norm * (1 / math.sqrt(split.shape[-1]))
    divisors = (eps + sizes).to(qkv.dtype)
    if k_scale != 1:
        divisors = divisors * divisors.new_tensor([1, 1 / k_scale, 1]).view(3, 1, 1)
    q, k, v = (a / b for a, b in zip(split.unbind(2), divisors.unbind(2), strict=True))
    return q, k, v, sizes.movedim(2, 0).reshape(3, -1) if kept else sizes.new_empty(3, 0)


def _plain_backward(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, sizes: Tensor, eps: float, k_scale: float
) -> Tensor:
    parts = []
    for n, dn, scale, rows in zip((q, k, v), (dq, dk, dv), (1.0, k_scale, 1.0), sizes, strict=True):
        size = rows.view(*n.shape[:3], 1)
        mean = (n * dn).mean(-1, keepdim=True, dtype=size.dtype)
        along = torch.where(size == 0, 0, mean / size).to(n.dtype)
        d = dn * (scale / (eps + size)).to(n.dtype)
        parts.append(d.sub_(n * (along if scale == 1 else along / scale)))
    return torch.stack(parts, dim=2).flatten(2)


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, _, ctx.eps, ctx.k_scale, _ = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*output)


def _differentiate(ctx: Any, backward: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sizes = ctx.saved_tensors
    dq, dk, dv = (d.contiguous() for d in gradients[:3])
    return backward(q, k, v, dq, dk, dv, sizes, ctx.eps, ctx.k_scale), None, None, None, None


_operation = Operation(
    "qkv_norm",
    launches=Ways(_launch_forward, _launch_backward),
    fakes=Ways(_results, _gradient),
    plain=Ways(_plain_forward, _plain_backward),
    save=_save,
    differentiate=_differentiate,
)


# -------------------------------------------------------------------------------------------------- public function


def qkv_norm(
    qkv: Tensor, heads: int, *, eps: float = EPS, k_scale: float = 1.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a joint projection, each vector x of a head divided by eps + r, r its root mean square; k scaled.

    What EDM2 does before attention. With k_scale = 1/√d the products of q and k are the logits (pass `scale=1` to
    `scaled_dot_product_attention`). Differentiable once; autograd keeps the results, which attention keeps too, and a
    number for each vector. Where all of a vector is 0 the gradient of r is 0.

    Args:
        qkv: (B, L, 3·heads·d) float32, bfloat16, float16 or float64, a token's channels in the order (q|k|v, head,
            channel of the head); copied where it is not contiguous. B = 0 is fine.
        heads: attention heads, > 0.
        eps: added to r, > 0.
        k_scale: factor of k, finite and not 0.
        backend: "auto", "triton" or "reference".

    Returns:
        q, k and v, each (B, L, heads, d) in the dtype of qkv, contiguous where Triton makes them. Triton computes in
        float32 (float64 for float64) and rounds once.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        RuntimeError: in the backward pass, where a second derivative is asked for.

    Bytes moved: forward 2, backward 3 times those of qkv.

    Example:
        >>> import torch
        >>> from ipfm.kernels import qkv_norm
        >>> q, k, v = qkv_norm(torch.tensor([[[3.0, 4.0, 0.0, 5.0, 1.0, 1.0]]]), heads=1, k_scale=0.5)
        >>> [[round(x, 3) for x in t.flatten().tolist()] for t in (q, k, v)]
        [[0.849, 1.131], [0.0, 0.707], [1.0, 1.0]]
    """
    op = "qkv_norm"
    _checks.samples(op, "qkv", qkv)
    if qkv.ndim != 3:
        raise ValueError(f"{op}: qkv must be (B, L, 3·heads·d); got {tuple(qkv.shape)}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"{op}: 3·heads must divide the {qkv.shape[2]} channels of qkv; got heads={heads!r}")
    eps, k_scale = _checks.positive(op, "eps", eps), _checks.finite(op, "k_scale", k_scale)
    if k_scale == 0:
        raise ValueError(f"{op}: k_scale must not be 0")
    return unchecked_qkv_norm(qkv, heads, eps=eps, k_scale=k_scale, triton_runs=use_triton(op, backend, qkv.device))


def unchecked_qkv_norm(
    qkv: Tensor, heads: int, *, eps: float = EPS, k_scale: float = 1.0, triton_runs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_norm` for a layer that knows its arguments to be valid."""
    kept = torch.is_grad_enabled() and qkv.requires_grad
    q, k, v, _ = _operation(qkv.contiguous(), heads, eps, k_scale, kept, triton_runs=triton_runs)
    return q, k, v
