"""Attention with a choice of implementation; the optional ones are imported only when they are used."""

import functools
import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

AttentionBackend = Literal["auto", "xformers", "sdpa", "math"]
ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)


def check_attention_backend(backend: str) -> None:
    """Check that `backend` is one of the names that `attention` knows.

    Raises:
        ValueError: it is none of them.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; possible: {', '.join(ATTENTION_BACKENDS)}")


def head_count(channels: int, num_heads: int | None = None, *, channels_per_head: int = 64) -> int:
    """Attention heads over `channels`: `num_heads`, or where that is None channels // channels_per_head (it may be 0).

    Raises:
        ValueError: they do not divide the channels.
    """
    heads = channels // channels_per_head if num_heads is None else num_heads
    if heads and channels % heads:
        raise ValueError(f"{heads} attention heads do not divide {channels} channels")
    return heads


def attention(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """softmax over keys of q·kᵀ/√d, times v.

    The logits and the softmax are at least float32, forward and backward.

    Args:
        q: (B, L, heads, d), of any floating dtype.
        k: (B, M, heads, d), of q's dtype.
        v: (B, M, heads, d), of q's dtype.
        backend: "xformers" is its memory-efficient attention (CUDA; float16, bfloat16, float32), "sdpa" torch's
            `scaled_dot_product_attention`, "math" the formula written out, which holds B·heads·L·M logits. "auto" takes
            xformers where it can run and torch's elsewhere.

    Returns:
        (B, L, heads, d) in q's dtype.

    Raises:
        ValueError: an unknown backend, or one that cannot run, with the reason.
    """
    check_attention_backend(backend)
    if backend == "auto":
        # Under torch.compile torch's own operation is the one that the compiler knows.
        repeating = torch.are_deterministic_algorithms_enabled()
        usable = q.is_cuda and not repeating and not torch.compiler.is_compiling()
        backend = "xformers" if usable and _xformers_obstacle(*_probe_key(q)) is None else "sdpa"
    elif backend == "xformers":
        repeating = torch.are_deterministic_algorithms_enabled()
        obstacle = _UNREPEATED if repeating else _xformers_obstacle(*_probe_key(q))
        if obstacle is not None:
            raise ValueError(f"attention backend 'xformers' cannot run: {obstacle}; possible: auto, sdpa, math")
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return _written_out(q, k, v)


_UNREPEATED = "its gradients do not repeat, and they have to here"


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("blhd,bmhd->bhlm", q.to(wide), (k / math.sqrt(q.shape[-1])).to(wide))
    return torch.einsum("bhlm,bmhd->blhd", logits.softmax(dim=-1).to(q.dtype), v)


def _probe_key(q: Tensor) -> tuple[torch.device, torch.dtype, int]:
    return q.device, q.dtype, q.shape[-1]


@functools.cache
def _xformers_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why xformers cannot serve such tensors, or None; asked once, by a tiny forward and backward pass."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no kernel for {dtype}"
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # a build that does not fit this torch or CUDA fails in many ways, not only ImportError
        return f"import failed ({type(error).__name__}: {_first_line(error)})"
    try:
        with torch.enable_grad():
            q, k, v = (torch.zeros(1, 8, 1, head_width, device=device, dtype=dtype).requires_grad_() for _ in range(3))
            torch.autograd.grad(memory_efficient_attention(q, k, v).sum(), (q, k, v))
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return f"no operator for {dtype} and head width {head_width} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
